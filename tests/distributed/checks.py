"""What two processes must find together: run by torchrun, once for all checks; ``test_distributed.py`` reads the verdicts.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed/checks.py FOLDER

Every rank holds the whole batch too, and compares with a loop of plain autograd over it. A check is a function whose name begins with
``check_``; each rank writes a line for each check to a file of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

import per_sample as ps

N, WORLD = 11, 2
F64 = torch.float64
PLACEMENTS = {"plain": None, "replicated": Replicate(), "sharded": Shard(0)}


def data(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, dtype=F64, generator=generator), torch.randn(n, 3, dtype=F64, generator=generator)


def parameters():
    generator = torch.Generator().manual_seed(7)
    shapes = {"b": (5,), "v": (3, 5), "w": (5, 4)}
    return {name: torch.randn(shape, dtype=F64, generator=generator) for name, shape in shapes.items()}


def loss(params, x, y):
    return ((params["v"] @ (params["w"] @ x + params["b"]).tanh()) - y).square().sum()


def loop(fn, params, *samples):
    """Every sample's gradients, by plain autograd."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    columns = {name: [] for name in leaves}
    for one in zip(*samples, strict=True):
        for name, g in zip(leaves, torch.autograd.grad(fn(leaves, *one), list(leaves.values())), strict=True):
            columns[name].append(g)
    return {
        name: torch.stack(c) if c else p.new_zeros((0, *p.shape)) for (name, c), p in zip(columns.items(), params.values(), strict=True)
    }


def norms_of(grads):
    return sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()


def weighted(grads, weights):
    return {name: torch.einsum("n,n...->...", weights, g) for name, g in grads.items()}


def clipping(grads, bound):
    return (bound / norms_of(grads)).clamp(max=1)


def mesh():
    return init_device_mesh("cpu", (WORLD,))


def spread(x, *placements):
    return distribute_tensor(x, mesh() if len(placements) < 2 else init_device_mesh("cpu", (1, WORLD)), list(placements) or [Shard(0)])


def placed(params, placement):
    return params if placement is None else {name: spread(p, placement) for name, p in params.items()}


def whole(tree):
    return {name: whole(x) for name, x in tree.items()} if isinstance(tree, dict) else tree.full_tensor()


