"""Modules, rules, options and checks, as a type checker sees them; see ``transforms.py``."""

from __future__ import annotations

from typing import assert_type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import per_sample
from per_sample import Batched, call_for_per_sample_grads, clipped_grad, explain, functional, load_back, per_sample_grad, set_grads
from per_sample.testing import assert_matches_reference, check_rule

x = torch.ones(5, 3)


class Two(nn.Module):
    def forward(self, x: Tensor, times: int) -> tuple[Tensor, int]:
        return x * times, times


# A module is called as its `forward` is.
assert_type(call_for_per_sample_grads(nn.Linear(3, 2))(x), Tensor)
assert_type(call_for_per_sample_grads(Two(), batch_size=5)(x, times=2), tuple[Tensor, int])
call_for_per_sample_grads(Two())(x, "2")  # type: ignore[arg-type]
call_for_per_sample_grads(x)  # type: ignore[arg-type]
some_module: nn.Module = Two()
call_for_per_sample_grads(some_module)(x, 2, anything=True)

# From a module to a function and back.
model = nn.Linear(3, 2)
loss = functional(model, F.cross_entropy)
assert_type(loss.params, dict[str, Tensor])
assert_type(loss.buffers, dict[str, Tensor])
assert_type(loss.frozen, dict[str, Tensor])
set_grads(model, clipped_grad(loss, 1.0)(loss.params, x, x))
load_back(model, {name: p - 0.1 for name, p in loss.params.items()})
per_sample_grad(loss)(list(loss.params.values()), x, x)  # type: ignore[arg-type]
functional(F.relu)  # type: ignore[arg-type]


# A rule keeps its type.
@per_sample.rule(torch.ops.aten.trace.default, override=True)
def trace(self: Batched) -> Tensor:
    return self.physical.diagonal(dim1=1, dim2=2).sum(-1)


assert_type(trace(Batched()), Tensor)
trace(3)  # type: ignore[arg-type]
per_sample.rule(torch.ops.aten.trace.default, overrride=True)  # type: ignore[call-arg]
assert_type(per_sample.physical(x, 5), Tensor)
check_rule(torch.ops.aten.mm.default, x, x.T, rtol=1e-3)
assert_matches_reference(lambda w, x: w @ x, x, x, chunk_size=2, atol=1e-3)
assert_matches_reference(lambda w, x: w @ x, x, x, chunk_size="2")  # type: ignore[arg-type]

with per_sample.options(scratch_bytes=2**20, split_batch=True) as settings:
    assert_type(settings.scratch_bytes, int)
per_sample.options(scratch=2**20)  # type: ignore[call-arg]

report = explain(loss)(loss.params, x, x)
assert_type(report, per_sample.Explanation)
assert_type(per_sample.grad.conv2d_weight(x, (4, 3, 3, 3), x, padding=1), Tensor)
