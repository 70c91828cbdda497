"""Under ``torch.compile``: the function goes into dynamo's graph as a subgraph for one sample, which the interpreter runs later.

Dynamo cannot follow a tensor subclass that is made and taken apart inside one call, but AOTAutograd can. So dynamo traces the function on
one sample (with guards on all that it closes over, and its tensors as inputs), between marker ops that say where a sample axis is
hidden, what is differentiated and what is read out. ``PerSample`` holds the subgraph. AOTAutograd calls it, the markers are carried
out by ``_Runner``, and only the physical ops reach the final graph.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch.autograd_function import autograd_function_apply
from torch._higher_order_ops.base_hop import BaseHOP

from per_sample import _arguments, _torch_trees
from per_sample._backward import differentiate, read_out
from per_sample._batched import Batched, Context
from per_sample._dynamo import prepare
from per_sample._errors import DataDependentError, UnsupportedError
from per_sample._lists import LISTS
from per_sample._marks import TracedGrads, answered, ops
from per_sample._run import check_output, lift, split_aux
from per_sample._surroundings import in_context
from per_sample._targets import Targets
from per_sample.quantities.leaf import LeafGrads

if TYPE_CHECKING:
    from per_sample._targets import Convention


class PerSample(BaseHOP):
    """Runs a subgraph with markers; dynamo knows how to trace the body of any ``BaseHOP``."""

    def __init__(self) -> None:
        super().__init__("per_sample")

    def __call__(self, subgraph: Any, *operands: Any, randomness: str) -> Any:
        """The subgraph's results, with every sample's gradients where it says so."""
        if torch.compiler.is_dynamo_compiling():
            return super().__call__(subgraph, *operands, randomness=randomness)
        if not isinstance(subgraph, torch.fx.GraphModule):
            raise DataDependentError(
                "torch.compile could not trace `fn` in one piece; the usual reason is that it asks for the Python value of a per-sample "
                "tensor (a branch, `.item()`, `x[i]`): write `torch.where`. Nor may it print, log, warn, or write into what is outside. "
                "It refuses `nn.LSTM` and the like, too: call `torch.lstm` with the parameters. `fullgraph=True` says where. Or leave the "
                "transform uncompiled."
            )
        tensors = [x for x in operands if isinstance(x, Tensor)]
        n = _batch_size(subgraph, operands)
        ctx, out = in_context(lambda ctx: _Runner(subgraph, ctx).run(*operands), None, tensors, n, randomness)
        return pytree.tree_map(lambda x: _outside(x, ctx), out)


per_sample = PerSample()


def _batch_size(subgraph: Any, operands: tuple[Any, ...]) -> Any:
    placeholders = dict(zip(subgraph.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in subgraph.graph.nodes:
        if node.target in (ops.sample.default, ops.sample, ops.leaf.default, ops.leaf) and node.args[1] >= 0:
            return placeholders[node.args[0]].shape[node.args[1]]
    raise AssertionError("a per-sample subgraph without a batched input")


# What `x.data` is in dynamo's graphs.
_GET_DATA = getattr(torch._C._autograd, "_get_data_attr", None)


class _ReadOut:
    """A value of the function's, as opposed to one that was computed from its gradients."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _outside(x: Any, ctx: Context) -> Any:
    if isinstance(x, LeafGrads):
        return x.materialize()
    return read_out(x.value, ctx) if isinstance(x, _ReadOut) else _bare(x, ctx)


def _bare(x: Any, ctx: Context) -> Any:
    return x.physical if type(x) is Batched and x.ctx is ctx else x


class _Runner(torch.fx.Interpreter):
    """Runs the subgraph on per-sample tensors and carries out the markers."""

    def __init__(self, subgraph: Any, ctx: Context) -> None:
        super().__init__(subgraph)
        self.ctx = ctx
        # Nothing is left but what is computed from the gradients.
        self.over = False

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        x = super().placeholder(target, args, kwargs)
        return lift(x, None, self.ctx) if isinstance(x, Tensor) else x

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        packet = getattr(target, "overloadpacket", target)
        if packet in (ops.sample, ops.leaf):
            x, dim = args
            value = lift(x.physical, None if dim < 0 else dim, self.ctx, diff=packet is ops.leaf)
            return value.requires_grad_() if packet is ops.leaf else value
        if packet is ops.read_out:
            return _ReadOut(args[0])
        if packet is ops.gradient:
            self.over = True
            loss, leaves, _ = args
            with torch.enable_grad():
                factors = differentiate(loss, leaves, self.ctx, retain_graph=True)
            return [LeafGrads(factor, functional=True) for factor in factors]
        if packet is ops.ask:
            return self._tail(answered, args, kwargs)
        if target is _GET_DATA:
            target = Tensor.detach  # which is known for the program's own, whatever surrounds it
        if target in LISTS and (written := LISTS[target](*args, **kwargs)) is not NotImplemented:
            return written
        if target is autograd_function_apply:
            # It would mark those that are not among these in the graph of the caller's, who has none of them.
            kwargs = {**kwargs, "saved_for_backward_idx": range(sys.maxsize)}
        return self._tail(super().call_function, (target, args, kwargs), {}) if self.over else super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._tail(super().call_method, (target, args, kwargs), {}) if self.over else super().call_method(target, args, kwargs)

    def _tail(self, f: Any, args: Any, kwargs: Any) -> Any:
        """The function has run: what is made of its gradients is computed where the caller stands."""
        args, kwargs = pytree.tree_map(lambda x: _bare(x, self.ctx), (args, kwargs))
        with torch._C.DisableTorchFunction(), nullcontext() if self.ctx.caller is None else self.ctx.caller(in_dispatch=False):
            return f(*args, **kwargs)


