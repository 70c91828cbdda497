"""Batches of the kinds of inputs that models take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from .families_model import Inputs

TOKENS = 61
LENGTH = 11


def tokens(n: int, length: int = LENGTH) -> Inputs:
    """Token ids; those below 4 stay free for padding, the end and the like."""
    return {"input_ids": torch.randint(4, TOKENS, (n, length))}


def language(n: int) -> Inputs:
    """Token ids that are their own labels."""
    ids = tokens(n)["input_ids"]
    return {"input_ids": ids, "labels": ids.clone()}


def masked_language(n: int, length: int = LENGTH) -> Inputs:
    """Token ids with other labels, some of them ignored."""
    labels = torch.randint(4, TOKENS, (n, length))
    labels[:, ::3] = -100
    return {**tokens(n, length), "labels": labels}


def questions(n: int) -> Inputs:
    """Token ids of which the first few, a different number in each sample, are looked at by all."""
    looked_at = torch.arange(LENGTH) < (1 + torch.arange(n) % 2)[:, None]
    return {**masked_language(n), "attention_mask": torch.ones(n, LENGTH), "global_attention_mask": looked_at.long()}


def classes(n: int) -> Inputs:
    """Token ids with one label in three."""
    return {**tokens(n), "labels": torch.randint(0, 3, (n,))}


def classes_with_end(n: int) -> Inputs:
    """The same, with the token that ends a text."""
    inputs = classes(n)
    inputs["input_ids"][:, -1] = 2
    return inputs


def translation(n: int) -> Inputs:
    """Token ids with a shorter sequence of labels."""
    return {**tokens(n), "labels": torch.randint(4, TOKENS, (n, 7))}


def padded(draw: Callable[[int], Inputs]) -> Callable[[int, int], Inputs]:
    """The same inputs with ends of different lengths masked out, from ``least`` tokens on, and their labels ignored."""

    def shortened(n: int, least: int) -> Inputs:
        inputs = draw(n)
        ids = inputs["input_ids"]
        mask = torch.arange(ids.shape[1]) < (ids.shape[1] - least - 2 * torch.arange(n))[:, None]
        inputs["input_ids"] = ids.where(mask, 0)
        inputs["attention_mask"] = mask.long()
        if "labels" in inputs and inputs["labels"].shape == ids.shape:
            inputs["labels"] = inputs["labels"].where(mask, -100)
        return inputs

    return shortened


def image(size: int, *, channels: int = 3, label: bool = True) -> Callable[[int], Inputs]:
    """Square images with one label in three."""

    def draw(n: int) -> Inputs:
        inputs = {"pixel_values": torch.randn(n, channels, size, size, dtype=torch.float64)}
        return {**inputs, "labels": torch.randint(0, 3, (n,))} if label else inputs

    return draw


def noisy_image(n: int) -> Inputs:
    """Images with the numbers that say which of their 16 patches are left out."""
    return {**image(16, label=False)(n), "noise": torch.rand(n, 16, dtype=torch.float64)}


def video(n: int) -> Inputs:
    """Four frames with one label in three."""
    return {"pixel_values": torch.randn(n, 4, 3, 16, 16, dtype=torch.float64), "labels": torch.randint(0, 3, (n,))}


def waves(n: int) -> Inputs:
    """Sound with a transcript."""
    return {"input_values": torch.randn(n, 160, dtype=torch.float64), "labels": torch.randint(1, 13, (n, 5))}


def sound(n: int) -> Inputs:
    """Sound and nothing else."""
    return {"input_values": torch.randn(n, 1, 160, dtype=torch.float64)}


def waves_classes(n: int) -> Inputs:
    """Sound with one label in three."""
    return {"input_values": torch.randn(n, 160, dtype=torch.float64), "labels": torch.randint(0, 3, (n,))}


def spectra(*shape: int, name: str = "input_features", label: int = 0) -> Callable[[int], Inputs]:
    """Spectrograms with a transcript, or one of ``label`` classes."""

    def draw(n: int) -> Inputs:
        labels = torch.randint(0, label, (n,)) if label else torch.randint(4, TOKENS, (n, 5))
        return {name: torch.randn(n, *shape, dtype=torch.float64), "labels": labels}

    return draw


def images_and_text(size: int, *, label: bool = False, places: int = 0) -> Callable[[int], Inputs]:
    """An image and a text about it; the first ``places`` tokens stand for the image."""

    def draw(n: int) -> Inputs:
        ids = torch.cat([torch.full((n, places), TOKENS - 1), torch.randint(4, TOKENS - 1, (n, LENGTH))], 1)
        inputs = {"input_ids": ids, "pixel_values": torch.randn(n, 3, size, size, dtype=torch.float64)}
        return {**inputs, "labels": ids.clone()} if label else inputs

    return draw


def series(n: int) -> Inputs:
    """Time series, what was observed of them, and their future."""
    return {
        "past_values": torch.rand(n, 10, dtype=torch.float64) + 0.5,
        "past_time_features": torch.rand(n, 10, 1, dtype=torch.float64),
        "past_observed_mask": (torch.rand(n, 10) > 0.2).double(),
        "future_values": torch.rand(n, 3, dtype=torch.float64),
        "future_time_features": torch.rand(n, 3, 1, dtype=torch.float64),
    }


def forecast(n: int) -> Inputs:
    """Two series side by side, and how they go on."""
    return {"past_values": torch.randn(n, 16, 2, dtype=torch.float64), "future_values": torch.randn(n, 3, 2, dtype=torch.float64)}


def decision(n: int) -> Inputs:
    """States, actions and returns of an agent."""
    return {
        "states": torch.randn(n, 4, 5, dtype=torch.float64), "actions": torch.randn(n, 4, 3, dtype=torch.float64),
        "rewards": torch.randn(n, 4, 1, dtype=torch.float64), "returns_to_go": torch.randn(n, 4, 1, dtype=torch.float64),
        "timesteps": torch.arange(4).expand(n, 4).clone(), "attention_mask": torch.ones(n, 4, dtype=torch.long),
    }  # fmt: skip
