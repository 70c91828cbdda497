"""What a row of the tables of model families is: a model class, a tiny configuration, and one batch of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

Inputs = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One published architecture, unchanged, small enough for a loop over samples."""

    name: str
    # The class in `transformers`; its configuration class takes `config`.
    model: str
    config: Config
    # A batch `[n, ...]` of each tensor that the model takes; with "labels" the model returns the loss.
    inputs: Callable[[int], Inputs]
    # The same with samples of different lengths.
    padded: Callable[[int, int], Inputs] | None = None
    # Whether it runs in train mode as well; its configuration has no dropout then.
    train: bool = True
    # Whether it is a mixture of experts, which the library computes in several ways.
    experts: bool = False
    # Whether samples go different ways through the model.
    split: bool = False
    # What to change in the configuration for dropout.
    with_dropout: Config | None = None
    # As in `per_sample_grad`; the loss must not depend on the numbers drawn.
    randomness: str = "error"
    # The outputs that the loss of a model without labels is made of; all of them by default.
    outputs: tuple[str, ...] = ()

    def build(self, config: Config, experts: str | None) -> nn.Module:
        """The model with other settings, if any; no parameter or running average is at the value it starts from."""
        model_class = getattr(transformers, self.model)
        torch.manual_seed(sum(map(ord, self.name)))
        settings = model_class.config_class(**{**self.config, **config})
        if experts is not None:
            settings._experts_implementation = experts
        model = model_class(settings).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(torch.rand_like(buffer), alpha=0.1)
        return model


def family(
    name: str,
    model: str,
    inputs: Callable[[int], Inputs],
    base: Config | None = None,
    *,
    padded: Callable[[int, int], Inputs] | None = None,
    outputs: tuple[str, ...] = (),
    train: bool = True,
    experts: bool = False,
    split: bool = False,
    with_dropout: Config | None = None,
    randomness: str = "error",
    **config: Any,
) -> Family:
    """A row; what differs from the configuration `base` stands in keyword arguments."""
    return Family(name, model, {**(base or {}), **config}, inputs, padded, train, experts, split, with_dropout, randomness, outputs)
