"""Batches that lie on several ranks, as DTensors sharded on the sample axis: the arguments as each rank sees them.

Every rank runs the function on its own samples and on whole parameters, all of them plain tensors. What has a row for each sample stays
where it is; what is summed over the samples is reduced after the run. Nothing is communicated while the function runs, so that ranks may
take different numbers of chunks.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, peek_interpreter_stack

from per_sample import _arguments
from per_sample import _trees as trees
from per_sample._errors import BatchSizeError, UnsupportedError
from per_sample._ranks import Form, Ranks, check_mesh, check_placements, dtensors, imported, is_distributed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

    from per_sample._arguments import Arguments


def localised(convention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Ranks | None, tuple[Any, ...], dict[str, Any]]:
    """The arguments as this rank sees them, plain, and how the samples lie on the ranks; None and the same if no argument is a DTensor."""
    if not imported():
        return None, args, kwargs
    leaves = trees.flatten((args, kwargs))[0]
    if peek_interpreter_stack() is not None and any(is_distributed(_unwrapped(x)) for x in leaves):
        raise UnsupportedError(
            "Transforms of torch.func (grad, vmap, jvp, ...) do not go around DTensors. For derivatives of the result use torch.autograd."
        )
    if not any(map(is_distributed, leaves)):
        return None, args, kwargs
    arguments = _arguments.read(args, convention.argnums, convention.in_dims)
    mesh, placements = _layout(arguments)
    _check_shared(arguments, kwargs, mesh)
    start, own = _part(mesh, placements, arguments.n)
    for x, dim, i in zip(arguments.leaves, arguments.dims, arguments.owner, strict=True):
        if dim is not None and x.to_local().shape[dim] != own:
            raise BatchSizeError(
                f"Argument {i} is a DTensor of {arguments.n} samples, of which this rank should hold {own}; it holds "
                f"{x.to_local().shape[dim]}. DTensors are cut as by `torch.chunk`: pad the shards, or use `distribute_tensor`."
            )
    seed = None if convention.randomness == "error" else _seed(mesh, placements, convention.randomness)
    ranks = Ranks(mesh, placements, arguments.n, start, own, _forms(arguments), seed)
    leaves = [_local(x, dim, ranks) for x, dim in zip(arguments.leaves, arguments.dims, strict=True)]
    return ranks, trees.unflatten(arguments.spec, leaves), trees.map(lambda x: _local(x, None, ranks), kwargs)


def gathered(convention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Plain arguments, with the samples of all ranks on each."""
    arguments = _arguments.read(args, convention.argnums, convention.in_dims)
    mesh, _ = _layout(arguments)
    _check_shared(arguments, kwargs, mesh)
    return whole(args), whole(kwargs)


def with_whole_state(fn: Any) -> Any:
    """The function of a module, with what that holds fixed whole on every rank.

    Not while the function runs: samples run in chunks, of which each rank may have another number.
    """
    return fn.gathered() if hasattr(fn, "gathered") else fn


def whole(tree: Any) -> Any:
    """The tree with plain tensors, of which every rank has all."""
    return trees.map(lambda x: x.full_tensor() if is_distributed(x) else x, tree)


def seen(leaves: list[Any]) -> bool:
    """Whether a DTensor is among the leaves; can be traced by torch.compile."""
    return any(type(x).__name__ == "DTensor" for x in leaves)


def refuse(leaves: list[Any], why: str) -> None:
    """Raise ``UnsupportedError`` where a DTensor is among the leaves."""
    if seen(leaves):
        raise UnsupportedError(why)


@contextmanager
def mixtures_refused() -> Iterator[None]:
    """Where torch's error about DTensors means those that the function did not get as arguments."""
    try:
        yield
    except RuntimeError as err:
        if "mixed torch.Tensor and DTensor" not in str(err):
            raise
        raise UnsupportedError(
            "A DTensor is where none can be used: the function closes over one (pass it as an argument, with None in `in_dims` or by "
            "keyword where the samples share it, or close over its `full_tensor()`), makes one, or gets one in a PackedSequence (pass the "
            f"padded tensor and the lengths). torch says: {err}"
        ) from err


