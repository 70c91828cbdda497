"""One run of the function for one batch: lift, call, differentiate. What comes out still holds factors."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from per_sample import _trees as trees
from per_sample._arguments import hides_tensors
from per_sample._backward import Reduced, by_output, differentiate, read_out
from per_sample._batched import Batched, Context, is_recorded, wrap, wrap_shared
from per_sample._caller import Restart
from per_sample._composites import composites, exchanged
from per_sample._containers import open_tree
from per_sample._errors import ArgumentError, BatchNormError, DataDependentError, NotScalarError, SharedWriteError, UnsupportedError
from per_sample._guards import refuse_escaped
from per_sample._notes import add_notes
from per_sample._surroundings import in_context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from per_sample._arguments import Arguments
    from per_sample._backward import Reduce
    from per_sample._record import Recorder


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """Every sample's loss of one batch, and what became of the gradients."""

    ctx: Context
    results: list[Any]  # of ``reduce``, one for each differentiated leaf that is a tensor
    values: Tensor  # [n]
    aux: Any  # tensors [n, ...]
    samples: Sequence[int] | None  # which samples of the caller's batch these are; None: all of them, in order


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """The function and how it is called."""

    fn: Callable[..., Any]
    kwargs: dict[str, Any]
    has_aux: bool
    keep_batch_dim: bool
    randomness: str
    # The function returns several numbers, each of which is differentiated.
    jacobian: bool = False
    # What runs of this call had to begin again for: the next chunk or group begins with it.
    needs: dict[str, int] = field(default_factory=dict)


def run(
    program: Program,
    arguments: Arguments,
    leaves: list[Any],
    n: int,
    reduce: Reduce,
    recorder: Recorder | None = None,
    samples: Sequence[int] | None = None,
) -> Outcome:
    """Run the function once for ``n`` samples and differentiate; ``Split`` where it asks for values on which they do not agree.

    ``reduce`` is called for each leaf as soon as its gradient is complete, so that a factor can go before the next one comes.
    """

    def body(ctx: Context) -> tuple[list[Any], Any, Any]:
        inputs, targets = _lift(arguments, leaves, ctx, program.keep_batch_dim)
        kwargs = trees.map(lambda x: lift(x, None, ctx) if isinstance(x, Tensor) else x, program.kwargs)
        out = _call(ctx, program.fn, trees.unflatten(arguments.spec, inputs), kwargs)
        loss, aux = split_aux(out, program.has_aux)
        aux = open_tree(aux) if program.has_aux else None
        check_output(loss, program.keep_batch_dim or getattr(program.fn, "keep_batch_dim", False), scalar=not program.jacobian)
        with exchanged(ctx):
            if program.jacobian:
                return by_output(loss, targets, ctx), loss, aux
            return differentiate(loss, targets, ctx, reduce), loss, aux

    tensors = [x for x in trees.flatten((leaves, program.kwargs))[0] if isinstance(x, Tensor)]
    ctx, (found, loss, aux) = in_context(
        body, program.fn, tensors, n, program.randomness, recorder, program.needs, splits=True, empty=arguments.n == 0
    )
    for x in trees.flatten(aux)[0]:
        if not isinstance(x, Tensor) and (hides_tensors(x) or hides_tensors(getattr(x, "__dict__", None))):
            raise ArgumentError(
                f"`aux` has a leaf of type {type(x).__name__}, which holds tensors but is no pytree: return a dict or a tuple of them."
            )
    results = [x.result if isinstance(x, Reduced) else reduce(number, x, ctx.functional) for number, x in enumerate(found)]
    return Outcome(ctx, results, read_out(loss, ctx), trees.map(lambda x: read_out(x, ctx), aux), samples)


# What torch says when a tensor of a `vmap` is written into one that has no such axis.
_NOT_WRITABLE = ("vmap: inplace arithmetic", "doesn't match the broadcast shape")
# What torch says when its C++ code reads a tensor without memory.
_NO_MEMORY = ("data is not allocated yet", "Cannot access data pointer", "invalid python storage")


