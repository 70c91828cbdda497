"""Where the supported versions of torch differ, as far as the tests see it; ``docs/versions.md`` tells users."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# By name: the last version that lacks it, and what is lacking.
LACKING = {
    "grid_sample twice": ((2, 11), "the second derivative of `grid_sample`"),
    "compiled convolution": ((2, 11), "compiled code on the CPU (inductor) of clipped sums of the README's convolutional network"),
    "overrideable on meta": ((2, 11), "shapes (on the meta device) of the backward pass of attention for devices from outside torch"),
}

# From here on the fused attention kernel for the CPU takes inputs without a batch axis, too. Torch cannot differentiate it twice.
FUSED_WITHOUT_BATCH_AXIS = TORCH >= (2, 15)


def skip_if_lacking(name: str) -> None:
    """Skip the test where this version of torch lacks what it is about."""
    last, what = LACKING[name]
    if last >= TORCH:
        pytest.skip(f"torch {torch.__version__} lacks {what}")
