"""Programs that the transforms are tried on: a function of one sample, what it is differentiated by, and how to draw samples."""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import case
from checked import call, state_of
from models import GPT, Block
from tree_oracle import loop

if TYPE_CHECKING:
    from collections.abc import Callable

D, C = torch.float64, torch.complex128
N = 5  # unlike every other size
_generator = torch.Generator().manual_seed(0)


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D, generator=_generator)


def cplx(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=C, generator=_generator)


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=_generator)


@dataclass(frozen=True, eq=False)
class Program:
    """``fn(*params, *samples)`` for one sample; ``samples(n)`` draws those of a batch."""

    name: str
    fn: Callable[..., Tensor]
    params: tuple[Any, ...]
    samples: Callable[[int], tuple[Any, ...]]
    argnums: int | tuple[int, ...] = 0
    in_dims: tuple[Any, ...] | None = None
    keep_batch_dim: bool = False
    n: int = N
    # False where vmap(grad) cannot run it.
    reference: bool = True

    def loss(self, *args: Any) -> Tensor:
        return case.score(self.fn(*args))

    @functools.cached_property
    def args(self) -> tuple[Any, ...]:
        return (*self.params, *self.samples(self.n))

    @property
    def options(self) -> dict[str, Any]:
        return {"argnums": self.argnums, "in_dims": self.in_dims, "keep_batch_dim": self.keep_batch_dim}

    @property
    def numbers(self) -> tuple[int, ...]:
        """The positions of the differentiated arguments, in the order of ``argnums``."""
        return tuple(i % len(self.args) for i in (self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)))

    @property
    def wanted(self) -> Any:
        """The differentiated argument, or the tuple of them."""
        return tuple(self.args[i] for i in self.argnums) if isinstance(self.argnums, tuple) else self.args[self.argnums]

    @functools.cached_property
    def grads(self) -> Any:
        """Every sample's gradients by a loop, in the structure of ``wanted``."""
        return self.by_loop(self.args)

    def by_loop(self, args: tuple[Any, ...]) -> Any:
        dims = tuple(None if i in self.numbers else 0 for i in range(len(args))) if self.in_dims is None else self.in_dims
        flat_dims = optree.broadcast_prefix(dims, args, none_is_leaf=True)

        def fn(*one: Any) -> Tensor:
            if not self.keep_batch_dim:
                return self.loss(*one)
            leaves, spec = optree.tree_flatten(one, none_is_leaf=True)
            return self.loss(*optree.tree_unflatten(spec, [x if d is None else x[None] for x, d in zip(leaves, flat_dims, strict=True)]))

        found = loop(fn, self.numbers, dims)(*args)
        return tuple(found) if isinstance(self.argnums, tuple) else found[0]

    @functools.cached_property
    def leaves(self) -> list[Tensor]:
        """Every sample's gradients, ``[N, *shape]`` for each leaf, in the order of the structure."""
        return optree.tree_leaves(self.grads)

    @functools.cached_property
    def others(self) -> tuple[Any, ...]:
        """All arguments, with another batch of samples: of another size, unless something differentiated belongs to the samples."""
        own = self.in_dims is not None and any(d is not None for i in self.numbers for d in optree.tree_leaves(self.in_dims[i]))
        drawn = (*self.params, *self.samples(self.n if own else self.n + 3))
        return tuple(self.args[i] if i in self.numbers else x for i, x in enumerate(drawn))


def _module(name: str, make: Callable[[], nn.Module], samples: Callable[[int], tuple[Any, ...]], **options: Any) -> Program:
    torch.manual_seed(0)
    module = make().to(D)

    def fn(p: Any, *x: Tensor) -> Tensor:
        out = call(module, p, *x)
        return out if isinstance(out, Tensor) else out[0]

    return Program(name, fn, (state_of(module),), samples, **options)


def _one(name: str, fn: Callable[..., Tensor], params: tuple[Tensor, ...], *shapes: tuple[int, ...]) -> Program:
    """Differentiated by a list of tensors; samples of these shapes."""
    return Program(name, fn, (list(params),), lambda n: tuple(real(n, *s) for s in shapes))


def _conv(
    name: str, conv: Callable[..., Tensor], weight: tuple[int, ...], sample: tuple[int, ...], bias: int = 0, **options: Any
) -> Program:
    fn = (lambda p, x: conv(x, p[0], p[1], **options)) if bias else (lambda p, x: conv(x, p[0], **options))
    return _one(name, fn, (real(*weight), real(bias)) if bias else (real(*weight),), sample)


def _mlp(p: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, p["w1"], p["b1"])), p["w2"], p["b2"]) - y


def _tied(p: Any, i: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.embedding(i, p["table"]) @ p["mix"]), p["table"])


