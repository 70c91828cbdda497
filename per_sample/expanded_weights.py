"""``call_for_per_sample_grads``, for those who come from ``torch.nn.utils``: the same call, on top of the functional core."""

from __future__ import annotations

import functools
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from per_sample._containers import is_packed
from per_sample._errors import ModuleCallError
from per_sample._surroundings import random_states
from per_sample._swapped import swapped
from per_sample.transforms import per_sample_grad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from per_sample._signatures import Forward, P, R


def call_for_per_sample_grads(
    module: Forward[P, R], *, batch_size: int | None = None, loss_reduction: str = "sum", batch_first: bool = True
) -> Callable[P, R]:
    """Wrap a module so that ``backward`` fills ``grad_sample`` of its parameters with every sample's gradient.

    Nothing of the module is changed. The backward pass runs the module once more, sample by sample in meaning and all at once in fact.

    Args:
        module: an ``nn.Module``; each of its parameters that requires grad gets a ``grad_sample [n, *shape]``, and no ``grad``.
        batch_size: the number of samples; by default that of all tensor arguments, which must agree about it.
        loss_reduction: ``"sum"``, or ``"mean"`` if the loss is a mean over the batch, which is then undone.
        batch_first: whether the samples stand along the first axis of the arguments, or along the second. The states of recurrent
            layers always have them along the second.

    Returns:
        A function of the module's arguments that returns the module's result.

    Raises:
        ModuleCallError: (a ``RuntimeError``) for the misuses that ``torch.nn.utils`` refuses, in the same words, and where a result has no
            axis for the samples.

    Example:
        >>> import torch
        >>> from per_sample import call_for_per_sample_grads
        >>> model = torch.nn.Linear(4, 3)
        >>> call_for_per_sample_grads(model)(torch.randn(5, 4)).sum().backward()
        >>> model.weight.grad_sample.shape, model.weight.grad
        (torch.Size([5, 3, 4]), None)
    """
    checked = _check(module, batch_size, loss_reduction)

    @functools.wraps(module.forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = _Call(checked, batch_size, 0 if batch_first else 1, args, kwargs)
        results, spec = call.results()
        values = iter(_Backward.apply(call, loss_reduction == "mean", results, *call.trained.values(), *call.tensors()))
        return pytree.tree_unflatten([_filled(x, values) if _is_tensor(x) else x for x in results], spec)

    return wrapper


def _check(module: Any, batch_size: Any, loss_reduction: Any) -> nn.Module:
    if loss_reduction not in ("sum", "mean"):
        raise ModuleCallError(f"Expected loss_reduction argument to be sum or mean, got {loss_reduction}")
    if not isinstance(module, nn.Module):
        raise ModuleCallError(f"Module passed must be nn.Module, got {type(module).__name__}")
    if not (batch_size is None or isinstance(batch_size, int)):
        raise ModuleCallError(f"Batch size passed must be None or an integer, got {type(batch_size).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ModuleCallError(f"Batch size must be positive, got {batch_size}")
    for weight in module.parameters():
        if getattr(weight, "grad_sample", None) is not None:
            raise ModuleCallError(
                "A parameter still has the grad_sample of an earlier call, to which this one would be added. Please clear out the "
                f"grad_sample parameter of {weight}."
            )
    return module


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) or is_packed(x)


def _data(x: Any) -> Tensor:
    return x.data if is_packed(x) else x


def _filled(x: Any, values: Iterator[Tensor]) -> Any:
    return PackedSequence(next(values), *x[1:]) if is_packed(x) else next(values)


def _padded(x: Any, length: int | None = None) -> Tensor:
    return pad_packed_sequence(x, batch_first=True, total_length=length)[0] if is_packed(x) else x


def _close(x: Tensor, y: Tensor) -> bool:
    """Equal up to what the order of sums may change in a deep network."""
    if not y.is_floating_point() and not y.is_complex():
        return torch.equal(x, y)
    x = x.to(y.dtype)
    tolerance = min(0.1, 200 * torch.finfo(y.dtype).eps ** 0.75)
    scale = float(y.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()) if y.numel() else 0.0
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


class _Call:
    """One call of the module: its arguments, and along which axis their samples stand (None: no tensor)."""

    def __init__(self, module: nn.Module, n: int | None, axis: int, args: Any, kwargs: Any) -> None:
        self.module, self.axis = module, axis
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs), is_leaf=is_packed)
        self.n = _batch_size(self.leaves, axis) if n is None else n
        self.dims = self._axes(self.leaves)
        self.random = random_states([*self.trained.values(), *self.leaves])
        self.versions = self._versions()
        kinds = {x.device.type for x in (*self.trained.values(), *self.tensors())}
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds if kind != "meta"]

    def _versions(self) -> list[int]:
        return [x._version for x in (*self.trained.values(), *self.tensors()) if not x.is_inference()]

    def tensors(self) -> list[Tensor]:
        return [_data(x) for x in self.leaves if _is_tensor(x)]

    def _axes(self, values: list[Any]) -> list[int | None]:
        """Whatever follows the sequence among a recurrent layer's arguments and results is a state."""
        states = isinstance(self.module, nn.RNNBase)
        return [self._axis(x, (1,) if states and i else (self.axis, 1 - self.axis)) for i, x in enumerate(values)]

    def _axis(self, x: Any, candidates: tuple[int, ...]) -> int | None:
        if not isinstance(x, Tensor) or not x.dim():
            return 0 if is_packed(x) else None
        for axis in candidates:
            if axis < x.dim() and x.shape[axis] == self.n:
                return axis
        raise ModuleCallError(f"A tensor of shape {list(x.shape)} among the arguments or results has no axis for the {self.n} samples.")

    def _run(self, leaves: list[Any], params: dict[str, Tensor]) -> tuple[list[Any], Any]:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with swapped(self.module, params) if params else nullcontext():
            return pytree.tree_flatten(self.module(*args, **kwargs), is_leaf=is_packed)

    def results(self) -> tuple[list[Any], Any]:
        """The module's results for the whole batch, flattened."""
        before = torch.get_rng_state()
        with torch.no_grad():
            values, spec = self._run(self.leaves, {})
        self.out_dims = self._axes(values)
        if None in [d for x, d in zip(values, self.out_dims, strict=True) if _is_tensor(x)]:
            raise ModuleCallError(f"A result is a number for the whole batch: it has no axis for the {self.n} samples.")
        self.lengths = [_padded(x).shape[1] if is_packed(x) else None for x in values]
        if not torch.equal(before, torch.get_rng_state()):
            # The transform lays the samples out in another order, so that they draw other numbers.
            if any(map(is_packed, values)):
                raise ModuleCallError("A module that draws random numbers must not return a packed sequence: return it padded.")
            drawn = iter(self.gradients([torch.zeros_like(x) for x in values if _is_tensor(x)])[2])
            values = [next(drawn).squeeze(d + 1).movedim(0, d) if d is not None else x for x, d in zip(values, self.out_dims, strict=True)]
        return values, spec

    def check(self, found: list[Tensor], results: list[Any]) -> None:
        """The backward pass runs the module once more, which must give what the forward pass gave."""
        expected = [_padded(x) for x in results if _is_tensor(x)]
        dims = [d for d in self.out_dims if d is not None]
        again = [x.squeeze(d + 1).movedim(0, d) for x, d in zip(found, dims, strict=True)]
        if self.versions != self._versions() or not all(map(_close, again, expected)):
            raise ModuleCallError(
                "One sample alone gives another result than it gave in the batch. The module mixes samples, an argument holds no samples, "
                "or arguments, parameters or the module's mode were changed between the forward and the backward pass."
            )

    def gradients(self, cotangents: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor | None], list[Tensor]]:
        """Every sample's gradients for the parameters and the arguments, and its results."""
        where = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.requires_grad]

        def loss(target: Any, leaves: list[Any], cotangents: list[Tensor]) -> Any:
            params, inputs = target
            whole = [inputs.get(str(i), x) for i, x in enumerate(leaves)]
            whole = [x.unsqueeze(d) if isinstance(x, Tensor) and d is not None else x for x, d in zip(whole, self.dims, strict=True)]
            found = [
                self._checked(*row)
                for row in zip(self._run(whole, params)[0], self.out_dims, self.lengths, strict=True)
                if _is_tensor(row[0])
            ]
            pairs = zip(found, (d for d in self.out_dims if d is not None), cotangents, strict=True)
            terms = [_product(o, g.unsqueeze(d)) for o, d, g in pairs if o.is_floating_point() or o.is_complex()]
            return sum(terms), found

        params = {name: p.detach() for name, p in self.trained.items()}
        inputs = {str(i): self.leaves[i].detach() for i in where}
        fixed = [None if i in where else x for i, x in enumerate(self.leaves)]
        dims = (
            (dict.fromkeys(params), {str(i): self.dims[i] for i in where}),
            [None if x is None else d for x, d in zip(fixed, self.dims, strict=True)],
            [d for d in self.out_dims if d is not None],
        )
        now = random_states([*params.values(), *self.tensors()])
        for restore in self.random:
            restore()
        transform = per_sample_grad(loss, 0, dims, has_aux=True, randomness="different")
        with ExitStack() as context:
            # As torch recommends, the backward pass is called outside of autocast.
            for kind, dtype, enabled in self.autocast:
                context.enter_context(torch.autocast(kind, dtype, enabled=enabled))
            (grads, of_inputs), found = transform((params, inputs), fixed, cotangents)
        for restore in now:
            restore()
        return (
            grads,
            [of_inputs[str(i)].movedim(0, self.dims[i]) if i in where else None for i, x in enumerate(self.leaves) if _is_tensor(x)],
            found,
        )

    def _checked(self, x: Any, dim: Any, length: int | None) -> Tensor:
        value = _padded(x, length)
        if value.shape[dim] != 1:
            raise ModuleCallError(f"A result has shape {list(value.shape)} for one sample: its samples do not stand along axis {dim}.")
        return value