def same(found, expected, placements=None):
    """Equal numbers, of DTensors with these placements."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            same(found[name], x, placements)
        return
    assert isinstance(found, DTensor)
    assert placements is None or list(found.placements) == list(placements), found.placements
    assert found.shape == expected.shape
    torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-10, atol=1e-10)


def rank():
    return dist.get_rank()


# --- a row for each sample


def check_gradients():
    x, y = data()
    params = parameters()
    expected = loop(loss, params, x, y)
    for placement in PLACEMENTS.values():
        own = placed(params, placement)
        with CommDebugMode() as comm:
            grads, values = ps.per_sample_grad_and_value(loss, chunk_size=2)(own, spread(x), spread(y))
        # Parameters that are sharded are gathered, each once; nothing else is sent.
        gathers = len(params) if isinstance(placement, Shard) else 0
        counts = {str(op): count for op, count in comm.get_comm_counts().items() if count and "scatter_" not in str(op)}
        assert sum(count for op, count in counts.items() if "all_gather" in op) == gathers
        assert not any("reduce" in op for op in counts)
        same(grads, expected, [Shard(0)])
        same(values, torch.stack([loss(params, *one) for one in zip(x, y, strict=True)]), [Shard(0)])


def check_no_communication():
    x, y = data()
    batch = spread(x), spread(y)
    params = parameters()
    direction = {name: torch.randn(p.shape, dtype=F64, generator=torch.Generator().manual_seed(3)) for name, p in params.items()}
    with CommDebugMode() as comm:
        ps.per_sample_grad(loss)(params, *batch)
        ps.per_sample_grad_norm(loss)(params, *batch)
        ps.per_sample_grad_dot(loss, direction)(params, *batch)
        ps.projected_grad(loss, ps.GaussianProjector(6))(params, *batch)
        ps.per_sample_jacobian(lambda params, x, y: params["w"] @ x)(params, *batch)
    assert comm.get_total_counts() == 0


def check_rows():
    x, y = data()
    batch, params = (spread(x), spread(y)), parameters()
    expected = loop(loss, params, x, y)
    same(ps.per_sample_grad_norm(loss)(params, *batch), norms_of(expected), [Shard(0)])
    per_leaf = {name: g.flatten(1).abs().sum(1) for name, g in expected.items()}
    same(ps.per_sample_grad_norm(loss, ord=1, per_leaf=True)(params, *batch), per_leaf, [Shard(0)])
    direction = {name: torch.randn(p.shape, dtype=F64, generator=torch.Generator().manual_seed(3)) for name, p in params.items()}
    products = sum((expected[name] * direction[name]).flatten(1).sum(1) for name in params)
    for placement in PLACEMENTS.values():
        same(ps.per_sample_grad_dot(loss, placed(direction, placement))(params, *batch), products, [Shard(0)])
    largest = ps.per_sample_grad_map(loss, lambda grads: grads.materialize().abs().flatten(1).amax(1))(params, *batch)
    same(largest, {name: g.abs().flatten(1).amax(1) for name, g in expected.items()}, [Shard(0)])
    projector = ps.RademacherProjector(6, seed=2)
    same(ps.projected_grad(loss, projector)(params, *batch), ps.projected_grad(loss, projector)(params, x, y), [Shard(0)])


def check_jacobian():
    x, y = data()

    def outputs(params, x, y):
        return params["v"] @ (params["w"] @ x + params["b"]).tanh() - y

    expected = {}
    for i in range(3):
        for name, g in loop(lambda *args, i=i: outputs(*args)[i], parameters(), x, y).items():
            expected.setdefault(name, []).append(g)
    expected = {name: torch.stack(columns, 1) for name, columns in expected.items()}
    same(ps.per_sample_jacobian(outputs)(parameters(), spread(x), spread(y)), expected, [Shard(0)])
    first = {name: g[:1] for name, g in expected.items()}
    same(ps.per_sample_jacobian(outputs)(parameters(), spread(x[:1]), spread(y[:1])), first, [Shard(0)])


def check_auxiliary_values():
    x, y = data()

    def with_aux(params, x, y):
        return (loss(params, x, y), {"twice": 2 * x, "name": "a", "shared": params["b"]})

    _, aux = ps.per_sample_grad(with_aux, has_aux=True, chunk_size=4)(parameters(), spread(x), spread(y))
    assert aux["name"] == "a"
    same(aux["twice"], 2 * x, [Shard(0)])
    same(aux["shared"], parameters()["b"].expand(N, 5), [Shard(0)])


def check_another_sample_axis():
    x, y = data()
    expected = loop(loss, parameters(), x, y)
    grads = ps.per_sample_grad(loss, in_dims=(None, 1, 0))(parameters(), spread(x.T.contiguous(), Shard(1)), spread(y))
    same(grads, expected, [Shard(0)])
    # A parameter of which every sample has its own.
    own = torch.randn(N, 4, dtype=F64, generator=torch.Generator().manual_seed(5))

    def fn(own, x):
        return (own["p"] * x).prod() + own["p"].square().sum()

    expected = loop_own(fn, own, x)
    found = ps.per_sample_grad(fn, in_dims=(0, 0))({"p": spread(own)}, spread(x))
    same(found, {"p": expected}, [Shard(0)])
    same(ps.weighted_grad(fn, torch.ones(N), in_dims=(0, 0))({"p": spread(own)}, spread(x)), {"p": expected.sum(0)}, [Replicate()])


def loop_own(fn, own, x):
    return torch.stack([loop(fn, {"p": p}, s.unsqueeze(0))["p"][0] for p, s in zip(own, x, strict=True)])


def check_keyword_arguments():
    x, y = data()

    def fn(params, x, y, scale):
        return loss(params, x, y) * scale.sum()

    scale = torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    expected = loop(lambda params, x, y: fn(params, x, y, scale), parameters(), x, y)
    for own in (scale, spread(scale), spread(scale, Replicate())):
        same(ps.per_sample_grad(fn)(parameters(), spread(x), spread(y), scale=own), expected)


def check_replicated_batch():
    x, y = data()
    batch = spread(x, Replicate()), spread(y, Replicate())
    expected = loop(loss, parameters(), x, y)
    with CommDebugMode() as comm:
        grads = ps.per_sample_grad(loss)(parameters(), *batch)
        total = ps.weighted_grad(loss, torch.ones(N))(parameters(), *batch)
    assert comm.get_total_counts() == 0
    same(grads, expected, [Replicate()])
    same(total, weighted(expected, torch.ones(N, dtype=F64)), [Replicate()])


def check_two_axes_of_the_mesh():
    x, y = data()
    batch = spread(x, Replicate(), Shard(0)), spread(y, Replicate(), Shard(0))
    params = {name: spread(p, Replicate(), Shard(0)) for name, p in parameters().items()}
    expected = loop(loss, parameters(), x, y)
    same(ps.per_sample_grad(loss)(params, *batch), expected, [Replicate(), Shard(0)])
    weights = torch.arange(N, dtype=F64)
    same(ps.weighted_grad(loss, weights)(params, *batch), weighted(expected, weights), [Replicate(), Shard(0)])
    both = spread(x, Shard(0), Shard(0)), spread(y, Shard(0), Shard(0))
    same(ps.per_sample_grad(loss)(params, *both), expected, [Shard(0), Shard(0)])
    same(ps.weighted_grad(loss, weights)(parameters(), *both), weighted(expected, weights), [Replicate(), Replicate()])


# --- sums


def check_weighted_sums():
    x, y = data()
    expected = loop(loss, parameters(), x, y)
    weights = torch.linspace(-1, 2, N, dtype=F64)
    for placement in PLACEMENTS.values():
        params = placed(parameters(), placement)
        form = [placement or Replicate()]
        for own in (weights, spread(weights), spread(weights, Replicate())):
            same(ps.weighted_grad(loss, own)(params, spread(x), spread(y)), weighted(expected, weights), form)
        # Weights that depend on all samples' norms.
        share = torch.softmax(norms_of(expected), 0)
        for memory in ("fast", "low"):
            for chunk_size in (None, 2, 5, 6):
                of_norms = ps.weighted_grad(loss, lambda norms: torch.softmax(norms, 0), memory=memory, chunk_size=chunk_size)
                same(of_norms(params, spread(x), spread(y)), weighted(expected, share), form)


def check_clipped_sums():
    x, y = data()
    expected = loop(loss, parameters(), x, y)
    bound = float(norms_of(expected).median())
    padding = torch.arange(N) % 4 == 1
    for placement in PLACEMENTS.values():
        params = placed(parameters(), placement)
        form = [placement or Replicate()]
        for memory in ("fast", "low"):
            # Of 2 the ranks take as many chunks, of 5 one takes two and the other one.
            for chunk_size in (None, 2, 5):
                clipped = ps.clipped_grad(loss, bound, return_norms=True, normalize_by=4, memory=memory, chunk_size=chunk_size)
                found, norms = clipped(params, spread(x), spread(y))
                same(found, weighted(expected, clipping(expected, bound) / 4), form)
                same(norms, norms_of(expected), [Shard(0)])
                for mask in (padding, spread(padding)):
                    found, norms = clipped(params, spread(x), spread(y), is_padding=mask)
                    same(found, weighted(expected, torch.where(padding, 0, clipping(expected, bound)) / 4), form)
                    same(norms, torch.where(padding, 0, norms_of(expected)), [Shard(0)])


def check_padded_shards():
    x, y = data()
    expected = loop(loss, parameters(), x, y)
    for cut in (7, 11, 0):
        own = slice(cut) if rank() == 0 else slice(cut, None)
        size = torch.tensor(len(x[own]))
        dist.all_reduce(size, dist.ReduceOp.MAX)
        missing = int(size) - len(x[own])
        filled = [torch.cat([t[own], t.new_full((missing, *t.shape[1:]), torch.nan)]) for t in (x, y)]
        batch = [DTensor.from_local(t, mesh(), [Shard(0)]) for t in filled]
        is_padding = DTensor.from_local(torch.arange(int(size)) >= len(x[own]), mesh(), [Shard(0)])
        found = ps.clipped_grad(loss, 1.0)(parameters(), *batch, is_padding=is_padding)
        same(found, weighted(expected, clipping(expected, 1.0)), [Replicate()])


def check_clipping_by_groups():
    x, y = data()
    expected = loop(loss, parameters(), x, y)
    bounds = {"b": 0.5, "v": 1.5, "w": 2.5}
    result = {name: weighted({name: g}, clipping({name: g}, bounds[name]))[name] for name, g in expected.items()}
    found, norms = ps.clipped_grad(loss, bounds, return_norms=True)(parameters(), spread(x), spread(y))
    same(found, result, [Replicate()])
    same(norms, {name: norms_of({name: g}) for name, g in expected.items()}, [Shard(0)])
    automatic = ps.clipped_grad(loss, spread(torch.tensor(2.0, dtype=F64), Replicate()), automatic=True)(parameters(), spread(x), spread(y))
    same(automatic, weighted(expected, 2 / (norms_of(expected) + 0.01)))


def check_sums_reduce_once():
    x, y = data()
    batch, weights = (spread(x), spread(y)), torch.ones(N, dtype=F64)
    calls = {
        "weighted": ps.weighted_grad(loss, weights),
        "clipped": ps.clipped_grad(loss, 1.0, return_norms=True, chunk_size=2),
        "clipped, two passes": ps.clipped_grad(loss, 1.0, memory="low"),
        "map": ps.per_sample_grad_map(loss, lambda grads: grads.weighted_sum(), across="sum"),
        "second moment": ps.grad_second_moment(loss),
    }
    for name, call in calls.items():
        for placement in (None, Replicate(), Shard(0)):
            params = placed(parameters(), placement)
            with CommDebugMode() as comm:
                call(params, *batch)
            counts = {str(op).rsplit(".", 1)[-1]: count for op, count in comm.get_comm_counts().items() if count}
            if isinstance(placement, Shard):
                # One for each parameter in each direction.
                assert counts.pop("reduce_scatter_tensor") == 3, name
                assert counts.pop("all_gather_into_tensor") == 3, name
                counts.pop("all_reduce", None) if name == "second moment" else None
            else:
                assert counts.pop("all_reduce") == 1, name
            assert not counts, (name, counts)


def check_map_sums():
    x, y = data()
    expected = loop(loss, parameters(), x, y)
    for placement in PLACEMENTS.values():
        cubes = ps.per_sample_grad_map(loss, lambda grads: grads.materialize().pow(3).sum(0), across="sum", chunk_size=4)
        found = cubes(placed(parameters(), placement), spread(x), spread(y))
        same(found, {name: g.pow(3).sum(0) for name, g in expected.items()}, [placement or Replicate()])
        # Of another shape than the parameter's: no way to shard it follows from that.
        large = ps.per_sample_grad_map(loss, lambda grads: (grads.materialize() > 1).flatten(1).sum(1).bincount(minlength=30), across="sum")
        found = large(placed(parameters(), placement), spread(x), spread(y))
        same(found, {name: (g > 1).flatten(1).sum(1).bincount(minlength=30) for name, g in expected.items()}, [Replicate()])
    seen = ps.per_sample_grad_map(loss, lambda grads: (grads.materialize() > 3).any(0), across="sum")(parameters(), spread(x), spread(y))
    same(seen, {name: (g > 3).any(0) for name, g in expected.items()}, [Replicate()])


def check_complex_and_half_precision():
    x, _ = data()
    w = torch.randn(4, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))

    def fn(params, x):
        return (params["w"] * x).sum().abs().square() + params["h"].float().square().sum() * x[0].float()

    h = torch.randn(6, generator=torch.Generator().manual_seed(2)).bfloat16()
    params = {"h": h, "w": w}
    expected = ps.weighted_grad(fn, torch.ones(N))(params, x)
    assert expected["h"].dtype == torch.float32
    for placement in PLACEMENTS.values():
        found = ps.weighted_grad(fn, torch.ones(N))(placed(params, placement), spread(x))
        assert {name: g.dtype for name, g in found.items()} == {name: g.dtype for name, g in expected.items()}
        torch.testing.assert_close(whole(found), expected)
    torch.testing.assert_close(whole(ps.grad_variance(fn)(params, spread(x))), ps.grad_variance(fn)(params, x))


def check_samples_that_are_not_finite():
    x, y = data()
    x[8] = torch.nan
    expected = loop(loss, parameters(), x, y)
    kept = {name: g[torch.arange(N) != 8] for name, g in expected.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = ps.clipped_grad(loss, 1.0)(parameters(), spread(x), spread(y))
    same(found, weighted(kept, clipping(kept, 1.0)))
    assert [w.category for w in caught if w.category is ps.NonFiniteWarning] == [ps.NonFiniteWarning] * rank()


# --- statistics


def check_statistics():
    for n in (N, 2, 1):
        x, y = data(n)
        expected = loop(loss, parameters(), x, y)
        for placement in PLACEMENTS.values():
            params, batch, form = placed(parameters(), placement), (spread(x), spread(y)), [placement or Replicate()]
            for chunk_size in (None, 2, 5):
                moment = ps.grad_second_moment(loss, chunk_size=chunk_size)(params, *batch)
                same(moment, {name: g.square().mean(0) for name, g in expected.items()}, form)
                if n > 1:
                    variance = ps.grad_variance(loss, chunk_size=chunk_size)(params, *batch)
                    same(variance, {name: g.var(0) for name, g in expected.items()}, form)
                    scale = ps.gradient_noise_scale(loss, chunk_size=chunk_size)(params, *batch)
                    trace = sum(g.var(0).sum() for g in expected.values())
                    same(scale, trace / (sum(g.mean(0).square().sum() for g in expected.values()) - trace / n), [Replicate()])
            if n == 1:
                assert all(v.full_tensor().isnan().all() for v in ps.grad_variance(loss)(params, *batch).values())


def check_variance_far_from_zero():
    # Equal up to the last digits: a difference of sums of squares would have none left.
    x = 1e6 + torch.arange(N, dtype=F64).unsqueeze(1) * torch.tensor([1.0, 2.0, 3.0])
    variance = ps.grad_variance(lambda params, x: (params["p"] * x).sum())({"p": torch.zeros(3, dtype=F64)}, spread(x))
    torch.testing.assert_close(variance["p"].full_tensor(), x.var(0), rtol=1e-12, atol=0)


# --- products of all pairs


def check_grams():
    x, y = data()
    u, v = data(7, seed=1)
    flat, others = (torch.cat([g.flatten(1) for g in loop(loss, parameters(), *batch).values()], 1) for batch in ((x, y), (u, v)))
    for placement in PLACEMENTS.values():
        params = placed(parameters(), placement)
        for chunk_size in (None, 2, 5):
            same(ps.grad_gram(loss, chunk_size=chunk_size)(params, spread(x), spread(y)), flat @ flat.T, [Shard(0)])
            for place in (Replicate(), Shard(0)):
                between = ps.grad_gram(loss, chunk_size=chunk_size, other=(spread(u, place), spread(v, place)))
                same(between(params, spread(x), spread(y)), flat @ others.T, [Shard(0)])
    same(ps.grad_gram(loss)(parameters(), spread(x[:1]), spread(y[:1])), (flat @ flat.T)[:1, :1], [Shard(0)])
    with pytest.raises(ps.UnsupportedError, match="plain tensor"):
        ps.grad_gram(loss, other=(u, v))(parameters(), spread(x), spread(y))
    with pytest.raises(ps.UnsupportedError, match="random numbers"):
        ps.grad_gram(loss, randomness="different")(parameters(), spread(x), spread(y))


# --- few samples


def check_ranks_without_samples():
    for n in (0, 1):
        x, y = data(n)
        batch, expected = (spread(x), spread(y)), loop(loss, parameters(), x, y)
        for placement in PLACEMENTS.values():
            params, form = placed(parameters(), placement), [placement or Replicate()]
            same(ps.per_sample_grad(loss)(params, *batch), expected, [Shard(0)])
            same(ps.per_sample_grad_norm(loss)(params, *batch), norms_of(expected), [Shard(0)])
            same(ps.weighted_grad(loss, torch.ones(n))(params, *batch), weighted(expected, torch.ones(n, dtype=F64)), form)
            same(ps.weighted_grad(loss, lambda norms: norms / 2)(params, *batch), weighted(expected, norms_of(expected) / 2), form)
            for memory in ("fast", "low"):
                clipped = ps.clipped_grad(loss, 0.5, memory=memory, chunk_size=1)(params, *batch)
                same(clipped, weighted(expected, clipping(expected, 0.5)), form)
        assert ps.grad_gram(loss)(parameters(), *batch).shape == (n, n)
        moments = ps.grad_second_moment(loss)(parameters(), *batch)
        assert all(bool(m.full_tensor().isnan().all()) == (n == 0) for m in moments.values())


def check_samples_that_go_different_ways():
    x, y = data()

    def fn(params, x, y):
        return loss(params, x, y) if x[0] > 0 else loss(params, x, y).sqrt()

    expected = loop(fn, parameters(), x, y)
    # Sorted, so that those of one rank agree and those of the other do not.
    order = x[:, 0].argsort(descending=True)
    x, y, expected = x[order], y[order], {name: g[order] for name, g in expected.items()}
    with ps.options(split_batch=True):
        same(ps.per_sample_grad(fn)(parameters(), spread(x), spread(y)), expected)
        share = torch.softmax(norms_of(expected), 0)
        found = ps.weighted_grad(fn, lambda norms: torch.softmax(norms, 0))(placed(parameters(), Shard(0)), spread(x), spread(y))
        same(found, weighted(expected, share))


# --- plain tensors and all_reduce


def check_data_parallel():
    x, y = data()
    expected = loop(loss, parameters(), x, y)
    bound = float(norms_of(expected).median())
    clipped = ps.clipped_grad(loss, bound, chunk_size=3)
    result = weighted(expected, clipping(expected, bound))
    padding = torch.arange(N) % 5 == 2
    drawn = torch.rand(N, generator=torch.Generator().manual_seed(4)) < 0.5
    for cut in (7, 11, 0):
        own = slice(cut) if rank() == 0 else slice(cut, None)
        reduced(clipped(parameters(), x[own], y[own]), result)
        masked = weighted(expected, torch.where(padding, 0, clipping(expected, bound)))
        reduced(clipped(parameters(), x[own], y[own], is_padding=padding[own]), masked)
        sampled = drawn[own]
        reduced(
            clipped(parameters(), x[own][sampled], y[own][sampled]), weighted(expected, torch.where(drawn, clipping(expected, bound), 0))
        )


def reduced(grads, expected):
    for name, g in grads.items():
        dist.all_reduce(g)
        torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-12)


# --- derivatives and random numbers


def check_derivatives():
    x, y = data()
    reference = {name: p.requires_grad_() for name, p in parameters().items()}
    plain = ps.per_sample_grad(loss)(reference, x, y)["w"].pow(3).sum()
    clipped = ps.clipped_grad(loss, 1.0)(reference, x, y)["v"].square().sum()
    expected = torch.autograd.grad(plain, reference.values(), retain_graph=True), torch.autograd.grad(clipped, reference.values())
    for placement in PLACEMENTS.values():
        params = {name: p.detach().requires_grad_() for name, p in placed(parameters(), placement).items()}
        batch = spread(x), spread(y)
        found = ps.per_sample_grad(loss)(params, *batch)["w"].full_tensor().pow(3).sum()
        sums = ps.clipped_grad(loss, 1.0)(params, *batch)["v"].full_tensor().square().sum()
        for value, derivatives in zip((found, sums), expected, strict=True):
            for g, e in zip(torch.autograd.grad(value, params.values()), derivatives, strict=True):
                torch.testing.assert_close(g.full_tensor() if isinstance(g, DTensor) else g, e, rtol=1e-9, atol=1e-9)


def check_random_numbers():
    x, _ = data()

    def fn(params, x):
        return (torch.rand((), dtype=F64) * params["p"]).sum()

    params = {"p": torch.ones(1, dtype=F64)}
    for seed in (0, rank()):
        torch.manual_seed(seed)
        different = ps.per_sample_grad(fn, randomness="different")
        drawn = torch.cat([different(params, spread(x))["p"].full_tensor() for _ in range(3)]).flatten()
        assert len(drawn.unique()) == 3 * N, drawn
        again = ps.per_sample_grad(fn, randomness="different", chunk_size=2)(params, spread(x))["p"].full_tensor()
        assert len(torch.cat([drawn, again.flatten()]).unique()) == 4 * N
        alike = ps.per_sample_grad(fn, randomness="same", chunk_size=2)(params, spread(x))["p"].full_tensor()
        assert len(alike.unique()) == 1
    torch.manual_seed(5)
    low = ps.clipped_grad(lambda params, x: fn(params, x).square(), 10.0, randomness="different", memory="low")(params, spread(x))
    torch.manual_seed(5)
    fast = ps.clipped_grad(lambda params, x: fn(params, x).square(), 10.0, randomness="different")(params, spread(x))
    torch.testing.assert_close(low["p"].full_tensor(), fast["p"].full_tensor())


# --- refusals


def check_refusals():
    x, y = data()
    params = parameters()
    grad, batch = ps.per_sample_grad(loss), (spread(x), spread(y))
    refused = partial(pytest.raises, ps.UnsupportedError)
    with refused(match="Argument 2 is batched and a plain tensor"):
        grad(params, batch[0], y)
    for placement in (Replicate(), Shard(0)):
        with refused(match="Argument 1 is batched and a plain tensor"):
            grad(placed(params, placement), x, y)
    partially = DTensor.from_local(x, mesh(), [Partial()])
    with refused(match="sample axis"):
        grad(params, partially, batch[1])
    with refused(match="sample axis"):
        grad(params, spread(x, Shard(1)), batch[1])
    with refused(match="other ranks"):
        grad(params, batch[0], spread(y, Replicate()))
    with refused(match="Argument 0 has a DTensor with placements"):
        grad({**params, "b": DTensor.from_local(params["b"], mesh(), [Partial()])}, *batch)
    turned = init_device_mesh("cpu", (1, WORLD))
    with refused(match="another mesh"):
        grad({**params, "b": distribute_tensor(params["b"], turned, [Replicate(), Replicate()])}, *batch)
    with refused(match="another mesh"):
        grad(params, batch[0], distribute_tensor(y, turned, [Replicate(), Shard(0)]))
    with pytest.raises(ps.ArgumentError, match="each of the 11 samples"):
        ps.weighted_grad(loss, torch.ones(6))(params, *batch)
    with pytest.raises(ps.ArgumentError, match="each of the 11 samples"):
        ps.clipped_grad(loss, 1.0)(params, *batch, is_padding=torch.zeros(6, dtype=torch.bool))
    with refused(match="`weights` has a DTensor with placements"):
        ps.weighted_grad(loss, DTensor.from_local(torch.ones(N), mesh(), [Partial()]))(params, *batch)
    for call in (
        ps.weighted_grad(loss, spread(torch.ones(N))),
        ps.per_sample_grad_dot(loss, placed(params, Shard(0))),
        ps.clipped_grad(loss, spread(torch.tensor(1.0), Replicate())),
        partial(ps.clipped_grad(loss, 1.0), is_padding=spread(torch.zeros(N, dtype=torch.bool))),
    ):
        with refused(match="batch (is|does) not"):
            call(params, x, y)
    for around in (
        lambda: torch.func.grad(lambda p: ps.per_sample_grad_norm(loss)(p, *batch).full_tensor().sum())(params),
        lambda: torch.func.grad(lambda p: ps.per_sample_grad_norm(loss)(p, *batch).full_tensor().sum())(placed(params, Replicate())),
        lambda: torch.func.grad(lambda *batch: ps.per_sample_grad_norm(loss)(params, *batch).full_tensor().sum(), (0, 1))(*batch),
        lambda: torch.func.vmap(lambda b: ps.per_sample_grad_norm(loss)({**params, "b": b}, *batch).full_tensor())(torch.ones(2, 5)),
    ):
        with refused(match=r"torch\.func"):
            around()
    packed = nn.utils.rnn.pack_sequence([torch.ones(k, 2) for k in (3, 2, 2)])
    packed = nn.utils.rnn.PackedSequence(spread(packed.data, Replicate()), packed.batch_sizes)
    with refused(match="PackedSequence"):
        ps.per_sample_grad(lambda params, s: s.data.sum() * params["b"].sum())(params, packed)
    with pytest.raises(ps.BatchSizeError, match="disagree"):
        grad(params, batch[0], spread(y[:10]))


def check_shards_of_other_sizes():
    x, y = data()
    own = slice(7) if rank() == 0 else slice(7, None)
    told = [DTensor.from_local(t[own], mesh(), [Shard(0)], shape=t.shape, stride=t.stride()) for t in (x, y)]
    with pytest.raises(ps.BatchSizeError, match="should hold"):
        ps.per_sample_grad(loss)(parameters(), *told)
    # Each rank takes the other's part to be as large as its own.
    untold = [DTensor.from_local(t[own], mesh(), [Shard(0)]) for t in (x, y)]
    of_norms = partial(ps.weighted_grad, weights=lambda norms: norms)
    for transform in (ps.grad_second_moment, ps.grad_variance, ps.gradient_noise_scale, ps.grad_gram, of_norms):
        with pytest.raises(ps.BatchSizeError, match="hold 11 together"):
            transform(loss)(parameters(), *untold)
    # What does not depend on the number is right.
    expected = loop(loss, parameters(), x, y)
    same(ps.clipped_grad(loss, 1.0)(parameters(), *untold), weighted(expected, clipping(expected, 1.0)))


def check_compiled_code_around():
    x, y = data()
    expected = loop(loss, parameters(), x, y)
    calls = {
        ps.weighted_grad(loss, torch.ones(N)): weighted(expected, torch.ones(N, dtype=F64)),
        ps.clipped_grad(loss, 1.0, memory="low"): weighted(expected, clipping(expected, 1.0)),
        ps.grad_gram(loss): sum(g.flatten(1) @ g.flatten(1).T for g in expected.values()),
    }
    for call, result in calls.items():
        # The transform itself is left out of the graph.
        same(torch.compile(partial(call), backend="eager")(parameters(), spread(x), spread(y)), result)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="should not be traced"):
        torch.compile(ps.per_sample_grad(loss), backend="eager", fullgraph=True)(parameters(), spread(x), spread(y))


# --- modules


def module():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def module_loss(m, params, x, y):
    return F.mse_loss(torch.func.functional_call(m, params, (x.unsqueeze(0),)), y.unsqueeze(0))


def check_fsdp():
    x, y = data()
    for parts in (lambda m: [m], lambda m: [m[0], m[2], m]):
        plain = module()
        reference = ps.functional(plain, F.mse_loss)
        expected = loop(partial(module_loss, plain), reference.params, x, y)
        sharded = module()
        for part in parts(sharded):
            fully_shard(part, mesh=mesh())
        optimizer = torch.optim.SGD(sharded.parameters(), lr=0.25)
        fn = ps.functional(sharded, F.mse_loss)
        batch = spread(x), spread(y)
        result = weighted(expected, clipping(expected, 0.5))
        for _ in range(2):
            grads = ps.clipped_grad(fn, 0.5, chunk_size=5)(fn.params, *batch)
            same(grads, result, [Shard(0)])
            same(ps.per_sample_grad(fn)(fn.params, *batch), expected, [Shard(0)])
            # The module's own forward pass leaves some of its parameters whole.
            with torch.no_grad():
                torch.testing.assert_close(sharded(x), plain(x))
        ps.set_grads(sharded, grads)
        optimizer.step()
        stepped = {name: p - 0.25 * result[name] for name, p in reference.params.items()}
        same({name: p.detach() for name, p in sharded.named_parameters()}, stepped, [Shard(0)])
        ps.load_back(sharded, {name: p + 0.25 * grads[name] for name, p in fn.params.items()})
        same(fn.params, reference.params, [Shard(0)])
        # And it still trains the usual way.
        sharded(x).square().sum().backward()


def check_fsdp_with_frozen_parameters():
    x, y = data()
    plain, sharded = module(), module()
    for m in (plain, sharded):
        m[0].requires_grad_(False)
    for part in (sharded[0], sharded):
        fully_shard(part, mesh=mesh())
    fn, reference = ps.functional(sharded, F.mse_loss), ps.functional(plain, F.mse_loss)
    expected = ps.per_sample_grad(reference)(reference.params, x, y)
    assert expected.keys() == {"2.weight", "2.bias"}
    same(ps.per_sample_grad(fn, chunk_size=5)(fn.params, spread(x), spread(y)), expected, [Shard(0)])
    flat = torch.cat([g.flatten(1) for g in expected.values()], 1)
    same(ps.grad_gram(fn)(fn.params, spread(x), spread(y)), flat @ flat.T, [Shard(0)])


def check_closed_over():
    x, y = data()
    held = spread(torch.ones(3, dtype=F64), Replicate())
    with pytest.raises(ps.UnsupportedError, match="function closes over"):
        ps.per_sample_grad(lambda params, x, y: loss(params, x, y * held))(parameters(), spread(x), spread(y))


def main():
    folder = Path(sys.argv[1])
    only = sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with (folder / f"rank{rank()}.jsonl").open("w") as file:
        for name, check in list(globals().items()):
            if name.startswith("check_") and (not only or name in only):
                try:
                    check()
                    verdict = "ok"
                except BaseException:
                    verdict = traceback.format_exc()
                file.write(json.dumps({"check": name, "verdict": verdict}) + "\n")
                file.flush()
                if verdict != "ok":
                    # The ranks no longer agree about what comes next; torchrun ends the other one.
                    sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