def _mixed(p: Any, i: Tensor, x: Tensor) -> Tensor:
    """Every kind of layer and of sharing, small."""
    h = F.embedding(i, p["table"]) + x
    h = F.conv1d(h.T, p["conv"], padding=1).T
    h = torch.tanh(F.linear(h, p["w"] * (p["w"].detach() > 0), p["b"])) * p["s"]
    return F.linear(h, p["table"]) + F.linear(h, p["table"].sin())


MLP = {"w1": real(6, 3), "b1": real(6), "w2": real(2, 6), "b2": real(2)}
_MASK = (real(4, 3) > 0).to(D)

LAYERS = [
    Program("mlp", _mlp, (MLP,), lambda n: (real(n, 3), real(n, 2))),
    Program("mlp over positions", _mlp, (MLP,), lambda n: (real(n, 4, 3), real(n, 2))),
    _conv("conv1d", F.conv1d, (4, 3, 2), (3, 7), 4, stride=2, padding=1),
    _conv("conv1d of two", F.conv1d, (4, 3, 2), (2, 3, 7), dilation=3),
    _conv("conv2d", F.conv2d, (4, 3, 3, 2), (3, 6, 7), 4, padding=1),
    _conv("conv2d strided", F.conv2d, (4, 2, 3, 3), (2, 7, 6), stride=2, padding=1),
    _conv("conv2d grouped", F.conv2d, (4, 3, 2, 2), (6, 3, 4), 4, groups=2),
    _conv("conv2d depthwise", F.conv2d, (3, 1, 3, 3), (3, 4, 6), padding=1, groups=3),
    _conv("conv3d", F.conv3d, (2, 3, 2, 2, 1), (3, 3, 4, 2), 2, padding=(1, 0, 0)),
    _conv("conv_transpose1d", F.conv_transpose1d, (3, 2, 4), (3, 6), 2, stride=2, output_padding=1),
    _conv("conv_transpose2d grouped", F.conv_transpose2d, (4, 3, 2, 3), (4, 3, 2), stride=2, padding=1, groups=2),
    Program("embedding", lambda p, i: F.embedding(i, p[0]), ([real(7, 3)],), lambda n: (ints(7, n, 6),)),
    Program("embedding, padded", lambda p, i: F.embedding(i, p[0], padding_idx=2), ([real(4, 3)],), lambda n: (ints(4, n, 9),)),
    Program("embedding_bag", lambda p, i: F.embedding_bag(i[None], p[0]), ([real(7, 3)],), lambda n: (ints(7, n, 6),)),
    Program("embedding, tied head", _tied, ({"table": real(7, 3), "mix": real(3, 3)},), lambda n: (ints(7, n, 4),)),
    _one("layer norm", lambda p, x: F.layer_norm(x, (3,), p[0], p[1]), (real(3), real(3)), (4, 3)),
    _one("group norm", lambda p, x: F.group_norm(x[None], 2, p[0], p[1]), (real(4), real(4)), (4, 3)),
    _one("rms norm", lambda p, x: F.rms_norm(x, (3,), p[0]), (real(3),), (4, 3)),
    _module("attention", lambda: Block(6, 2), lambda n: (real(n, 4, 6),)),
    _module("gpt", lambda: GPT(7, 4, 2, 1, 6), lambda n: (ints(7, n, 6),)),
    _module("lstm", lambda: nn.LSTM(3, 4, batch_first=True), lambda n: (real(n, 6, 3),), reference=False),
    _module("gru", lambda: nn.GRU(3, 4), lambda n: (real(n, 6, 2, 3),), reference=False),
    Program(
        "mixed",
        _mixed,
        ({"table": real(7, 3), "conv": real(4, 3, 3), "w": real(3, 4), "b": real(3), "s": real()},),
        lambda n: (ints(7, n, 6), real(n, 6, 3)),
    ),
    _module(
        "cnn, keep_batch_dim",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)),
        lambda n: (real(n, 2, 4, 4),),
        keep_batch_dim=True,
    ),
]
USES = [
    _one("used twice", lambda p, x: torch.tanh(x @ p[0]) @ p[0], (real(3, 3),), (3,)),
    _one("used twice, over positions", lambda p, x: torch.tanh(x @ p[0]) @ p[0], (real(3, 3),), (4, 3)),
    _one("conv used twice", lambda p, x: F.conv1d(F.conv1d(x, p[0], padding=1).sin(), p[0]), (real(2, 2, 3),), (2, 6)),
    _one("conv at two sizes", lambda p, x: F.conv1d(x, p[0]).sum(1) + F.conv1d(x[:, 3:], p[0], stride=2).sum(1), (real(4, 2, 3),), (2, 9)),
    _one("conv and linear", lambda p, x: F.conv1d(x, p[0]).sum(1) + p[0].flatten(1) @ x.flatten()[:6], (real(4, 2, 3),), (2, 7)),
    _one("transposed", lambda p, x: torch.tanh(x @ p[0]) @ p[0].T, (real(3, 4),), (6, 3)),
    _one("scaled", lambda p, x: x @ (3 * p[0]) - x @ p[0] / 2, (real(3, 4),), (6, 3)),
    _one("masked", lambda p, x: F.linear(x, p[0] * _MASK), (real(4, 3),), (6, 3)),
    _one("masked, no positions", lambda p, x: F.linear(x, _MASK * p[0]), (real(4, 3),), (3,)),
    _one("masked by the sample", lambda p, x, m: F.linear(x, p[0] * m), (real(4, 3),), (6, 3), (4, 3)),
    _one("viewed", lambda p, x: F.linear(x, p[0].view(4, 3)), (real(2, 6),), (6, 3)),
    _one("permuted", lambda p, x: x @ p[0].permute(2, 0, 1).reshape(4, 6), (real(2, 3, 4),), (3, 4)),
    _one("sliced", lambda p, x: F.linear(x, p[0][1:3]) + x @ p[0][0], (real(4, 3),), (3,)),
    _one("broadcast", lambda p, x: x * p[0] + p[0].exp(), (real(4, 1),), (4, 3)),
    _one("batched product", lambda p, x: torch.einsum("htx,hxy->hty", x, p[0]), (real(2, 3, 4),), (2, 6, 3)),
    _one("bilinear", lambda p, x, y: F.bilinear(x, y, p[0], p[1]), (real(2, 3, 4), real(2)), (3,), (4,)),
    _one("normalised", lambda p, x: F.linear(x, p[0] * p[1] / p[0].norm(dim=1, keepdim=True)), (real(4, 3), real(4, 1)), (6, 3)),
    _one("0-dim", lambda p, x: torch.sin(p[0] * x) * p[1], (real(), real()), (4,)),
    _one("0-dim sample", lambda p, x: torch.sin(p[0] * x), (real(3),), ()),
    _one("unused", lambda p, x: p[0] @ x, (real(2, 3), real(4), real()), (3,)),
    _one("without numbers", lambda p, x: p[0] @ x + p[1].sum(), (real(2, 3), real(0, 4)), (3,)),
    _one("opposite contributions", lambda p, x: (x - x.mean(0)) @ p[0], (real(3, 4),), (6, 3)),
    Program("gathered", lambda p, i: p[0][i].sin(), ([real(7, 3)],), lambda n: (ints(7, n, 4),)),
    Program("complex", lambda p, x: torch.tanh(x @ p[0]) * p[1], ([cplx(3, 4), cplx()],), lambda n: (cplx(n, 6, 3),)),
    Program("complex and real", lambda p, x: (x @ p["w"]).abs() @ p["v"], ({"v": real(4, 2), "w": cplx(3, 4)},), lambda n: (cplx(n, 3),)),
]
ARGUMENTS = [
    Program("frozen", lambda p, x, y: p["w"] @ x + y, ({"b": None, "w": real(2, 3), "z": [None]},), lambda n: (real(n, 3), real(n, 2))),
    Program(
        "pytree",
        lambda p, x: (p["z"][0] @ x) * p["a"]["b"],
        (OrderedDict(z=(real(2, 3),), a={"b": real(2), "none": ()}),),
        lambda n: (real(n, 3),),
    ),
    Program("two arguments", lambda w, b, x: torch.tanh(w @ x + b), (real(2, 3), real(2)), lambda n: (real(n, 3),), argnums=(0, 1)),
    Program("other order", lambda w, b, x: torch.tanh(w @ x + b), (real(2, 3), real(2)), lambda n: (real(n, 3),), argnums=(1, 0)),
    Program(
        "last", lambda x, y, p: torch.tanh(p @ x) + y, (), lambda n: (real(n, 3), real(n, 2), real(2, 3)), argnums=-1, in_dims=(0, 0, None)
    ),
    Program(
        "sample differentiated too",
        lambda w, x, y: torch.tanh(w @ x) + y,
        (real(2, 3),),
        lambda n: (real(n, 3), real(n, 2)),
        argnums=(0, 1),
        in_dims=(None, 0, 0),
    ),
    Program(
        "own parameters",
        lambda p, x: torch.tanh(p["w"] @ x + p["b"]),
        (),
        lambda n: ({"w": real(2, n, 3), "b": real(2)}, real(3, n)),
        in_dims=({"w": 1, "b": None}, -1),
    ),
    Program("shared sample", lambda p, x, s: p @ x * s, (real(2, 3),), lambda n: (real(n, 3), real(2)), in_dims=(None, 0, None)),
]
PROGRAMS = [*LAYERS, *USES, *ARGUMENTS]
BY_NAME = {program.name: program for program in PROGRAMS}
# What clipping is tried on most.
CLIPPED = ["mlp", "mlp over positions", "mixed", "cnn, keep_batch_dim", "conv2d grouped", "used twice", "complex and real"]
