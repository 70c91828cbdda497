"""Train a digit classifier with differential privacy on several processes: the same numbers as on one.

    python examples/distributed.py                                              # alone
    torchrun --standalone --nproc-per-node 2 examples/distributed.py            # on two processes
    torchrun --standalone --nproc-per-node 2 examples/distributed.py --sharded  # with the parameters sharded, too

The data are scikit-learn's digits: 1,797 handwritten digits of 8 by 8 pixels, of which a fifth is held out. A step is DP-SGD (Abadi et
al., 2016): each sample is in the batch with probability 1/8, whatever the others are; the sum of its clipped gradients gets Gaussian
noise; the sum is divided by the batch size that is expected.

- By default every process holds all parameters and clips the gradients of its own samples. Their numbers differ from process to process
  and step to step, and may be zero. One ``all_reduce`` adds up the sums, to one of which the noise was added before.
- With ``--sharded`` torch's ``fully_shard`` spreads the parameters, and the batch is a ``DTensor``. The clipped sum comes back sharded
  as the parameters are, already reduced, and the optimizer works on the shards.

Either way the processes must agree on what is drawn: here all draw the same numbers from one seed and use their part. What
``examples/dp_sgd.py`` says about what privacy covers, and what not, holds here, too. A seed is for experiments: where the noise must be
secret, draw it in one process and from the operating system.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, NamedTuple

import dp_accounting
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from per_sample import clipped_grad, functional, set_grads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

RATE = 1 / 8
MAX_NORM = 1.0
LEARNING_RATE = 1.0
DELTA = 1e-4


class Data(NamedTuple):
    images: Tensor  # [n, 1, 8, 8], from -1 to 1
    labels: Tensor  # [n]

    def of(self, index: Tensor) -> Data:
        return Data(self.images[index], self.labels[index])


def load(generator: torch.Generator) -> tuple[Data, Data]:
    """The training set and the test set."""
    digits = load_digits()
    data = Data(torch.from_numpy(digits.images).float().sub(8).div(8).unsqueeze(1), torch.from_numpy(digits.target).long())
    held_out, kept = torch.randperm(len(data.labels), generator=generator).tensor_split([len(data.labels) // 5])
    return data.of(kept), data.of(held_out)


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


# --- one step of each kind: the noisy sum, as the optimizer of this process wants it


class Replicated:
    """Every process has all parameters and its own samples."""

    def __init__(self, model: nn.Module, expected: float) -> None:
        self.loss = functional(model, F.cross_entropy)
        self.clipped = clipped_grad(self.loss, MAX_NORM, normalize_by=expected)

    def grads(self, batch: Data, noise: dict[str, Tensor]) -> dict[str, Tensor]:
        rank, world = dist.get_rank(), dist.get_world_size()
        own = slice(rank, None, world)
        grads = self.clipped(self.loss.params, batch.images[own], batch.labels[own])
        for name, g in grads.items():
            if rank == 0:
                g += noise[name]
            dist.all_reduce(g)
        return grads


class Sharded:
    """Every process has a part of each parameter, and of each batch."""

    def __init__(self, model: nn.Module, expected: float, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.loss = functional(fully_shard(model, mesh=mesh), F.cross_entropy)
        self.clipped = clipped_grad(self.loss, MAX_NORM, normalize_by=expected)

    def grads(self, batch: Data, noise: dict[str, Tensor]) -> dict[str, Tensor]:
        # All processes drew the same batch and the same noise: each takes its part, and nothing is sent.
        images, labels = (distribute_tensor(x, self.mesh, [Shard(0)], src_data_rank=None) for x in batch)
        grads: dict[str, DTensor] = self.clipped(self.loss.params, images, labels)
        return {name: g + distribute_tensor(noise[name], self.mesh, g.placements, src_data_rank=None) for name, g in grads.items()}


# --- privacy


def _event(noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
    step = dp_accounting.PoissonSampledDpEvent(RATE, dp_accounting.GaussianDpEvent(noise_multiplier))
    return dp_accounting.SelfComposedDpEvent(step, steps)


def _accountant() -> dp_accounting.pld.PLDAccountant:
    # Coarser than the default and many times as fast; it rounds epsilon up.
    return dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)


# --- command line


def train(options: argparse.Namespace) -> str:
    generator = torch.Generator().manual_seed(options.seed)
    train_set, test_set = load(generator)
    n, world = len(train_set.labels), dist.get_world_size()
    steps = options.epochs * round(1 / RATE)
    model = build(options.seed)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    mesh = init_device_mesh("cpu", (world,))
    kind = Sharded(model, RATE * n, mesh) if options.sharded else Replicated(model, RATE * n)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    std = options.noise * kind.clipped.sensitivity()
    for _ in range(steps):
        drawn = (torch.rand(n, generator=generator, dtype=torch.float64) < RATE).nonzero().squeeze(1)
        noise = {name: std * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        set_grads(model, kind.grads(train_set.of(drawn), noise))
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(test_set.images).argmax(-1) == test_set.labels).float().mean().item()
    spent = _accountant().compose(_event(options.noise, steps)).get_epsilon(DELTA)
    processes = f"{world} process{'es' if world > 1 else ''}, parameters {'sharded' if options.sharded else 'on each'}"
    return f"{processes}, {steps} steps: test accuracy {accuracy:.1%} at epsilon {spent:.2f}, delta {DELTA:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a digit classifier with differential privacy on several processes.")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--noise", type=float, default=1.5, help="the noise multiplier; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; default: %(default)s")
    parser.add_argument("--sharded", action="store_true", help="shard the parameters with fully_shard, and the batch as a DTensor")
    options = parser.parse_args()
    if options.epochs < 1 or not options.noise > 0:
        parser.error("--epochs must be at least 1, and --noise positive")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        verdict = train(options)
        if dist.get_rank() == 0:
            print(verdict)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
