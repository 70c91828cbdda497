"""Matrix products.

A shared operand is met by one product with the sample axis folded into the rows. In the backward pass the product of
two per-sample matrices is a weight's gradient in disguise, so it stays an ``Outer`` factor until somebody asks for its
numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from per_sample._batched import Batched, physical, samples
from per_sample._combinators import at_rank, is_inexact
from per_sample._errors import UnsupportedError
from per_sample._factors import Outer
from per_sample._kernels.onednn import linear
from per_sample._registry import rule

aten = torch.ops.aten


def _matrix_product(a: Any, b: Any) -> Tensor:
    """``[n, o, i]`` of two matrices of which at least one differs between samples."""
    if type(b) is not Batched:
        value = a.physical
        n, o, t = value.shape
        return (value.reshape(n * o, t) @ b).view(n, o, b.shape[1])
    if type(a) is not Batched and a.layout is not torch.strided:
        # A sparse matrix meets the samples side by side.
        value = b.physical.movedim(0, 1)
        return (a @ value.reshape(value.shape[0], -1)).view(a.shape[0], *value.shape[1:]).movedim(1, 0)
    if type(a) is not Batched:
        return torch.matmul(a, b.physical)
    return torch.bmm(a.physical, b.physical)


def _is_gradient(a: Any, b: Any) -> bool:
    """Whether a product of two per-sample matrices may be a weight's gradient."""
    return type(a) is Batched and type(b) is Batched and a.ctx.backward and is_inexact(a)


@rule(aten.mm.default)
def mm(self: Any, mat2: Any) -> Any:
    if _is_gradient(self, mat2):
        return Outer(self.physical, mat2.physical)
    return _matrix_product(self, mat2)


@rule(aten._sparse_mm_reduce_impl.default)
def sparse_mm_reduce(self: Any, other: Any, reduce: str) -> Any:
    """Its backward kernel reads the saved positions by pointer, whatever they are."""
    raise UnsupportedError("`torch.sparse.mm` with `reduce` has no per-sample form; use it without, or gather and reduce.")


