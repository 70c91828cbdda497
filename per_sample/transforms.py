"""The public transforms."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample import _arguments, _compile
from per_sample import _trees as trees
from per_sample._errors import ArgumentError, DataDependentError
from per_sample._packed import opened
from per_sample._run import Outcome, Program, run
from per_sample._surroundings import Split, random_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from per_sample._arguments import Argnums, Arguments
    from per_sample._record import Recorder


def per_sample_grad(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """Transform the loss of one sample into a function that returns every sample's gradient.

    Equal, leaf for leaf, to ``torch.func.vmap(torch.func.grad(fn, argnums), in_dims)``, at about the price of one batched gradient.

    Args:
        fn: takes ONE sample, ``fn(params, x, y)``, and returns a scalar loss (with ``has_aux`` a pair of loss and auxiliary values).
        argnums: which positional arguments to differentiate; they are shared by the samples unless ``in_dims`` says otherwise.
        in_dims: the batched axis of each positional argument, as in ``torch.vmap`` (prefix pytrees; None shares the argument). By
            default axis 0 of every tensor that is not differentiated. Keyword arguments are always shared.
        has_aux: ``fn`` returns ``(loss, aux)``.
        keep_batch_dim: ``fn`` sees each sample with a leading axis of size 1, so that a module that expects a batch can be called.
        chunk_size: at most that many samples at once; the result is the same.
        randomness: ``"error"``, ``"different"`` (each sample its own numbers) or ``"same"``, as in ``torch.vmap``.

    Returns:
        A function of the same arguments. It returns the gradients: the structure of the differentiated argument (a tuple of them for a
        tuple of ``argnums``) with leaves ``[n, *shape]``, in the parameters' dtypes; with ``has_aux`` a pair ``(grads, aux)``.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import per_sample_grad
        >>> def loss(params, x, y):
        ...     return (x @ params["w"] + params["b"] - y).square().sum()
        >>> params = {"w": torch.ones(3, 2), "b": torch.zeros(2)}
        >>> grads = per_sample_grad(loss)(params, torch.randn(5, 3), torch.randn(5, 2))
        >>> grads["w"].shape
        torch.Size([5, 3, 2])
    """
    both = per_sample_grad_and_value(
        fn, argnums, in_dims, has_aux=has_aux, keep_batch_dim=keep_batch_dim, chunk_size=chunk_size, randomness=randomness
    )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        grads, values = both(*args, **kwargs)
        return (grads, values[1]) if has_aux else grads

    return transformed


def per_sample_grad_and_value(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    in_dims: Any = None,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """Transform the loss of one sample into a function that returns every sample's gradient and loss.

    Args:
        fn: as in ``per_sample_grad``.
        argnums: as in ``per_sample_grad``.
        in_dims: as in ``per_sample_grad``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``.

    Returns:
        A function of the same arguments that returns ``(grads, values)`` with ``values [n]``; with ``has_aux``
        ``(grads, (values, aux))``, as ``torch.func.grad_and_value`` does.

    Raises:
        ArgumentError: for options that cannot be right.

    Example:
        >>> import torch
        >>> from per_sample import per_sample_grad_and_value
        >>> grads, values = per_sample_grad_and_value(lambda w, x: (w * x).sum())(torch.ones(3), torch.eye(3))
        >>> values
        tensor([1., 1., 1.])
    """
    _arguments.check_options(fn, argnums, randomness, chunk_size)
    options = (argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness)

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return _compile.grad_and_value(fn, options, args, kwargs)
        return _grad_and_value(fn, options, args, kwargs)

    return transformed


def _grad_and_value(fn: Callable[..., Any], options: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    argnums, in_dims, has_aux, keep_batch_dim, chunk_size, randomness = options
    fn, args, kwargs = opened(fn, args, kwargs, argnums)
    program = Program(fn, kwargs, has_aux, keep_batch_dim, randomness)
    arguments = _arguments.read(args, argnums, in_dims)
    # One by one, so that a chunk's factors are gone before the next one runs.
    pieces = [(_materialized(outcome, arguments.leaves), outcome.samples) for outcome in outcomes(program, arguments, chunk_size)]
    if not pieces:
        leaves, values, aux = _of_nobody(arguments, has_aux)
    else:
        leaves, values, aux = pieces[0][0] if len(pieces) == 1 else _joined(pieces)
    if arguments.n == 0:
        leaves, values, aux = trees.map(_emptied, (leaves, values, aux))
    grads = _arguments.as_arguments(leaves, arguments, isinstance(argnums, tuple), args)
    return grads, ((values, aux) if has_aux else values)


def outcomes(program: Program, arguments: Arguments, chunk_size: int | None, recorder: Recorder | None = None) -> Iterator[Outcome]:
    """One ``Outcome`` for each chunk of samples, or group that runs apart.

    An empty batch yields that of one sample of zeros; nothing if the function asks for the values of that sample, which does not exist.
    """
    n = arguments.n
    if n == 0:
        yield from _groups(program, arguments, _arguments.one_zero_sample(arguments), 1, None, recorder)
    elif chunk_size is None or chunk_size >= n:
        yield from _groups(program, arguments, arguments.leaves, n, None, recorder)
    else:
        # As torch.vmap has it: with randomness="same" every chunk draws the same numbers again.
        restores = random_states(arguments.leaves) if program.randomness == "same" else []
        for start in range(0, n, chunk_size):
            size = min(chunk_size, n - start)
            if start:
                for restore in restores:
                    restore()
            chunk = _arguments.chunk(arguments, start, size)
            yield from _groups(program, arguments, chunk, size, range(start, start + size), recorder)


def _groups(
    program: Program, arguments: Arguments, leaves: list[Any], n: int, samples: Sequence[int] | None, recorder: Recorder | None
) -> Iterator[Outcome]:
    """The samples in one run; in several where their values lead different ways."""
    try:
        outcome = run(program, arguments, leaves, n, recorder, samples)
    except Split as split:
        groups = split.groups
    else:
        yield outcome
        return
    restores = random_states(leaves) if program.randomness == "same" else []
    for i, group in enumerate(groups):
        if i:
            for restore in restores:
                restore()
        part, numbers = _arguments.pick(arguments, leaves, group), group if samples is None else [samples[k] for k in group]
        yield from _groups(program, arguments, part, len(group), numbers, recorder)


def _materialized(outcome: Outcome, inputs: list[Any]) -> tuple[list[Tensor], Tensor, Any]:
    functional = outcome.ctx.functional
    leaves = [f.materialize(functional=functional) for f in outcome.factors]
    if not functional:
        _separate(leaves, inputs)
    return leaves, outcome.values, outcome.aux


def _separate(leaves: list[Tensor], inputs: list[Any]) -> None:
    """Equal gradients, such as those of an LSTM's two biases, in memory of their own: the caller may scale them in place."""
    seen = {_address(x) for x in inputs}
    for i, leaf in enumerate(leaves):
        place = _address(leaf)
        if place and place in seen:
            leaves[i] = leaf.clone()
        seen.add(place)


