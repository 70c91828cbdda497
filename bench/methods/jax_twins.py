"""JAX: `jit(vmap(grad(fn)))`, reduced, on twins of the networks that are short to write.

A twin takes the torch model's own parameters by their names, and ONE sample. It runs on as many threads as there are cores.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.methods.method import Prepare, Runner, Unavailable
from bench.workloads import Task

# (jax, parameters by name, x) -> logits, of one sample
Twin = Callable[[Any, dict[str, Any], Any], Any]


def _layers(p: dict[str, Any]) -> list[str]:
    """The layers of an `nn.Sequential`, in order; JAX hands the names over sorted as text."""
    return sorted({name.split(".")[0] for name in p}, key=int)


def _linear(p: dict[str, Any], name: str, x: Any) -> Any:
    out = x @ p[f"{name}.weight"].T
    return out + p[f"{name}.bias"] if f"{name}.bias" in p else out


def _conv(jax: Any, p: dict[str, Any], name: str, x: Any, stride: int = 1, padding: int = 0) -> Any:
    out = jax.lax.conv_general_dilated(x[None], p[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)[0]
    return out + p[f"{name}.bias"][:, None, None]


def _pool(jax: Any, x: Any, start: float, reduce: Any, size: int, stride: int) -> Any:
    return jax.lax.reduce_window(x, start, reduce, (1, size, size), (1, stride, stride), "VALID")


def _mlp(jax: Any, p: dict[str, Any], x: Any) -> Any:
    *hidden, head = _layers(p)
    for name in hidden:
        x = jax.nn.relu(_linear(p, name, x))
    return _linear(p, head, x)


def _mnist_cnn(jax: Any, p: dict[str, Any], x: Any) -> Any:
    for name, stride, padding in (("conv1", 2, 3), ("conv2", 2, 0)):
        x = jax.nn.relu(_conv(jax, p, name, x, stride, padding))
        x = _pool(jax, x, -jax.numpy.inf, jax.lax.max, 2, 1)
    return _linear(p, "fc2", jax.nn.relu(_linear(p, "fc1", x.ravel())))


def _convnet(jax: Any, p: dict[str, Any], x: Any) -> Any:
    *convs, head = _layers(p)
    for name in convs:
        x = jax.nn.relu(_conv(jax, p, name, x, padding=1))
        x = x.mean((1, 2)) if name == convs[-1] else _pool(jax, x, 0.0, jax.lax.add, 2, 2) / 4
    return _linear(p, head, x)


def _embedding(jax: Any, p: dict[str, Any], x: Any) -> Any:
    return _linear(p, "head", p["token.weight"][x].mean(0))


def _norm(jax: Any, p: dict[str, Any], name: str, x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _attention(jax: Any, p: dict[str, Any], name: str, x: Any) -> Any:
    t, dim = x.shape
    q, k, v = (z.reshape(t, dim // 32, 32) for z in jax.numpy.split(_linear(p, f"{name}.qkv", x), 3, -1))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return _linear(p, f"{name}.out", mixed.reshape(t, dim))


def _gpt(jax: Any, p: dict[str, Any], x: Any) -> Any:
    h = p["token.weight"][x] + p["position.weight"][: len(x)]
    for i in range(sum(name.endswith("attention.qkv.weight") for name in p)):
        block = f"blocks.{i}"
        h = h + _attention(jax, p, f"{block}.attention", _norm(jax, p, f"{block}.norm1", h))
        inner = jax.nn.gelu(_linear(p, f"{block}.mlp.0", _norm(jax, p, f"{block}.norm2", h)), approximate=False)
        h = h + _linear(p, f"{block}.mlp.2", inner)
    return _norm(jax, p, "norm", h) @ p.get("head.weight", p["token.weight"]).T


TWINS: dict[str, Twin] = {
    "mlp": _mlp,
    "mlp-tiny": _mlp,
    "mnist-cnn": _mnist_cnn,
    "convnet": _convnet,
    "gpt": _gpt,
    "gpt-tied": _gpt,
    "gpt-long": _gpt,
    "embedding": _embedding,
}


def _norms(jax: Any, grads: dict[str, Any]) -> Any:
    return jax.numpy.sqrt(sum((g**2).reshape(len(g), -1).sum(1) for g in grads.values()))


def _clipped(jax: Any, grads: dict[str, Any], max_norm: float) -> list[Any]:
    weights = jax.numpy.minimum(max_norm / _norms(jax, grads), 1.0)
    return [jax.numpy.tensordot(weights, g, 1) for g in grads.values()]


def _reduced(jax: Any, grads: dict[str, Any], quantity: str, max_norm: float) -> list[Any]:
    if quantity == "gradients":
        return list(grads.values())
    return [_norms(jax, grads)] if quantity == "norms" else _clipped(jax, grads, max_norm)


def twin(quantity: str) -> Prepare:
    """The workload's twin."""

    def prepare(task: Task) -> Runner:
        forward = TWINS.get(task.workload.name)
        if forward is None:
            raise Unavailable("no twin of this network in JAX")
        jax = importlib.import_module("jax")
        double = next(iter(task.params.values())).dtype == torch.float64

        def loss(p: dict[str, Any], x: Any, y: Any) -> Any:
            log_probs = jax.nn.log_softmax(forward(jax, p, x))
            return -jax.numpy.take_along_axis(log_probs, y[..., None], -1).mean()

        def step(p: dict[str, Any], x: Any, y: Any) -> list[Any]:
            # JAX sorts the keys of a dictionary.
            grads = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(p, x, y)
            return _reduced(jax, {name: grads[name] for name in names}, quantity, task.max_norm)

        names = list(task.params)
        with jax.enable_x64(double):
            args = jax.tree.map(lambda t: jax.numpy.asarray(t.numpy()), (task.params, task.x, task.y))
            run = jax.jit(step)

        def runner() -> list[Tensor]:
            with jax.enable_x64(double):
                return [torch.from_dlpack(answer) for answer in jax.block_until_ready(run(*args))]

        return runner

    return prepare