@rule(aten.addmm.default)
def addmm(self: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if type(mat1) is Batched and type(mat2) is not Batched and type(self) is not Batched and self.dim() == 1:
        value = mat1.physical
        n, o, t = value.shape
        rows = value.reshape(n * o, t)
        if beta == alpha == 1 and not mat1.ctx.functional:
            out = linear(rows, mat2.t(), self)
            if out is not None:
                return out.view(n, o, mat2.shape[1])
        return torch.addmm(self, rows, mat2, beta=beta, alpha=alpha).view(n, o, mat2.shape[1])
    if type(mat1) is Batched or type(mat2) is Batched:
        return _plus(self, _matrix_product(mat1, mat2), 2, beta, alpha)
    return _plus(self, torch.mm(mat1, mat2), 2, beta, alpha)


def _plus(bias: Any, product: Tensor, ndim: int, beta: Any, alpha: Any) -> Tensor:
    """``beta * bias + alpha * product``; a ``beta`` of zero ignores even NaN."""
    if beta == 0:
        return product if alpha == 1 else product * alpha
    bias = at_rank(bias, ndim)
    return torch.add(bias if beta == 1 else bias * beta, product, alpha=alpha)


def _batched_product(a: Any, b: Any) -> Tensor:
    """``[n, b, o, i]`` of two stacks of matrices of which at least one differs between samples."""
    if type(a) is Batched and type(b) is Batched:
        left, right = a.physical, b.physical
        n, batch, o, t = left.shape
        product = torch.bmm(left.reshape(n * batch, o, t), right.reshape(n * batch, t, right.shape[3]))
        return product.view(n, batch, o, right.shape[3])
    if type(a) is Batched:
        return _rows_times_shared(a.physical, b)
    # The transposed product, so that the shared operand is again on the right.
    return _rows_times_shared(b.physical.transpose(2, 3), a.transpose(1, 2)).transpose(2, 3).contiguous()


def _rows_times_shared(value: Tensor, shared: Tensor) -> Tensor:
    """``value [n, b, o, t]`` times ``shared [b, t, i]``: the samples are more rows. Contiguous, as the program may count on it (`view`)."""
    n, batch, o, t = value.shape
    i = shared.shape[2]
    if batch == 1:
        return (value.reshape(n * o, t) @ shared[0]).view(n, 1, o, i)
    rows = value.transpose(0, 1).reshape(batch, n * o, t)
    return torch.bmm(rows, shared).view(batch, n, o, i).transpose(0, 1).contiguous()


@rule(aten.bmm.default)
def bmm(self: Any, mat2: Any) -> Any:
    if _is_gradient(self, mat2):
        return Outer(self.physical, mat2.physical)
    return _batched_product(self, mat2)


@rule(aten.baddbmm.default)
def baddbmm(self: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if type(batch1) is Batched or type(batch2) is Batched:
        return _plus(self, _batched_product(batch1, batch2), 3, beta, alpha)
    return _plus(self, torch.bmm(batch1, batch2), 3, beta, alpha)


@rule(aten.addbmm.default)
def addbmm(self: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if type(batch1) is Batched or type(batch2) is Batched:
        return _plus(self, _batched_product(batch1, batch2).sum(1), 2, beta, alpha)
    return _plus(self, torch.bmm(batch1, batch2).sum(0), 2, beta, alpha)


def _matrix_vector(mat: Any, vec: Any) -> Tensor:
    """``[n, o]``."""
    if type(mat) is not Batched:
        return vec.physical @ mat.T
    if type(vec) is not Batched:
        return torch.matmul(mat.physical, vec)
    return torch.bmm(mat.physical, vec.physical.unsqueeze(2)).squeeze(2)


@rule(aten.mv.default)
def mv(self: Any, vec: Any) -> Any:
    return _matrix_vector(self, vec)


@rule(aten.addmv.default)
def addmv(self: Any, mat: Any, vec: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if type(mat) is Batched or type(vec) is Batched:
        return _plus(self, _matrix_vector(mat, vec), 1, beta, alpha)
    return _plus(self, torch.mv(mat, vec), 1, beta, alpha)


@rule(aten.addr.default)
def addr(self: Any, vec1: Any, vec2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    n = samples(self, vec1, vec2)
    return _plus(self, physical(vec1, n).unsqueeze(2) * physical(vec2, n).unsqueeze(1), 2, beta, alpha)


@rule(aten.dot.default)
def dot(self: Any, tensor: Any) -> Any:
    if self.shape != tensor.shape:
        return NotImplemented
    if type(tensor) is not Batched:
        return torch.mv(self.physical, tensor)
    if type(self) is not Batched:
        return torch.mv(tensor.physical, self)
    return (self.physical * tensor.physical).sum(1)


@rule(aten.vdot.default)
def vdot(self: Any, other: Any) -> Any:
    if self.shape != other.shape:
        return NotImplemented
    n = samples(self, other)
    return (physical(self, n).conj_physical() * physical(other, n)).sum(1)


@rule(aten._trilinear.default)
def trilinear(i1: Any, i2: Any, i3: Any, expand1: Any, expand2: Any, expand3: Any, sumdim: Any, unroll_dim: int = 1) -> Any:
    """The op says itself along which axes an operand is to be expanded: the sample axis is one for shared operands."""
    operands, expands = [], []
    for x, expand in ((i1, expand1), (i2, expand2), (i3, expand3)):
        shifted = [d + 1 for d in expand]
        operands.append(x.physical if type(x) is Batched else x)
        expands.append(shifted if type(x) is Batched else [0, *shifted])
    return aten._trilinear(*operands, *expands, [d + 1 for d in sumdim], unroll_dim + 1)
