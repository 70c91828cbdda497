"""Packed sequences. The samples of one run have equally long ones: a batch of unequal lengths is split by length."""

from __future__ import annotations

from typing import Any

import torch

from per_sample._batched import Batched, Plain, samples
from per_sample._registry import rule
from per_sample._values import agreed

aten = torch.ops.aten


@rule(aten._pack_padded_sequence.default)
def pack_padded_sequence(input: Any, lengths: Any, batch_first: bool) -> Any:
    """The sample axis goes to the features, which the op carries along."""
    n = samples(input, lengths)
    if type(lengths) is Batched:
        lengths = agreed(lengths.ctx, lengths.physical, "The lengths of a packed sequence", split=True)
    shared = type(input) is not Batched
    value = input.unsqueeze(-1).expand(*input.shape, n) if shared else input.physical.movedim(0, -1)
    data, batch_sizes = aten._pack_padded_sequence(value, lengths, batch_first)
    return data.movedim(-1, 0), Plain(batch_sizes)