def _address(x: Any) -> int:
    """Where a tensor's numbers begin; 0 for what has no memory of its own (fake tensors, wrappers)."""
    return x.data_ptr() if type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided else 0


def _joined(pieces: list[Any]) -> tuple[list[Tensor], Tensor, Any]:
    """All samples' gradients, values and auxiliary values, in the caller's order."""
    samples = [k for _, numbers in pieces for k in numbers]
    order = None if samples == sorted(samples) else torch.tensor(samples).argsort()

    def join(*parts: Any) -> Any:
        first = parts[0]
        if all(isinstance(p, Tensor) and p.shape[1:] == first.shape[1:] and p.dtype == first.dtype for p in parts):
            whole = torch.cat(parts)
            return whole if order is None else whole[order.to(whole.device)]
        if any(isinstance(p, Tensor) for p in parts) or any(not _same(first, p) for p in parts):
            shown = [f"a tensor {list(p.shape)} of {p.dtype}" if isinstance(p, Tensor) else repr(p) for p in (first, parts[-1])]
            raise ArgumentError(f"`aux` differs between samples that ran apart (`chunk_size`, groups): {shown[0]} and {shown[1]}.")
        return first

    found = [piece for piece, _ in pieces]
    structures = [trees.flatten(piece)[1] for piece in found]
    if any(structure != structures[0] for structure in structures):
        raise ArgumentError("`aux` must have the same structure for all samples, also for those that ran apart (`chunk_size`, groups).")
    joined: tuple[list[Tensor], Tensor, Any] = trees.map(join, *found)
    return joined


_COMPARED = (int, float, complex, str, bytes, frozenset, set, torch.dtype, torch.device, torch.Size)


def _same(x: Any, y: Any) -> bool:
    """Equality of plain values, NaN among them; of other objects nobody can tell."""
    return x is y or (type(x) is type(y) and isinstance(x, _COMPARED) and repr(x) == repr(y))


def _of_nobody(arguments: Arguments, has_aux: bool) -> tuple[list[Tensor], Tensor, Any]:
    """The results for an empty batch where the function wants to know the values of a sample."""
    if has_aux:
        raise DataDependentError("The batch is empty, and `fn` asks for a sample's values, so that nobody knows what `aux` would be.")
    leaves = [leaf for leaf, diff in zip(arguments.leaves, arguments.diff, strict=True) if diff and isinstance(leaf, Tensor)]
    own = [arguments.dims[i] for i, diff in enumerate(arguments.diff) if diff and isinstance(arguments.leaves[i], Tensor)]
    shapes = [leaf.shape if dim is None else leaf.movedim(dim, 0).shape[1:] for leaf, dim in zip(leaves, own, strict=True)]
    grads = [leaf.new_zeros((0, *shape)) for leaf, shape in zip(leaves, shapes, strict=True)]
    return grads, leaves[0].real.new_zeros(0), None


def _emptied(x: Any) -> Any:
    return x[:0] if isinstance(x, Tensor) else x