def _unwrapped(x: Any) -> Any:
    """What a tensor is outside of all torch.func transforms."""
    while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def _layout(arguments: Arguments) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    """The mesh of the batch, and the placements of what has its sample axis in front; the same for all batched arguments."""
    found: list[tuple[DeviceMesh, tuple[Placement, ...]]] = []
    for x, dim, i in zip(arguments.leaves, arguments.dims, arguments.owner, strict=True):
        if dim is None:
            continue
        if not is_distributed(x):
            raise UnsupportedError(
                f"Argument {i} is batched and a plain tensor, while others are DTensors. Say where its samples are: "
                f"`distribute_tensor(x, mesh, [Shard({dim})])` for a batch of which every rank has all, `DTensor.from_local(x, mesh, "
                f"[Shard({dim})])` for each rank's own part."
            )
        if found:
            check_mesh(x, found[0][0], f"Argument {i}")
        found.append((x.device_mesh, _sample_placements(x, dim, i)))
        if found[-1][1] != found[0][1]:
            raise UnsupportedError(
                f"Argument {i} has placements {tuple(x.placements)}, by which its samples lie on other ranks than those of another batched "
                "argument; use `x.redistribute`."
            )
    mesh, placements = found[0]
    if mesh.get_coordinate() is None:
        raise UnsupportedError("This process is no part of the mesh on which the batch lies.")
    return mesh, placements


def _check_shared(arguments: Arguments, kwargs: dict[str, Any], mesh: DeviceMesh) -> None:
    """Refuse what cannot be gathered for all samples."""
    own = zip(arguments.leaves, arguments.dims, arguments.owner, strict=True)
    shared = [(x, f"Argument {i}") for x, dim, i in own if dim is None]
    for x, name in shared + [(x, "A keyword argument") for x in trees.flatten(kwargs)[0]]:
        if is_distributed(x):
            check_mesh(x, mesh, name)
            check_placements(x, name)


def _sample_placements(x: DTensor, dim: int, i: int) -> tuple[Placement, ...]:
    shard: Any = dtensors().Shard
    for placement in x.placements:
        if not (placement.is_replicate() or (type(placement) is shard and placement.is_shard(dim))):
            raise UnsupportedError(
                f"Argument {i} has placements {tuple(x.placements)}; a batch can be sharded on its sample axis, which is {dim}, or "
                "replicated, nothing else. Use `x.redistribute`."
            )
    return tuple(shard(0) if placement.is_shard() else placement for placement in x.placements)


def _part(mesh: DeviceMesh, placements: tuple[Placement, ...], n: int) -> tuple[int, int]:
    """The number of this rank's first sample and how many it has, as DTensors are cut: along one axis of the mesh after the other."""
    start, size = 0, n
    for axis, placement in enumerate(placements):
        if placement.is_shard():
            chunk = -(-size // mesh.size(axis))
            first = min(size, chunk * mesh.get_local_rank(axis))
            start, size = start + first, min(chunk, size - first)
    return start, size


def _forms(arguments: Arguments) -> list[Form | None]:
    found: list[Form | None] = []
    for x, dim, diff in zip(arguments.leaves, arguments.dims, arguments.diff, strict=True):
        if diff and isinstance(x, Tensor):
            shared: Any = x if dim is None and is_distributed(x) else None
            found.append(None if shared is None else Form(shared.device_mesh, tuple(shared.placements), tuple(shared.shape)))
    return found


def _local(x: Any, dim: int | None, ranks: Ranks) -> Any:
    """This rank's samples; of what the samples share all of it, whose derivative is the sum of what the ranks find."""
    if dim is not None:
        return x.to_local()
    if not isinstance(x, Tensor):
        return x
    kinds = dtensors()
    grads = [kinds.Partial() if placement.is_shard() else kinds.Replicate() for placement in ranks.placements]
    if is_distributed(x):
        return x.full_tensor(grad_placements=grads)  # type: ignore[attr-defined]
    if x.requires_grad and torch.is_grad_enabled():
        return ranks.same(x).to_local(grad_placements=grads)
    return x


def _seed(mesh: DeviceMesh, placements: tuple[Placement, ...], randomness: str) -> int:
    """A new seed on which the ranks agree; another one for each part of the samples if their numbers are to be different."""
    part = 0
    for axis, placement in enumerate(placements):
        if placement.is_shard() and randomness == "different":
            part = part * mesh.size(axis) + mesh.get_local_rank(axis)
    drawn = torch.randint(2**62, (1,), device="cpu").to(mesh.device_type)
    agreed = dtensors().DTensor.from_local(drawn, mesh, [dtensors().Shard(0)] * mesh.ndim).full_tensor()[0]
    return (int(agreed) + 0x9E3779B97F4A7C15 * part) % 2**63
