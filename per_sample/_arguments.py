"""Reading a transform's arguments: argnums, in_dims, pytrees, batch size."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.rnn import PackedSequence

from per_sample import _trees as trees
from per_sample._errors import ArgumentError, BatchSizeError, UnsupportedError

Argnums = int | tuple[int, ...]
RANDOMNESS = ("error", "different", "same")
_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


@dataclass(frozen=True, eq=False, slots=True)
class Arguments:
    """The positional arguments, flattened, with what is known of each leaf."""

    leaves: list[Any]
    spec: Any
    dims: list[int | None]  # the batched axis of each leaf
    diff: list[bool]  # whether the leaf is differentiated
    owner: list[int]  # which argument the leaf belongs to
    argnums: tuple[int, ...]
    n: int


def check_options(fn: Any, argnums: Any, randomness: Any, chunk_size: Any) -> None:
    """Refuse what no call could make right, when the transform is made."""
    if not callable(fn):
        raise ArgumentError(f"`fn` must be callable; got {type(fn).__name__}.")
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if not numbers or any(isinstance(i, bool) or not isinstance(i, int) for i in numbers):
        found = repr(argnums) if isinstance(argnums, (int, float, str, list)) else f"a {type(argnums).__name__}"
        raise ArgumentError(
            f"`argnums` must be an int or a non-empty tuple of ints; got {found}. The function's own arguments go to what the transform "
            "returns: `per_sample_grad(fn)(params, x, y)`."
        )
    if randomness not in RANDOMNESS:
        raise ArgumentError(f"`randomness` must be one of {RANDOMNESS}; got {randomness!r}.")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ArgumentError(f"`chunk_size` must be None or a positive int; got {chunk_size!r}.")


def read(args: tuple[Any, ...], argnums: Argnums, in_dims: Any, trees: Any = trees) -> Arguments:
    """Flatten and check the positional arguments of one call; ``trees`` has the pytree functions to use."""
    numbers = _argnums(argnums, len(args))
    if any(type(a) is PackedSequence for a in args):
        raise UnsupportedError(
            "A PackedSequence is no argument under `torch.compile` or for the reference; pass the padded tensor and the lengths."
        )
    leaves, spec = trees.flatten(args)
    owner = [i for i, a in enumerate(args) for _ in trees.flatten(a)[0]]
    diff = [i in numbers for i in owner]
    if in_dims is None:
        dims = [0 if not d and isinstance(leaf, Tensor) else None for d, leaf in zip(diff, leaves, strict=True)]
    else:
        dims = _broadcast_in_dims(in_dims, args, leaves, trees)
    for leaf, dim, is_diff, i in zip(leaves, dims, diff, owner, strict=True):
        if isinstance(leaf, Tensor):
            _check_layout(leaf, dim is not None or is_diff, i)
        elif in_dims is None and getattr(leaf, "shape", None):
            raise ArgumentError(
                f"Argument {i} has a leaf of type {type(leaf).__name__}, which is no tensor. Convert it (`torch.as_tensor`) to give each "
                "sample its part, or say with None in `in_dims` that the samples share it."
            )
        elif in_dims is None and hides_tensors(leaf):
            raise ArgumentError(
                f"Argument {i} has a leaf of type {type(leaf).__name__}, which holds tensors but is no pytree, so that no sample would get "
                f"its part. Pass a dict or a tuple, {_REGISTER}, or say with None in `in_dims` that the samples share it."
            )
    dims = [_check_dim(leaf, dim, i, args) for leaf, dim, i in zip(leaves, dims, owner, strict=True)]
    for leaf, is_diff, i in zip(leaves, diff, owner, strict=True):
        if is_diff:
            _check_differentiable(leaf, i)
    return Arguments(leaves, spec, dims, diff, owner, numbers, _batch_size(leaves, dims, owner))


def hides_tensors(leaf: Any, depth: int = 4) -> bool:
    """Whether a leaf is a container of tensors that is no pytree."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        held: Any = [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
    elif isinstance(leaf, SimpleNamespace):
        held = vars(leaf).values()
    elif isinstance(leaf, Mapping):
        held = leaf.values()
    else:
        held = leaf if isinstance(leaf, (list, tuple, set, frozenset, deque)) else ()
    return any(isinstance(x, Tensor) or (depth > 0 and hides_tensors(x, depth - 1)) for x in held)


_REGISTER = "register the type (a dataclass by `torch.export.register_dataclass`, others by `torch.utils._pytree.register_pytree_node`)"


def _argnums(argnums: Argnums, count: int) -> tuple[int, ...]:
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    for i in numbers:
        if not -count <= i < count:
            raise ArgumentError(f"`argnums` names argument {i}, but fn was called with {count} positional argument(s).")
    # Under torch.compile a number may be symbolic, and only a comparison makes it one to look up.
    wrapped = tuple(k for i in numbers for k in range(count) if i % count == k)
    if len(set(wrapped)) != len(wrapped):
        raise ArgumentError(f"`argnums` names an argument twice: {argnums!r}.")
    return wrapped


def _broadcast_in_dims(in_dims: Any, args: tuple[Any, ...], leaves: list[Any], trees: Any) -> list[int | None]:
    if isinstance(in_dims, int) and not isinstance(in_dims, bool):
        return [in_dims if isinstance(x, Tensor) else None for x in leaves]
    if isinstance(in_dims, list):
        in_dims = tuple(in_dims)
    if not isinstance(in_dims, tuple) or len(in_dims) != len(args):
        raise ArgumentError(
            f"`in_dims` must be an int or a tuple with one entry for each of the {len(args)} positional arguments; got {in_dims!r}."
        )
    try:
        dims: list[Any] = trees.broadcast_prefix(in_dims, args)
    except ValueError as err:
        raise ArgumentError(f"`in_dims` {in_dims!r} is not a prefix of the arguments' structure: {err}") from err
    for d in dims:
        if d is not None and (isinstance(d, bool) or not isinstance(d, int)):
            raise ArgumentError(f"`in_dims` entries must be ints or None; got {d!r}.")
    return dims


