"""The ranks of a mesh over which the samples of a batch are spread, and what they found put together. All communication is DTensors'."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from per_sample import _trees as trees
from per_sample._containers import close_tree, open_tree
from per_sample._errors import BatchSizeError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def imported() -> bool:
    """Whether there can be DTensors: whoever made one has imported their module."""
    return hasattr(sys.modules.get("torch.distributed.tensor"), "DTensor")


def dtensors() -> Any:
    """The module of DTensors, once it is imported."""
    return sys.modules["torch.distributed.tensor"]


def is_distributed(x: Any) -> bool:
    """Whether this is a DTensor."""
    return imported() and isinstance(x, dtensors().DTensor)


class Form(NamedTuple):
    """How a differentiated tensor that all samples share lies on the ranks."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Ranks:
    """How the samples lie on the ranks of a mesh."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]  # of what has the sample axis in front
    n: int  # samples on all ranks
    start: int  # the number of this rank's first one
    own: int  # how many there are here
    forms: list[Form | None]  # of each differentiated leaf; None: plain, or different for each sample
    seed: int | None  # for random numbers, if those are allowed

    def rows(self, x: Tensor) -> DTensor:
        """The ranks' rows ``[own, ...]`` as one tensor ``[n, ...]``, which stays where it is."""
        shape = torch.Size((self.n, *x.shape[1:]))
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return dtensors().DTensor.from_local(x.contiguous(), self.mesh, self.placements, shape=shape, stride=stride)

    def tree_of_rows(self, tree: Any) -> Any:
        """The same for all tensors of a tree."""
        return close_tree(trees.map(lambda x: self.rows(x) if isinstance(x, Tensor) else x, open_tree(tree)))

    def own_rows(self, x: Any, name: str) -> Tensor:
        """The rows of this rank's samples of the caller's tensor ``[n, ...]``; ``name`` is for the message."""
        if not is_distributed(x):
            return x.narrow(0, self.start, self.own)
        check_mesh(x, self.mesh, name)
        check_placements(x, name)
        return x.redistribute(placements=self.placements).to_local()

    def gathered(self, x: Tensor) -> Tensor:
        """The rows of all samples on every rank."""
        self.check_count()
        return self.rows(x).full_tensor()

    def same(self, x: Tensor, mesh: DeviceMesh | None = None) -> DTensor:
        """What every rank holds alike."""
        mesh = mesh or self.mesh
        return dtensors().DTensor.from_local(x, mesh, [dtensors().Replicate()] * mesh.ndim)

    def sums(self, parts: Sequence[Tensor], counted: bool = False) -> list[DTensor]:
        """The sums over the ranks, one for each differentiated leaf and sharded as that is; ``counted``: see `totals`."""
        out: dict[int, DTensor] = {}
        for number, (part, form) in enumerate(zip(parts, self.forms, strict=True)):
            if form is not None and part.shape == form.shape and not all(p.is_replicate() for p in form.placements):
                out[number] = self._partial(part, form.mesh).redistribute(placements=form.placements)
        rest = [number for number in range(len(parts)) if number not in out]
        for number, whole in zip(rest, self.totals([parts[number] for number in rest], counted), strict=True):
            form = self.forms[number]
            out[number] = self.same(whole, form and form.mesh)
        return [out[number] for number in range(len(parts))]

    def totals(self, parts: Sequence[Tensor], counted: bool = False) -> list[Tensor]:
        """The sums over the ranks of tensors of any shapes, by one reduction for each dtype.

        ``counted``: with `check_count`.
        """
        out: list[Any] = [None] * len(parts)
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        flat = [_numbers(part) for part in parts]
        if counted:
            flat.append(torch.full((1,), self.own, dtype=flat[0].dtype if flat else torch.float64, device=self.mesh.device_type))
        for number, x in enumerate(flat):
            groups.setdefault((x.dtype, x.device), []).append(number)
        for members in groups.values():
            whole = self._total(torch.cat([flat[number] for number in members]))
            for number, piece in zip(members, whole.split([flat[number].numel() for number in members]), strict=True):
                if number == len(parts):
                    self._compare_count(float(piece))
                else:
                    out[number] = _shaped(piece, parts[number])
        return out

    def _total(self, part: Tensor) -> Tensor:
        return self._partial(part, self.mesh).redistribute(placements=[dtensors().Replicate()] * self.mesh.ndim).to_local()

    def check_count(self) -> None:
        """Make sure that the ranks have as many samples together as each of them believes."""
        self.totals([], counted=True)

    def _compare_count(self, found: float) -> None:
        if abs(found - self.n) > 0.5 + 1e-6 * self.n:
            raise BatchSizeError(
                f"The batch is a DTensor of {self.n} samples to this rank, but the ranks hold {found:.0f} together. `from_local` takes "
                "all to hold as many: pad the shards to one size (`clipped_grad` knows `is_padding`), or use `distribute_tensor`."
            )

    def _partial(self, part: Tensor, mesh: DeviceMesh) -> DTensor:
        """What is to be added up along the axes of the mesh over which the samples are spread."""
        kinds = dtensors()
        placements = [kinds.Partial() if placement.is_shard() else kinds.Replicate() for placement in self.placements]
        return kinds.DTensor.from_local(part, mesh, placements)

    def moments(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Of all samples: from each rank's means, and sums of squared deviations from them, the same; the latter still to be summed."""
        means = self.totals([mean * (self.own / max(1, self.n)) for mean, _ in parts], counted=True)
        apart = [(here - mean).abs().square() * self.own for (here, _), mean in zip(parts, means, strict=True)]
        return [(mean, deviations + more) for (_, deviations), mean, more in zip(parts, means, apart, strict=True)]

    @contextmanager
    def random(self) -> Iterator[None]:
        """Where random numbers are drawn: neither the same on all ranks, unless they are to be, nor the caller's own afterwards."""
        if self.seed is None:
            yield
            return
        kind = self.mesh.device_type
        module = None if kind == "cpu" else torch.get_device_module(kind)
        with torch.random.fork_rng([] if module is None else [module.current_device()], device_type="cuda" if module is None else kind):
            torch.default_generator.manual_seed(self.seed)
            if module is not None:
                module.manual_seed(self.seed)
            yield


def check_mesh(x: DTensor, mesh: DeviceMesh, name: str) -> None:
    """Refuse a tensor on another mesh."""
    other = x.device_mesh
    if other is not mesh and (other.device_type != mesh.device_type or not torch.equal(other.mesh, mesh.mesh)):
        raise UnsupportedError(f"{name} has a DTensor on {other}, another mesh than that of the batch, {mesh}.")


def check_placements(x: DTensor, name: str) -> None:
    """Refuse sums that are not taken yet, and unusual ways to cut a tensor."""
    if not all(placement.is_replicate() or type(placement) is dtensors().Shard for placement in x.placements):
        raise UnsupportedError(f"{name} has a DTensor with placements {tuple(x.placements)}; only Shard and Replicate can be used here.")


def _numbers(x: Tensor) -> Tensor:
    """The numbers of a tensor, as those that can be reduced."""
    if x.dtype == torch.bool:
        x = x.int()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1)


def _shaped(numbers: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(numbers.view(*like.shape, 2))
    return numbers.view(like.shape).to(like.dtype)
