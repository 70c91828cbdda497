"""``Batched``: a tensor that shows the program one sample's shape and holds every sample's value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from per_sample._conversions import Conversions
from per_sample._errors import EscapedError, RuleError
from per_sample._factors import Factor
from per_sample._keys import see_conjugates

if TYPE_CHECKING:
    from collections.abc import Callable

    from per_sample._caller import Caller, Restart
    from per_sample._record import Recorder

_make_wrapper = torch.Tensor._make_wrapper_subclass
# A wrapper has no memory: code that reads it by pointer must fail rather than crash.
_no_pointer = torch._C._set_throw_on_mutable_data_ptr


@dataclass(eq=False, slots=True)
class Context:
    """What one call of a transform knows; every ``Batched`` of that call carries it."""

    n: int
    randomness: str = "error"
    # How many transforms of this package are running around this one.
    depth: int = 0
    # The caller's functorch stack and grad mode, where they matter; None is the fast path.
    caller: Caller | None = None
    # The caller records derivatives, so that a closed-over tensor that requires grad would need ``caller``.
    grad_mode: bool = False
    # Kernels must be differentiable and free of in-place writes.
    functional: bool = False
    # Neither a caller nor a recorder to look after.
    simple: bool = True
    # Complex tensors were met, whose lazy conjugation kernels must see.
    complex: bool = False
    # In the backward pass a product of two per-sample matrices stays a factor.
    backward: bool = False
    closed: bool = False
    recorder: Recorder | None = None
    restart: Restart | None = None
    # Batched arguments are lifted as copies (1), shared ones, too (2), or shared ones as a copy for each sample (3).
    copies: int = 0
    # Every sample gets its own of the tensors that the program makes: from nothing (1), or from shared ones, too (2).
    expands: int = 0
    # Arguments that are not differentiated, but recorded by the caller, are no leaves: the program writes into them.
    constants: int = 0
    # All tensors of the transforms around are known, not only those that the function was seen to reach.
    scans: int = 0
    # Calls are caught before the dispatcher, too.
    functions: bool = False
    # The batch is empty: one sample of zeros stands for it.
    empty: bool = False
    # Gradients are accumulated by `backward`, as reentrant checkpoints want it.
    accumulates: bool = False
    # Gradients are reduced when the backward pass is over, not as they arrive.
    after: bool = False
    # Samples whose values lead different ways may run apart.
    splits: bool = False
    # Storages of the caller's tensors, which no in-place op may reach.
    borrowed: set[int] = field(default_factory=set)
    # Shared tensors that have views, by storage; kept, so that no other storage takes the same number.
    viewed: dict[int | None, Tensor] = field(default_factory=dict)
    # Likewise tensors whose views are copies here, so that a write would not show in both.
    split: dict[int | None, Tensor] = field(default_factory=dict)
    # Storages of operands that a quantity holds although the backward pass goes on; held, so that no other storage takes their number.
    held: set[int | None] = field(default_factory=set)
    # Storages of gradients that were reduced although the program may still write into them; they keep their numbers, not their memory.
    reduced: list[StorageWeakRef] = field(default_factory=list)
    # Storages of plain tensors made inside the function.
    born: set[int | None] = field(default_factory=set)
    # What holds once more for the backward pass: modules have the tensors of this call (each an ``Exchange``, by what it exchanges).
    again: dict[Any, Any] = field(default_factory=dict)
    # The tensors of modules that have others for this call, by id.
    replaced: dict[int, str] = field(default_factory=dict)
    # Factored values not yet materialised, by id: an in-place op must not change their operands. Nobody asks for those that have died.
    pending: dict[int, TensorWeakRef] = field(default_factory=dict)

    def borrow(self, x: Tensor) -> None:
        """Remember a tensor of the caller's, so that no in-place op of the program changes it."""
        storage = storage_of(x)
        if storage is not None:
            self.borrowed.add(storage)

    def view(self, x: Tensor) -> None:
        """Remember that a shared tensor has a view."""
        if self.owns(x):
            self.viewed[storage_of(x)] = x

    def watch(self, x: Tensor) -> None:
        """Begin again if the program writes into a gradient that was reduced: whoever waits for the end finds what was written."""
        storage = storage_of(x)
        if storage is not None:
            self.held.add(storage)
            self.reduced.append(StorageWeakRef(base_of(x).untyped_storage()))

    def forget(self) -> None:
        """Let go of all tensors: the function has run."""
        self.pending.clear()
        self.viewed.clear()
        self.split.clear()
        self.again.clear()
        self.replaced = {}
        self.closed = True
        if self.restart is not None:
            # Its frames hold the graph, and that holds this context: a cycle through C++ that the garbage collector does not see.
            self.restart.__traceback__ = self.restart.__cause__ = self.restart.__context__ = None
            self.restart = None

    def owns(self, x: Tensor) -> bool:
        """Whether the program may write into a physical tensor."""
        return storage_of(x) not in self.borrowed


def base_of(x: Tensor) -> Tensor:
    """The tensor below all wrappers."""
    while True:
        if _functorch.is_functorch_wrapped_tensor(x):
            x = _functorch.get_unwrapped(x)
        elif type(x) is Batched:
            x = x.physical
        else:
            return x


def is_recorded(x: Tensor) -> bool:
    """Whether the caller's autograd records what is done to a tensor, at whatever level of wrapping."""
    while not x.requires_grad:
        if _functorch.is_functorch_wrapped_tensor(x):
            x = _functorch.get_unwrapped(x)
        elif type(x) is Batched:
            x = x.physical
        else:
            return False
    return True


