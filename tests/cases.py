"""The one table of cases: a row for every rule. Sizes are pairwise distinct, also from the numbers of samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from case import Case, Input, cplx, ints, order, real, unit
from cases_conv import CONVOLUTIONS
from cases_layers import LAYERS
from cases_rare import RARE
from cases_tensors import TENSORS

OUTER, ROWS, DENSE, SUM = "Outer", "Rows", "Dense", "Sum"


def _linear(name: str, *lead: int, keep_batch_dim: bool = False) -> Case:
    return Case(
        f"linear-{name}",
        lambda p, x: F.linear(x, p[0], p[1]),
        (real(5, 4), real(5)),
        (real(*lead, 4),),
        (OUTER, DENSE),
        {"aten.linear.default": "rule", "aten.linear_backward.default": "rule"},
        keep_batch_dim=keep_batch_dim,
    )


def _product(name: str, fn: object, w: tuple[int, ...], *samples: tuple[int, ...], factor: str = OUTER) -> Case:
    return Case(name, fn, (real(*w),), tuple(real(*s) for s in samples), (factor,))  # type: ignore[arg-type]


LINEAR = [
    _linear("rank1"),
    _linear("rank2", 2),
    _linear("rank3", 2, 6),
    _linear("rank4", 2, 6, 7),
    _linear("keep-rank1", keep_batch_dim=True),
    _linear("keep-rank2", 6, keep_batch_dim=True),
    _product("mm-left", lambda p, x: x @ p[0], (4, 5), (2, 4)),
    _product("mm-right", lambda p, x: p[0] @ x, (4, 5), (5, 2)),
    _product("mm-both", lambda p, x, y: (x * p[0]) @ y, (2, 5), (2, 5), (5, 4), factor=DENSE),
    _product("mv", lambda p, x: p[0] @ x, (4, 5), (5,)),
    _product("mv-shared-vector", lambda p, x: x @ p[0], (5,), (4, 5), factor=DENSE),
    _product("mv-both", lambda p, x, y: (x * p[0]) @ y, (4, 5), (4, 5), (5,), factor=DENSE),
    _product("vm", lambda p, x: x @ p[0], (4, 5), (4,)),
    _product("outer", lambda p, x, y: torch.outer(p[0] * x, y), (4,), (4,), (5,), factor=DENSE),
    _product("dot", lambda p, x: torch.dot(p[0], x), (4,), (4,), factor=DENSE),
    _product("dot-both", lambda p, x, y: torch.dot(p[0] * x, y), (4,), (4,), (4,), factor=DENSE),
    _product("vdot", lambda p, x, y: torch.vdot(p[0] * x, y), (4,), (4,), (4,), factor=DENSE),
    _product("bmm-both", lambda p, x, y: torch.bmm(x * p[0], y), (2, 4, 5), (2, 4, 5), (2, 5, 6), factor=DENSE),
    _product("bmm-shared-right", lambda p, x: torch.bmm(x, p[0]), (2, 5, 6), (2, 4, 5)),
    _product("bmm-shared-left", lambda p, x: torch.bmm(p[0], x), (2, 5, 6), (2, 6, 4)),
    _product("baddbmm", lambda p, x, y: torch.baddbmm(x, y, p[0], beta=2, alpha=0.5), (2, 5, 6), (2, 4, 6), (2, 4, 5)),
    _product("baddbmm-beta0", lambda p, x, y: torch.baddbmm(x, y, p[0], beta=0), (2, 5, 6), (2, 4, 6), (2, 4, 5)),
    _product("addbmm", lambda p, x, y: torch.addbmm(x, y, p[0], alpha=0.5), (2, 5, 6), (4, 6), (2, 4, 5), factor=OUTER),
    _product("addmm", lambda p, x, y: torch.addmm(x, y, p[0], beta=2, alpha=0.5), (5, 6), (4, 6), (4, 5)),
    _product("addmm-matrix-bias", lambda p, x: torch.addmm(p[0], x, x.T), (4, 4), (4, 5), factor=DENSE),
    _product("addmv", lambda p, x, y: torch.addmv(x, p[0], y, alpha=2), (4, 5), (4,), (5,)),
    _product("addmv-both", lambda p, x, y, z: torch.addmv(z, x * p[0], y), (4, 5), (4, 5), (5,), (4,), factor=DENSE),
    _product("addr", lambda p, x, y: torch.addr(p[0], x, y, beta=2, alpha=0.5), (4, 5), (4,), (5,), factor=DENSE),
    _product("matmul-4d", lambda p, x: x @ p[0], (5, 6), (2, 7, 4, 5)),
    _product("matmul-broadcast", lambda p, x: p[0] @ x, (6, 5), (2, 5, 4)),
    _product("einsum", lambda p, x: torch.einsum("bti,oi->bto", x, p[0]), (4, 5), (2, 6, 5)),
    _product("einsum-permuted", lambda p, x: torch.einsum("bit,io->otb", x, p[0]), (5, 4), (2, 5, 6)),
    Case(
        "bilinear",
        lambda p, x, y: F.bilinear(x, y, p[0], p[1]),
        (real(2, 4, 5), real(2)),
        (real(6, 4), real(6, 5)),
        (DENSE, DENSE),
    ),
    Case("tied", lambda p, x: F.linear(F.linear(x, p[0]), p[0].t()), (real(4, 5),), (real(2, 5),), (SUM,)),
    Case(
        "tied-embedding",
        lambda p, i: F.embedding(i, p[0]).sin() @ p[0].t(),
        (real(7, 4),),
        (ints(7, 5),),
        (SUM,),
    ),
    Case("scaled-weight", lambda p, x: F.linear(x, -p[0] * 2 / 5), (real(4, 5),), (real(2, 5),), (OUTER,)),
    Case(
        "masked-weight",
        lambda p, x: F.linear(x, p[0] * torch.ones(4, 5, dtype=p[0].dtype).tril()),
        (real(4, 5),),
        (real(2, 5),),
        ("Hadamard",),
    ),
    Case("reshaped-weight", lambda p, x: x @ p[0].view(5, 8), (real(5, 2, 4),), (real(6, 5),), ("View",)),
    Case(
        "complex-linear",
        lambda p, x: F.linear(x, p[0].conj(), p[1]) * x.mean().conj(),
        (cplx(4, 5), cplx(4)),
        (cplx(2, 5),),
    ),
    Case("complex-view", lambda p, x: (p[0].conj() * x).imag + p[0].real * x.angle(), (cplx(4, 5),), (cplx(4, 5),)),
    Case(
        "complex-as-real",
        lambda p, x: torch.view_as_complex(torch.view_as_real(p[0] * x) * 2),
        (cplx(4, 5),),
        (cplx(4, 5),),
    ),
    Case("complex-polar", lambda p, x: torch.polar(p[0], x) + torch.complex(x, p[0]), (unit(4, 5),), (real(4, 5),)),
    Case("complex-conv", lambda p, x: F.conv1d(x, p[0], p[1]), (cplx(4, 2, 5), cplx(4)), (cplx(2, 8),)),
    Case("complex-conv-transpose", lambda p, x: F.conv_transpose1d(x, p[0]), (cplx(4, 2, 5),), (cplx(4, 8),)),
]

EMBEDDING = [
    Case(
        f"embedding-{name}",
        fn,
        (real(7, 4),),
        (ints(7, *shape),),
        (ROWS,),
        {"aten.embedding_dense_backward.default": "rule"},
    )
    for name, shape, fn in (
        ("rank0", (), lambda p, i: F.embedding(i, p[0])),
        ("rank1", (5,), lambda p, i: F.embedding(i, p[0])),
        ("rank3", (2, 5, 6), lambda p, i: F.embedding(i, p[0])),
        ("padding", (12,), lambda p, i: F.embedding(i, p[0], padding_idx=2)),
        ("negative-padding", (12,), lambda p, i: F.embedding(i, p[0], padding_idx=-1)),
        ("frequencies", (12,), lambda p, i: F.embedding(i, p[0], scale_grad_by_freq=True)),
        ("both", (12,), lambda p, i: F.embedding(i, p[0], padding_idx=4, scale_grad_by_freq=True)),
    )
]
EMBEDDING += [
    Case(
        "embedding-shared-positions",
        lambda p, x: (F.embedding(torch.arange(5), p[0]) * x).sin(),
        (real(7, 4),),
        (real(5, 4),),
        (ROWS,),
    ),
    Case(
        "embedding-sparse",
        lambda p, i: F.embedding(i, p[0], sparse=True),
        (real(7, 4),),
        (ints(7, 5),),
        (ROWS,),
        reference=False,
    ),
    Case("embedding-per-sample", lambda p, x, i: F.embedding(i, p[0] * x), (real(7, 4),), (real(7, 4), ints(7, 5))),
    Case("table-lookup", lambda p, i: p[0][i], (real(7, 4),), (ints(7, 5),)),
    Case("one-hot", lambda p, i: F.one_hot(i, 7).double() @ p[0], (real(7, 4),), (ints(7, 5),), (OUTER,), reference=False),
    Case("take-rows", lambda p, x, i: (p[0] * x)[i], (real(7, 4),), (real(7, 4), order(7, 5))),
]

_BAG_ROUTES = {"aten._embedding_bag.default": "rule", "aten._embedding_bag_backward.default": "rule"}
_OFFSETS = torch.tensor([0, 2, 2, 7])


def _bag(name: str, *samples: Input, **options: Any) -> Case:
    return Case(
        f"embedding_bag-{name}",
        lambda p, *x: F.embedding_bag(x[0], p[0], *x[1:], **options),
        (real(7, 4),),
        samples,
        (ROWS,),
        _BAG_ROUTES,
        reference=False,
    )


BAGS = [
    *(_bag(f"2d-{mode}", ints(7, 2, 5), mode=mode) for mode in ("sum", "mean")),
    *(_bag(f"offsets-{mode}", ints(5, 9), offsets=_OFFSETS, mode=mode) for mode in ("sum", "mean")),
    _bag("offsets-last", ints(5, 9), offsets=torch.tensor([0, 2, 9]), mode="sum", include_last_offset=True),
    _bag("padding", ints(7, 2, 12), mode="mean", padding_idx=2),
    _bag("sparse", ints(7, 2, 5), mode="sum", sparse=True),
    Case(
        "embedding_bag-offsets-per-sample",
        lambda p, i, o: F.embedding_bag(i, p[0], torch.cat([o.new_zeros(1), o + 1]), mode="sum"),
        (real(7, 4),),
        (ints(7, 9), ints(5, 1)),
        (ROWS,),
        _BAG_ROUTES,
        reference=False,
    ),
    Case(
        "embedding_bag-weights",
        lambda p, i, x: F.embedding_bag(i, p[0], per_sample_weights=x * p[1], mode="sum", padding_idx=2),
        (real(7, 4), real(2, 5)),
        (ints(7, 2, 5), real(2, 5)),
        (ROWS, DENSE),
        _BAG_ROUTES,
        reference=False,
    ),
    Case(
        "embedding_bag-max",
        lambda p, i: F.embedding_bag(i, p[0], mode="max"),
        (real(7, 4),),
        (ints(7, 2, 5),),
        loose=frozenset(_BAG_ROUTES),
        reference=False,
    ),
]

CASES = [*LINEAR, *EMBEDDING, *BAGS, *CONVOLUTIONS, *LAYERS, *TENSORS, *RARE]
