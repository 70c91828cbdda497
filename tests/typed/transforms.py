"""A wrapped function takes what the function takes, and returns what its transform promises.

A type checker reads this file; nothing runs it. Lines marked with an error must be refused: an error that does not come is one, too.
"""

from __future__ import annotations

from functools import partial
from typing import Any, assert_type

import torch
from torch import Tensor

import per_sample as ps
from per_sample import LeafGrads, reference

Params = dict[str, Tensor]


def loss(params: Params, x: Tensor, y: int, *, scale: float = 1.0) -> Tensor:
    return (x @ params["w"])[y] * scale


def with_aux(params: Params, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (x @ params["w"]).sum(), {"x": x}


def len_of_text(text: str) -> Tensor:
    return torch.tensor(len(text))


params: Params = {"w": torch.ones(3, 2)}
x = torch.ones(5, 3)
flag = bool(x.sum())

# What is returned.
assert_type(ps.per_sample_grad(loss)(params, x, 1, scale=2.0), Any)
assert_type(ps.per_sample_grad_and_value(loss)(params, x, 1), tuple[Any, Tensor])
assert_type(ps.per_sample_grad_and_value(with_aux, has_aux=True)(params, x), tuple[Any, Any])
assert_type(ps.per_sample_grad_norm(loss, ord=1, chunk_size=2)(params, x, 1), Tensor)
assert_type(ps.per_sample_grad_norm(loss, per_leaf=True)(params, x, 1), Any)
assert_type(ps.per_sample_grad_norm(with_aux, has_aux=True)(params, x), Any)
assert_type(ps.per_sample_grad_norm(loss, per_leaf=flag)(params, x, 1), Any)
assert_type(ps.per_sample_grad_dot(loss, params)(params, x, 1), Tensor)
assert_type(ps.per_sample_grad_dot(with_aux, params, has_aux=flag)(params, x), Any)
assert_type(ps.grad_gram(loss, other=(x, 1))(params, x, 1), Tensor)
assert_type(ps.grad_gram(with_aux, has_aux=True)(params, x), Any)
assert_type(ps.projected_grad(loss, ps.GaussianProjector(4))(params, x, 1), Tensor)
assert_type(ps.projected_grad(with_aux, ps.GaussianProjector(4), has_aux=True)(params, x), Any)
assert_type(ps.gradient_noise_scale(loss)(params, x, 1), Tensor)
assert_type(ps.gradient_noise_scale(with_aux, has_aux=True)(params, x), Any)

# What is taken: two wrong calls of each, one by type and one by name.
ps.per_sample_grad(loss)(params, x, "1")  # type: ignore[arg-type]
ps.per_sample_grad(loss)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.per_sample_grad_and_value(loss)(params, x, "1")  # type: ignore[arg-type]
ps.per_sample_grad_and_value(loss)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.per_sample_grad_norm(loss)(params, x, "1")  # type: ignore[arg-type]
ps.per_sample_grad_norm(loss, per_leaf=True)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.weighted_grad(loss, x[:, 0])(params, x, "1")  # type: ignore[arg-type]
ps.weighted_grad(loss, lambda norms: 1 / norms)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.grad_second_moment(loss)(params, x, "1")  # type: ignore[arg-type]
ps.grad_second_moment(loss)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.grad_variance(loss)(params, x, "1")  # type: ignore[arg-type]
ps.grad_variance(loss)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.gradient_noise_scale(loss)(params, x, "1")  # type: ignore[arg-type]
ps.gradient_noise_scale(loss)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.per_sample_grad_dot(loss, params)(params, x, "1")  # type: ignore[arg-type]
ps.per_sample_grad_dot(loss, params)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.grad_gram(loss)(params, x, "1")  # type: ignore[arg-type]
ps.grad_gram(loss)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.projected_grad(loss, ps.SparseProjector(4))(params, x, "1")  # type: ignore[arg-type]
ps.projected_grad(loss, ps.SparseProjector(4))(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.per_sample_jacobian(loss)(params, x, "1")  # type: ignore[arg-type]
ps.per_sample_jacobian(loss)(params, x, 1, scales=2.0)  # type: ignore[call-arg]
ps.per_sample_grad_map(loss, LeafGrads.norm)(params, x, "1")  # type: ignore[arg-type]
ps.per_sample_grad_map(loss, LeafGrads.norm)(params, x, 1, scales=2.0)  # type: ignore[call-arg]

# A clipped sum takes the padding by name, too.
clipped = ps.clipped_grad(loss, max_norm=1.0)
clipped(params, x, 1, scale=2.0)
clipped(params, x, 1, is_padding=x[:, 0] > 0)
clipped(params, x, "1")  # type: ignore[call-overload]
clipped(params, x, 1, scales=2.0)  # type: ignore[call-overload]
clipped(params, x, 1, is_padding=[True, False])  # type: ignore[call-overload]
assert_type(clipped.sensitivity("replace_one"), float)

# The options.
ps.per_sample_grad(loss, chunksize=2)  # type: ignore[call-arg]
ps.per_sample_grad(loss, (0, 1), (None, 0, None), keep_batch_dim=True, chunk_size=None, randomness="same")
ps.per_sample_grad_norm(loss, chunk_size="2")  # type: ignore[call-overload]
ps.per_sample_grad_norm(loss, chunksize=2)  # type: ignore[call-overload]
ps.per_sample_grad(3)  # type: ignore[arg-type]
ps.per_sample_grad_map(loss, len_of_text)  # type: ignore[arg-type]
ps.per_sample_grad_map(loss, lambda grads, towards: grads.dot(towards), trees=(params,))(params, x, 1)
ps.projected_grad(loss, "gaussian")  # type: ignore[call-overload]


# Whatever can be called.
class Loss:
    def __call__(self, params: Params, x: Tensor) -> Tensor:
        return x @ params["w"]

    def method(self, params: Params, x: Tensor) -> Tensor:
        return x @ params["w"]


ps.per_sample_grad(Loss())(params, x)
ps.per_sample_grad(Loss())(x, x)  # type: ignore[arg-type]
ps.per_sample_grad(Loss().method)(params, x)
ps.per_sample_grad(Loss().method)(x, x)  # type: ignore[arg-type]
assert_type(ps.per_sample_grad_norm(lambda w, x: w @ x)(x, x), Tensor)
assert_type(ps.per_sample_grad_norm(partial(loss, scale=2.0))(params, x, 1), Tensor)
ps.per_sample_grad(ps.per_sample_grad_norm(loss))(params, x, 1)
ps.per_sample_grad(ps.per_sample_grad_norm(loss))(params, x, "1")  # type: ignore[arg-type]

# The reference keeps the signature as well.
reference.per_sample_grad(loss)(params, x, 1, scale=2.0)
reference.per_sample_grad(loss)(params, x, "1")  # type: ignore[arg-type]
reference.clipped_grad(loss, 1.0)(params, x, 1, is_padding=None)
reference.clipped_grad(loss, 1.0)(params, x, "1")  # type: ignore[call-overload]
reference.per_sample_grad_norm(loss)(params, x, "1")  # type: ignore[arg-type]
reference.grad_gram(loss)(params, x, "1")  # type: ignore[arg-type]