def _call(ctx: Context, fn: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    try:
        with composites(ctx):
            return fn(*args, **kwargs)
    except Exception as err:
        if not ctx.functions and _came_from_control_flow(err):
            raise Restart(ctx, functions=True) from err
        if ctx.caller is not None and "leaf Variable that requires grad is being used in an in-place" in str(err):
            if not ctx.constants:
                raise Restart(ctx, constants=1) from err
            raise SharedWriteError(
                "The function would change what is differentiated, or a tensor from outside, in place; inputs are never modified. Write "
                "into a copy: `x = x.clone()` first."
            ) from err
        if ctx.empty and isinstance(err, (IndexError, torch.linalg.LinAlgError)):  # type: ignore[attr-defined]
            # An index or a matrix of zeros that no sample has.
            raise Restart(ctx, groups=[]) from err
        _raise_typed(err, below=ctx.caller is not None and bool(ctx.caller.stack))
        add_notes(err, fn, args, ctx.n)
        raise


def _came_from_control_flow(err: Exception) -> bool:
    """Whether torch's own `torch.cond` or `while_loop` failed: autograd and functorch trace them before the interpreter is asked."""
    frames = traceback.walk_tb(err.__traceback__)
    return any("_higher_order_ops" in frame.f_code.co_filename for frame, _ in frames)


def _raise_typed(err: Exception, *, below: bool) -> None:
    """Raise an error of the library's where torch's own means something else here; ``below``: there is a transform of torch.func around."""
    if isinstance(err, RuntimeError) and any(text in str(err) for text in _NO_MEMORY):
        raise DataDependentError(
            "Something inside the function reads the numbers of a per-sample tensor directly: `torch.tensor([...])` of such tensors "
            f"(use `torch.stack`), `tensor_split` at per-sample places, or C++ code of its own. {err}"
        ) from err
    if isinstance(err, RuntimeError) and below and any(text in str(err) for text in _NOT_WRITABLE):
        raise UnsupportedError(
            "A value that differs under the `vmap` around this transform is written into a tensor that does not; build it out of place. "
            f"{err}"
        ) from err
    if isinstance(err, RuntimeError) and "INTERNAL ASSERT FAILED" in str(err) and "functorch" in str(err):
        raise UnsupportedError(
            "A torch.func transform in the function is applied to a tensor of a transform around this one, which the function closes over. "
            f"Pass it as an argument (`in_dims` of None: the same for all samples). {err}"
        ) from err
    if isinstance(err, ValueError) and "Expected more than 1 value per channel" in str(err):
        raise BatchNormError(f"Batch normalisation in training mode mixes samples; call `module.eval()`. torch says: {err}") from err


_PLAIN = (Tensor, torch.nn.Parameter, Batched)


def _lift(arguments: Arguments, leaves: list[Any], ctx: Context, keep_batch_dim: bool) -> tuple[list[Any], list[Tensor]]:
    """What fn receives, and the leaves to differentiate."""
    inputs: list[Any] = []
    targets: list[Tensor] = []
    known: dict[tuple[int, int | None], Tensor] = {}
    for leaf, dim, diff in zip(leaves, arguments.dims, arguments.diff, strict=True):
        if not isinstance(leaf, Tensor):
            inputs.append(leaf)
            continue
        if dim is None and not diff and leaf.layout is not torch.strided:
            inputs.append(leaf)
            continue
        if not diff and (id(leaf), dim) in known:
            # What is written into one argument shows in the other.
            inputs.append(known[id(leaf), dim])
            continue
        lifted = lift(leaf, dim, ctx, diff=diff)
        if diff:
            targets.append(lifted.requires_grad_())
        inputs.append(lifted.unsqueeze(0) if dim is not None and keep_batch_dim else lifted)
        if not diff:
            # Not where it is differentiated: the other argument may be the same tensor, held fixed.
            known[id(leaf), dim] = inputs[-1]
    return inputs, targets


def lift(leaf: Tensor, dim: int | None, ctx: Context, *, diff: bool = False) -> Batched:
    """A tensor of the caller's as the program sees it; ``dim`` is its sample axis, None where the samples share it."""
    if type(leaf) is Batched and (leaf.ctx.closed or ctx.caller is None):
        refuse_escaped("An argument of a transform")
    ctx.borrow(leaf)
    # What is done here is the transform's own: neither the program's modes nor its options are for it.
    expands, ctx.expands = ctx.expands, 0
    try:
        if ctx.caller is None:
            value = _laid_out(_bare(leaf), dim, ctx)
        else:
            value = ctx.caller.enter(leaf)
            with torch._C.DisableTorchFunction(), ctx.caller(in_dispatch=False):
                value = _laid_out(value, dim, ctx)
    finally:
        ctx.expands = expands
    with nullcontext() if ctx.caller is None else torch._C.DisableTorchFunction():
        lifted: Any = wrap_shared(ctx, value) if dim is None and ctx.copies < 3 else wrap(ctx, value)
        # As where it comes from: `torch.autograd.functional` detaches what does not require grad, and the caller would lose a derivative.
        if not diff and ctx.caller is not None and ctx.grad_mode and is_recorded(value):
            lifted.requires_grad_()
            if ctx.constants:
                with torch.enable_grad():
                    lifted = lifted.clone()  # no leaf, so that the program may write into it
        return cast("Batched", lifted)


def _bare(leaf: Tensor) -> Tensor:
    """A plain tensor that autograd does not follow."""
    value = leaf
    if type(leaf) not in _PLAIN and not torch._C._dispatch_keys(leaf).has(torch._C.DispatchKey.Python):
        # A subclass that does not dispatch adds nothing but behaviour, which was not written for batches.
        value = leaf.as_subclass(Tensor)
    if leaf.requires_grad:
        value = value.detach()
    if leaf.is_complex() or leaf.is_neg():
        # Below autograd nobody would resolve a lazy conjugation.
        value = value.resolve_conj().resolve_neg()
    return value


def _laid_out(value: Tensor, dim: int | None, ctx: Context) -> Tensor:
    """The sample axis in front, in a copy where the program writes into it."""
    if dim is None and ctx.copies == 3:
        value = value.expand(ctx.n, *value.shape)
    elif dim:
        value = value.movedim(dim, 0)
    return value.clone() if ctx.copies > (dim is None) else value


def split_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """The loss and the auxiliary values in what fn returned."""
    if not has_aux:
        return out, None
    if not isinstance(out, tuple) or len(out) != 2:
        found = f"a tensor of shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ArgumentError(f"With `has_aux=True`, `fn` must return a pair (loss, aux); it returned {found}.")
    return out


def check_output(loss: Any, keep_batch_dim: bool, *, scalar: bool = True) -> None:
    """Raise ``NotScalarError`` unless the loss is one real number for one sample; ``scalar=False``: several are welcome."""
    if not isinstance(loss, Tensor):
        hint = " Pass `has_aux=True` if it returns (loss, aux)." if isinstance(loss, tuple) and len(loss) == 2 else ""
        raise NotScalarError(f"`fn` must return a scalar tensor, the loss of one sample; it returned {type(loss).__name__}.{hint}")
    if scalar and loss.dim() != 0:
        hint = (
            "Reduce it (`.sum()`, `.mean()`)."
            if keep_batch_dim
            else "`fn` sees ONE sample, without a batch axis: reduce the result (`.sum()`), or, if `fn` calls a module that wants a "
            "batch axis, pass `keep_batch_dim=True`."
        )
        raise NotScalarError(f"`fn` must return a scalar loss for one sample; it returned shape {list(loss.shape)}. {hint}")
    if loss.layout is not torch.strided:
        raise NotScalarError(f"`fn` must return a dense loss; it returned one of layout {loss.layout}.")
    if not loss.is_floating_point():
        what = "a real floating-point loss" if scalar else "real floating-point numbers"
        hint = " Take its two parts: `torch.view_as_real`." if loss.is_complex() and not scalar else ""
        raise NotScalarError(f"`fn` must return {what}; it returned dtype {loss.dtype}.{hint}")