def _check_dim(leaf: Any, dim: int | None, i: int, args: tuple[Any, ...]) -> int | None:
    if dim is None:
        return None
    if not isinstance(leaf, Tensor):
        raise ArgumentError(f"`in_dims` batches a leaf of argument {i} that is not a tensor but {type(leaf).__name__}; use None for it.")
    if not -leaf.dim() <= dim < leaf.dim():
        inside = " It is one sample's already: a transform (or `explain`) runs around this one." if type(leaf).__name__ == "Batched" else ""
        raise ArgumentError(
            f"Argument {i} has a tensor of shape {list(leaf.shape)}, which has no axis {dim} to batch over. Give it a sample axis, or "
            f"share it between samples with None in `in_dims`.{inside}"
        )
    # A number, also where dynamo takes it for a symbolic one.
    return next(axis for axis in range(leaf.dim()) if axis == dim % leaf.dim())


def _check_layout(leaf: Tensor, needed: bool, i: int) -> None:
    """Refuse tensors without strided memory; ``needed``: batched or differentiated."""
    if isinstance(leaf, (UninitializedParameter, UninitializedBuffer)):
        kind, cure = "not initialised", "run the module once"
    elif leaf.is_nested:
        kind, cure = "nested", "pad it"
    elif leaf.is_quantized:
        kind, cure = "quantised", "dequantise it"
    elif leaf.is_mkldnn or (needed and leaf.layout in _COMPRESSED) or (needed and leaf.is_sparse):
        kind, cure = f"of layout {leaf.layout}", "use `.to_dense()`"
    elif type(leaf).__name__ == "MaskedTensor":
        kind, cure = "masked", "pass its data and its mask"
    else:
        return
    raise UnsupportedError(f"Argument {i} has a tensor that is {kind}, which has no per-sample form here; {cure} first.")


def _check_differentiable(leaf: Any, i: int) -> None:
    if leaf is None:
        return
    if not isinstance(leaf, Tensor) and hides_tensors(leaf):
        raise ArgumentError(
            f"Argument {i} is differentiated (argnums), but has a leaf of type {type(leaf).__name__}, which holds tensors but is no "
            f"pytree. Pass a dict or a tuple, or {_REGISTER}."
        )
    if not isinstance(leaf, Tensor):
        raise ArgumentError(
            f"Argument {i} is differentiated (argnums), but has a leaf of type {type(leaf).__name__}; every leaf must be a tensor. From a "
            "module, `loss = functional(module, loss_fn)` makes a function of its parameters, which are `loss.params`."
        )
    if not (leaf.is_floating_point() or leaf.is_complex()):
        raise ArgumentError(
            f"Argument {i} is differentiated (argnums), but has a leaf of dtype {leaf.dtype}; gradients need floating-point or complex "
            "tensors. Pass integer tensors as another argument."
        )


def _batch_size(leaves: list[Any], dims: list[int | None], owner: list[int]) -> int:
    sizes = [(i, leaf.shape[dim]) for leaf, dim, i in zip(leaves, dims, owner, strict=True) if dim is not None]
    if not sizes:
        raise BatchSizeError(
            "No argument is batched: at least one tensor needs a sample axis (see `in_dims`). What differs between samples goes by "
            "position, a dict of inputs as one argument: keyword arguments are shared by all samples."
        )
    n = sizes[0][1]
    if any(size != n for _, size in sizes):
        found = ", ".join(f"argument {i} has {size}" for i, size in dict.fromkeys(sizes))
        raise BatchSizeError(
            f"The batched arguments disagree about the number of samples: {found}. Every tensor is batched but those of the differentiated "
            "argument, by default the first (see `in_dims`). A list of samples is no batch: stack them, and pad what differs in length."
        )
    return n


def chunk(arguments: Arguments, start: int, size: int) -> list[Any]:
    """The leaves of samples ``start : start + size``."""
    return [leaf if dim is None else leaf.narrow(dim, start, size) for leaf, dim in zip(arguments.leaves, arguments.dims, strict=True)]


def pick(arguments: Arguments, leaves: list[Any], numbers: list[int]) -> list[Any]:
    """The leaves of a part of the samples."""
    chosen = torch.tensor(numbers)
    return [
        leaf if dim is None else leaf.index_select(dim, chosen.to(leaf.device)) for leaf, dim in zip(leaves, arguments.dims, strict=True)
    ]


def one_zero_sample(arguments: Arguments) -> list[Any]:
    """A batch of one sample of zeros, from which an empty batch takes its shapes."""
    out = []
    for leaf, dim in zip(arguments.leaves, arguments.dims, strict=True):
        shape = list(leaf.shape) if isinstance(leaf, Tensor) else []
        if dim is not None:
            shape[dim] = 1
            leaf = torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
        out.append(leaf)
    return out


def as_arguments(leaves: list[Any], arguments: Arguments, is_tuple: bool, args: tuple[Any, ...], trees: Any = trees) -> Any:
    """The gradients in the structure of the arguments they belong to; a leaf that is None keeps None."""
    found = iter(leaves)
    grads = {}
    for i in sorted(arguments.argnums):
        own, spec = trees.flatten(args[i])
        grads[i] = trees.unflatten(spec, [next(found) if isinstance(x, Tensor) else None for x in own])
    ordered = tuple(grads[i] for i in arguments.argnums)
    return ordered if is_tuple else ordered[0]
