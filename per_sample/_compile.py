"""Under ``torch.compile``: the function goes into dynamo's graph as a subgraph for one sample, which the interpreter runs later.

Dynamo cannot follow a tensor subclass that is made and taken apart inside one call, but AOTAutograd can. So dynamo traces the function on
one sample (with guards on all that it closes over, and its tensors as inputs), between marker ops that say where a sample axis is
hidden, what is differentiated and what is read out. ``PerSample`` holds the subgraph. AOTAutograd calls it, the markers are carried
out by ``_Runner``, and only the physical ops reach the final graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._higher_order_ops.base_hop import BaseHOP

from per_sample import _arguments, _torch_trees
from per_sample._batched import Context
from per_sample._errors import DataDependentError, UnsupportedError
from per_sample._factors import Factor
from per_sample._run import check_scalar, differentiate, lift, read_out, split_aux
from per_sample._surroundings import in_context

_library = torch.library.Library("per_sample", "FRAGMENT")
# `dim` is the sample axis, -1 for a tensor that the samples share.
_library.define("sample(Tensor x, int dim) -> Tensor")
_library.define("leaf(Tensor x, int dim) -> Tensor")
_library.define("gradient(Tensor loss, Tensor[] leaves, SymInt n) -> Tensor[]")
_library.define("read_out(Tensor x, SymInt n) -> Tensor")
_ops = torch.ops.per_sample


@torch.library.register_fake("per_sample::sample", lib=_library)
@torch.library.register_fake("per_sample::leaf", lib=_library)
def _one(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x if dim < 0 else x.select(dim, 0))


@torch.library.register_fake("per_sample::gradient", lib=_library)
def _gradient(loss: Tensor, leaves: list[Tensor], n: int) -> list[Tensor]:
    return [x.new_empty((n, *x.shape)) for x in leaves]


@torch.library.register_fake("per_sample::read_out", lib=_library)
def _read_out(x: Tensor, n: int) -> Tensor:
    return x.new_empty((n, *x.shape))


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
                "tensor (a branch, `.item()`, `x[i]`). `fullgraph=True` says where. Write `torch.where`, or leave the transform uncompiled."
            )
        tensors = [x for x in operands if isinstance(x, Tensor)]
        n = _batch_size(subgraph, operands)
        ctx, out = in_context(lambda ctx: _Runner(subgraph, ctx).run(*operands), None, tensors, n, randomness)
        return pytree.tree_map(lambda x: _outside(x, ctx), out)


per_sample = PerSample()


def _batch_size(subgraph: Any, operands: tuple[Any, ...]) -> Any:
    placeholders = dict(zip(subgraph.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in subgraph.graph.nodes:
        if node.target in (_ops.sample.default, _ops.sample, _ops.leaf.default, _ops.leaf) and node.args[1] >= 0:
            return placeholders[node.args[0]].shape[node.args[1]]
    raise AssertionError("a per-sample subgraph without a batched input")


def _outside(x: Any, ctx: Context) -> Any:
    return x.materialize(functional=True) if isinstance(x, Factor) else read_out(x, ctx)


class _Runner(torch.fx.Interpreter):
    """Runs the subgraph on per-sample tensors and carries out the markers."""

    def __init__(self, subgraph: Any, ctx: Context) -> None:
        super().__init__(subgraph)
        self.ctx = ctx
        self.targets: dict[int, Tensor] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        x = super().placeholder(target, args, kwargs)
        return lift(x, None, self.ctx) if isinstance(x, Tensor) else x

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        packet = getattr(target, "overloadpacket", target)
        if packet in (_ops.sample, _ops.leaf):
            x, dim = args
            value = lift(x.physical, None if dim < 0 else dim, self.ctx)
            return value.requires_grad_() if packet is _ops.leaf else value
        if packet is _ops.gradient:
            loss, leaves, _ = args
            return differentiate(loss, leaves, self.ctx)
        if packet is _ops.read_out:
            return args[0]
        return super().call_function(target, args, kwargs)


def grad_and_value(fn: Any, options: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``per_sample_grad_and_value`` as dynamo traces it."""
    argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness = options
    arguments = _arguments.read(args, argnums, in_dims, _torch_trees)
    n = arguments.n
    if n == 0:
        leaves, size = _arguments.one_zero_sample(arguments), 1
    else:
        leaves, size = arguments.leaves, n

    def piece(leaves: list[Any], n: int) -> Any:
        def one() -> Any:
            inputs, targets = _mark(arguments, leaves, keep_batch_dim)
            loss, aux = split_aux(fn(*_torch_trees.unflatten(arguments.spec, inputs), **kwargs), has_aux)
            check_scalar(loss, keep_batch_dim)
            grads = _ops.gradient(loss, targets, n)
            aux = pytree.tree_map(lambda x: _ops.read_out(x, n) if isinstance(x, Tensor) else x, aux)
            return grads, _ops.read_out(loss, n), aux

        return per_sample(one, randomness=randomness)

    if chunk_size is not None and randomness == "same":
        raise UnsupportedError(
            "randomness='same' with `chunk_size` sets the generator back for each chunk, which torch.compile cannot trace."
        )
    if chunk_size is None or chunk_size >= n:
        grads, values, aux = piece(leaves, size)
    else:
        pieces = [piece(_arguments.chunk(arguments, i, min(chunk_size, n - i)), min(chunk_size, n - i)) for i in range(0, n, chunk_size)]
        grads, values, aux = pytree.tree_map(lambda *x: torch.cat(x) if isinstance(x[0], Tensor) else x[0], *pieces)
    if n == 0:
        grads, values, aux = pytree.tree_map(lambda x: x[:0] if isinstance(x, Tensor) else x, (grads, values, aux))
    structured = _arguments.as_arguments(grads, arguments, isinstance(argnums, tuple), args, _torch_trees)
    return structured, ((values, aux) if has_aux else values)


def _mark(arguments: Any, leaves: list[Any], keep_batch_dim: bool) -> tuple[list[Any], list[Tensor]]:
    inputs: list[Any] = []
    targets: list[Tensor] = []
    for x, dim, diff in zip(leaves, arguments.dims, arguments.diff, strict=True):
        if isinstance(x, Tensor) and (diff or dim is not None):
            x = (_ops.leaf if diff else _ops.sample)(x, -1 if dim is None else dim)
            if diff:
                targets.append(x)
            if dim is not None and keep_batch_dim:
                x = x.unsqueeze(0)
        inputs.append(x)
    return inputs, targets