def _product(result: Tensor, cotangent: Tensor) -> Tensor:
    if result.shape != cotangent.shape:
        raise ModuleCallError(
            f"A result has shape {list(result.shape)} for one sample, where the batch's has {list(cotangent.shape)}: make its size depend "
            "on the arguments' shapes alone (`pad_packed_sequence(..., total_length=...)`)."
        )
    return (result * cotangent.conj()).real.sum()


def _batch_size(leaves: list[Any], axis: int) -> int:
    found = None
    for x in leaves:
        if not _is_tensor(x) or (isinstance(x, Tensor) and not x.dim()):
            continue
        size = int(x.batch_sizes[0]) if is_packed(x) else x.shape[axis]
        if found not in (None, size):
            raise ModuleCallError(
                f"When computing batch size, found at least one input with batch size {found} and one with batch size {size}. "
                "Please specify it explicitly using the batch size kwarg in call_for_per_sample_grads"
            )
        found = size
    if found is None:
        raise ModuleCallError(
            "Unable to find a tensor in the passed args and kwargs. They may not be pytree-able and so the batch size cannot be "
            "computed from the inputs. Please specify it explicitly"
        )
    return found


class _Backward(torch.autograd.Function):
    """The results as they are; backward fills ``grad_sample``."""

    @staticmethod
    def forward(ctx: Any, call: _Call, mean: bool, results: list[Any], *tensors: Tensor) -> Any:
        ctx.call, ctx.mean, ctx.results = call, mean, results
        # Copies, since the caller may go on in place, and the results are compared again.
        values = tuple(_data(x).clone() for x in results if _is_tensor(x))
        ctx.mark_non_differentiable(*(x for x in values if not (x.is_floating_point() or x.is_complex())))
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        call = ctx.call
        given = iter(cotangents)
        padded = [_padded(_filled(x, given)) for x in ctx.results if _is_tensor(x)]
        grads, inputs, found = call.gradients(padded)
        call.check(found, ctx.results)
        for name, p in call.trained.items():
            g = grads[name] * call.n if ctx.mean else grads[name]
            sofar = getattr(p, "grad_sample", None)
            if sofar is not None and sofar.shape != g.shape:
                raise ModuleCallError(f"{call.n} samples were to be added to a grad_sample of {len(sofar)} (parameter `{name}`).")
            p.grad_sample = g if sofar is None else sofar + g
        return None, None, None, *(None for _ in grads), *inputs