def storage_of(x: Tensor) -> int | None:
    """What identifies a tensor's memory; None where it has none."""
    try:
        return base_of(x).untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


@dataclass(eq=False, slots=True)
class Origin:
    """A factored gradient as it was made; ``viewed``: there are views of it."""

    viewed: bool = False


class Batched(Conversions, torch.Tensor):
    """One sample's view of a batch.

    ``shared`` says that all samples have the same value: then the physical tensor has no sample axis. Otherwise axis 0
    of the physical tensor is the sample axis, always. A gradient of a parameter holds a ``Factor`` until its numbers are asked for.
    """

    ctx: Context
    shared: bool = False
    factor: Factor | None = None
    # What a factored gradient and its views have in common.
    origin: Origin | None = None
    _value: Tensor | None = None
    # Set by the interpreter, which this module cannot import.
    interpret: ClassVar[Callable[[Context, Any, Any, Any], Any]]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def physical(self) -> Tensor:
        """The tensor behind it, ``[n, *shape]`` (``[*shape]`` where shared)."""
        value = self._value
        if value is None:
            assert self.factor is not None
            ctx = self.ctx
            if ctx.recorder is not None:
                value = ctx.recorder.materialize(self.factor, ctx.functional)
            else:
                value = self.factor.materialize(functional=ctx.functional)
            self._value = value
            self.factor = None
            ctx.pending.pop(id(self), None)
            if self.origin is not None and self.origin.viewed:
                ctx.split[storage_of(value)] = value
        return value

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.ctx.n

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only where the context's mode is not on the stack: from inside a rule, or after the transform has ended.
        for a in torch.utils._pytree.arg_tree_leaves(*args, **(kwargs or {})):
            if type(a) is Batched:
                if a.ctx.closed:
                    raise EscapedError(
                        f"`{func}` met a per-sample tensor that outlived the transform it came from. Return such values "
                        "from the function (with `has_aux=True`) instead of storing them outside."
                    )
                if a.ctx.complex:
                    see_conjugates()
                return cls.interpret(a.ctx, func, args, kwargs or {})
        return NotImplemented

    def __repr__(self) -> str:  # type: ignore[override]
        kind = "shared" if self.shared else f"n={self.ctx.n}"
        held = f", factor={type(self.factor).__name__}" if self.factor is not None else ""
        return f"Batched({kind}, shape={list(self.shape)}, dtype={self.dtype}{held})"


@dataclass(frozen=True, eq=False, slots=True)
class Plain:
    """A result of a rule that is the same for all samples, and that torch's C++ code reads by pointer."""

    value: Tensor


def wrap(ctx: Context, value: Tensor) -> Batched:
    """A per-sample tensor from its physical form ``[n, *shape]``."""
    if value.dtype.is_complex:
        value = _resolved(ctx, value)
    shape = value.shape
    # A slice of a batch of one is contiguous, too; below a transform of the program's own, a write into it is found by its offset.
    if value.is_contiguous() and not value.storage_offset():
        out = _make_wrapper(Batched, shape[1:], dtype=value.dtype, device=value.device)
    else:
        out = _make_wrapper(
            Batched, shape[1:], strides=value.stride()[1:], storage_offset=value.storage_offset(),
            dtype=value.dtype, device=value.device,
        )  # fmt: skip
    _no_pointer(out)
    out.ctx = ctx
    out._value = value
    return out


def _resolved(ctx: Context, value: Tensor) -> Tensor:
    """Below autograd nobody would resolve a lazy conjugation, and the wrapper does not show one."""
    ctx.complex = True
    return value.resolve_conj().resolve_neg() if ctx.caller is None else value


def wrap_shared(ctx: Context, value: Tensor) -> Batched:
    """A tensor that all samples share."""
    if value.dtype.is_complex:
        value = _resolved(ctx, value)
    out = _make_wrapper(
        Batched, value.shape, strides=value.stride(), storage_offset=value.storage_offset(),
        dtype=value.dtype, device=value.device,
    )  # fmt: skip
    _no_pointer(out)
    out.ctx = ctx
    out.shared = True
    out._value = value
    return out


def wrap_factor(ctx: Context, factor: Factor, parent: Batched | None = None) -> Batched:
    """A gradient that stays factored; ``parent``: the one it is a view of."""
    like = factor.like
    out = _make_wrapper(Batched, factor.shape, dtype=like.dtype, device=like.device)
    _no_pointer(out)
    out.ctx = ctx
    out.factor = factor
    if parent is None or parent.origin is None:
        out.origin = Origin()
    else:
        out.origin = parent.origin
        out.origin.viewed = True
    ctx.pending[id(out)] = TensorWeakRef(out)
    return out


def physical(x: Tensor, n: int) -> Tensor:
    """``x`` with a sample axis in front, ``[n, *shape]``: a per-sample tensor's own, or a shared one expanded without copying."""
    if type(x) is Batched:
        if not x.shared:
            return x.physical
        x = x.physical
    return x.expand(n, *x.shape)


def context_of(*args: Any) -> Context:
    """The context of the first per-sample tensor among a rule's arguments."""
    for a in args:
        if type(a) is Batched:
            return a.ctx
        if isinstance(a, (list, tuple)):
            for x in a:
                if type(x) is Batched:
                    return x.ctx
    raise RuleError("No argument of the rule is a per-sample tensor.")


def samples(*args: Any) -> int:
    """The number of samples of a rule's arguments."""
    return context_of(*args).n


def is_batched(x: Any) -> bool:
    """Whether ``x`` differs between samples."""
    return type(x) is Batched and not x.shared