def evaluate(fn: Any, convention: Convention, bind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any, Targets]:
    """One quantity of the gradients of one batch, as dynamo traces it."""
    prepare()
    arguments = _arguments.read(args, convention.argnums, convention.in_dims, _torch_trees)
    targets = Targets.of(convention, arguments, args, _torch_trees)
    quantity = bind(targets)
    n, chunk_size = arguments.n, convention.chunk_size
    if chunk_size is not None and convention.randomness == "same":
        raise UnsupportedError(
            "randomness='same' with `chunk_size` sets the generator back for each chunk, which torch.compile cannot trace."
        )

    def piece(leaves: list[Any], n: int, samples: Any, empty: bool = False) -> Any:
        def one() -> Any:
            inputs, marked = _mark(arguments, leaves, convention.keep_batch_dim)
            with torch.enable_grad():
                loss, aux = split_aux(fn(*_torch_trees.unflatten(arguments.spec, inputs), **kwargs), convention.has_aux)
            check_output(loss, convention.keep_batch_dim, scalar=not convention.jacobian)
            aux = pytree.tree_map(lambda x: ops.read_out(x, n) if isinstance(x, Tensor) else x, aux)
            outputs = loss.reshape(-1).unbind() if convention.jacobian else (loss,)
            # Of each leaf the gradients of all outputs.
            grads = list(zip(*[_gradients(output, marked, n, empty) for output in outputs], strict=True))
            found = [quantity.leaf(number, list(own) if convention.jacobian else own[0], samples) for number, own in enumerate(grads)]
            return quantity.run(found, samples), ops.read_out(loss, n), aux

        return per_sample(one, randomness=convention.randomness)

    if n == 0:
        part, values, aux = piece(_arguments.one_zero_sample(arguments), 1, None, True)
        values, aux = pytree.tree_map(lambda x: x[:0] if isinstance(x, Tensor) else x, (values, aux))
        return quantity.join([part], [None]), values, aux, targets
    if chunk_size is None or chunk_size >= n:
        part, values, aux = piece(arguments.leaves, n, None)
        return quantity.join([part], [None]), values, aux, targets
    parts, seen, samples = [], [], []
    for start in range(0, n, chunk_size):
        size = min(chunk_size, n - start)
        some = range(start, start + size)
        part, values, aux = piece(_arguments.chunk(arguments, start, size), size, some)
        parts.append(part)
        seen.append((values, aux))
        samples.append(some)
    values, aux = pytree.tree_map(lambda *x: torch.cat(x) if isinstance(x[0], Tensor) else x[0], *seen)
    return quantity.join(parts, samples), values, aux, targets


def _gradients(output: Tensor, marked: list[Tensor], n: int, empty: bool) -> list[TracedGrads]:
    pairs = zip(ops.gradient(output, marked, n), marked, strict=True)
    grads = [TracedGrads(grad, n, tuple(x.shape)) for grad, x in pairs]
    return [grad.of_nobody() for grad in grads] if empty else grads


def _mark(arguments: Any, leaves: list[Any], keep_batch_dim: bool) -> tuple[list[Any], list[Tensor]]:
    inputs: list[Any] = []
    targets: list[Tensor] = []
    for x, dim, diff in zip(leaves, arguments.dims, arguments.diff, strict=True):
        if isinstance(x, Tensor) and (diff or dim is not None):
            x = (ops.leaf if diff else ops.sample)(x, -1 if dim is None else dim)
            if diff:
                targets.append(x)
            if dim is not None and keep_batch_dim:
                x = x.unsqueeze(0)
        inputs.append(x)
    return inputs, targets
