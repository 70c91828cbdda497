"""Linear algebra: ops on matrices that take any leading axes, of which the sample axis becomes the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from per_sample._batched import context_of, physical, samples, wrap
from per_sample._registry import register, rule

aten = torch.ops.aten

# By the rank of each tensor argument without leading axes; None is no tensor.
_CORES: dict[tuple[int | None, ...], tuple[OpOverload, ...]] = {
    (2,): (
        aten._linalg_det.default,
        aten._linalg_eigh.default,
        aten._linalg_eigvals.default,
        aten._linalg_slogdet.default,
        aten._linalg_svd.default,
        # Gone in torch 2.15.
        *((aten.cholesky.default,) if hasattr(aten, "cholesky") else ()),
        aten.cholesky_inverse.default,
        aten.geqrf.default,
        aten.linalg_cholesky_ex.default,
        aten.linalg_eig.default,
        aten.linalg_inv_ex.default,
        aten.linalg_ldl_factor_ex.default,
        aten.linalg_lu.default,
        aten.linalg_lu_factor_ex.default,
        aten.linalg_matrix_exp.default,
        aten.linalg_qr.default,
    ),
    (2, 1): (aten.linalg_householder_product.default, aten.lu_unpack.default),
    (2, 2): (
        aten._cdist_forward.default,
        aten._euclidean_dist.default,
        aten.cholesky_solve.default,
        aten.linalg_solve_triangular.default,
        aten.triangular_solve.default,
    ),
    (2, 1, 2): (aten.linalg_ldl_solve.default, aten.linalg_lu_solve.default, aten.ormqr.default),
    (2, 2, 2, None, 2): (aten._cdist_backward.default,),
}


def _lined_up(tensors: list[Any], cores: list[int], n: int) -> list[Tensor] | None:
    """``[n, *lead, *core]`` of each tensor, in one piece, with leading axes that agree; None where a rank is too small."""
    if any(x.dim() < core for x, core in zip(tensors, cores, strict=True)):
        return None
    leads = [x.shape[: x.dim() - core] for x, core in zip(tensors, cores, strict=True)]
    lead = torch.broadcast_shapes(*leads)
    out = []
    for x, core, own in zip(tensors, cores, leads, strict=True):
        value, matrix = physical(x, n), x.shape[x.dim() - core :]
        out.append(value.reshape(n, *(1,) * (len(lead) - len(own)), *own, *matrix).expand(n, *lead, *matrix).contiguous())
    return out


def _settled(out: Any, n: int) -> Any:
    """Results that were not asked for have no elements, and no axes in front either; others may be lazily conjugated."""
    if isinstance(out, Tensor):
        return out.new_empty(n, 0) if out.shape == (0,) else out.resolve_conj()
    return tuple(_settled(x, n) for x in out)


# Their derivatives take the factors of the matrix or of its transpose, as the wrapper's layout says.
_BY_LAYOUT = (aten._linalg_det.default, aten._linalg_slogdet.default)


def _matrices(op: OpOverload, cores: tuple[int | None, ...]) -> Any:
    places = [i for i, core in enumerate(cores) if core is not None]

    def run(*args: Any, **kwargs: Any) -> Any:
        n = samples(*args)
        values = _lined_up([args[i] for i in places], [core for core in cores if core is not None], n)
        if values is None:
            return NotImplemented
        if op in _BY_LAYOUT and not args[0].is_contiguous():
            values[0] = values[0].mT.contiguous().mT
        filled = list(args)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        return _settled(op(*filled, **kwargs), n)

    run.__qualname__ = f"matrices({op})"
    return run


for _core, _ops in _CORES.items():
    for _op in _ops:
        register(_op, _matrices(_op, _core), "rule")

_solve_matrix = _matrices(aten._linalg_solve_ex.default, (2, 2))


@rule(aten._linalg_solve_ex.default)
def solve(A: Any, B: Any, *, left: bool = True, check_errors: bool = False) -> Any:
    """A vector on the right, which torch tells by its shape, becomes a matrix of one column."""
    if B.dim() > 1 and B.shape != A.shape[:-1]:
        return _solve_matrix(A, B, left=left, check_errors=check_errors)
    if not left:
        return NotImplemented
    column = wrap(context_of(A, B), physical(B, samples(A, B)).unsqueeze(-1))
    out, *rest = _solve_matrix(A, column, check_errors=check_errors)
    return out.squeeze(-1), *rest


@rule(aten.linalg_pinv.atol_rtol_tensor)
def pinv(self: Any, *, atol: Any = None, rtol: Any = None, hermitian: bool = False) -> Any:
    """The tolerances have the matrices' leading axes."""
    n = samples(self, atol, rtol)
    lead = self.dim() - 2
    least = [x if x is None else physical(x, n).reshape(n, *(1,) * (lead - x.dim()), *x.shape) for x in (atol, rtol)]
    return aten.linalg_pinv(physical(self, n), atol=least[0], rtol=least[1], hermitian=hermitian).resolve_conj()


@rule(aten._linalg_check_errors.default)
def check_errors(info: Any, api_name: str, *, is_matrix: bool) -> None:
    aten._linalg_check_errors(info.physical, api_name, is_matrix=False)


_least_squares = _matrices(aten.linalg_lstsq.default, (2, 2))


@rule(aten.linalg_lstsq.default)
def lstsq(self: Any, b: Any, rcond: Any = None, *, driver: Any = None) -> Any:
    """Some drivers give residuals only where all matrices have full rank, which is then for each sample to say."""
    if b.dim() < 2 or b.shape == self.shape[:-1]:
        return NotImplemented
    found = _least_squares(self, b, rcond, driver=driver)
    if found[1].shape[1:] == (0,) and driver in ("gelsd", "gelss") and self.shape[-2] > self.shape[-1]:
        return NotImplemented
    return found
