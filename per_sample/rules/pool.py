"""Pooling, padding, resampling: ops with a batch axis of their own, which takes the samples in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from per_sample._batched import Batched, context_of, physical, samples, wrap
from per_sample._combinators import fold
from per_sample._registry import register, rule

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from per_sample._batched import Context

aten = torch.ops.aten

# By the rank of one image without its batch axis: channels and positions.
_FOLDED = {
    2: (
        aten.reflection_pad1d.default,
        aten.reflection_pad1d_backward.default,
        aten.replication_pad1d.default,
        aten.replication_pad1d_backward.default,
        aten.upsample_nearest1d.default,
        aten.upsample_nearest1d_backward.default,
        aten._upsample_nearest_exact1d.default,
        aten._upsample_nearest_exact1d_backward.default,
        aten.upsample_linear1d.default,
        aten.upsample_linear1d_backward.default,
        aten.col2im.default,
    ),
    3: (
        aten.max_pool2d_with_indices_backward.default,
        aten.avg_pool2d_backward.default,
        aten._adaptive_avg_pool2d.default,
        aten._adaptive_avg_pool2d_backward.default,
        aten.adaptive_max_pool2d_backward.default,
        aten.fractional_max_pool2d_backward.default,
        aten.max_unpool2d.default,
        aten.reflection_pad2d.default,
        aten.reflection_pad2d_backward.default,
        aten.replication_pad2d.default,
        aten.replication_pad2d_backward.default,
        aten.upsample_nearest2d.default,
        aten.upsample_nearest2d_backward.default,
        aten._upsample_nearest_exact2d.default,
        aten._upsample_nearest_exact2d_backward.default,
        aten.upsample_bilinear2d_backward.default,
        aten._upsample_bilinear2d_aa.default,
        aten._upsample_bilinear2d_aa_backward.default,
        aten.upsample_bicubic2d.default,
        aten.upsample_bicubic2d_backward.default,
        aten._upsample_bicubic2d_aa.default,
        aten._upsample_bicubic2d_aa_backward.default,
        aten.im2col.default,
        aten.channel_shuffle.default,
        aten.grid_sampler_2d.default,
        aten.grid_sampler_2d_backward.default,
    ),
    4: (
        aten.max_pool3d_with_indices.default,
        aten.max_pool3d_with_indices_backward.default,
        aten.avg_pool3d.default,
        aten.avg_pool3d_backward.default,
        aten._adaptive_avg_pool3d.default,
        aten._adaptive_avg_pool3d_backward.default,
        aten.adaptive_max_pool3d.default,
        aten.adaptive_max_pool3d_backward.default,
        aten.fractional_max_pool3d_backward.default,
        aten.max_unpool3d.default,
        aten.reflection_pad3d.default,
        aten.reflection_pad3d_backward.default,
        aten.replication_pad3d.default,
        aten.replication_pad3d_backward.default,
        aten.upsample_nearest3d.default,
        aten.upsample_nearest3d_backward.default,
        aten._upsample_nearest_exact3d.default,
        aten._upsample_nearest_exact3d_backward.default,
        aten.upsample_trilinear3d.default,
        aten.upsample_trilinear3d_backward.default,
        aten.grid_sampler_3d.default,
        aten.grid_sampler_3d_backward.default,
    ),
}

_CHANNELS_LAST = (
    aten.max_pool2d_with_indices.default,
    aten.avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.upsample_bilinear2d.default,
)


def _pool(op: OpOverload, core: int, *, channels_last: bool = False) -> Any:
    """``fold`` of tensors that lie in one piece: some kernels read indices without a look at their strides."""
    folded = fold(op, core, channels_last=channels_last)

    def run(*args: Any, **kwargs: Any) -> Any:
        ctx = context_of(*args)
        return folded(*[_dense(a, ctx) if isinstance(a, Tensor) else a for a in args], **kwargs)

    run.__qualname__ = folded.__qualname__
    return run


def _dense(x: Tensor, ctx: Context) -> Batched:
    if type(x) is not Batched:
        return wrap(ctx, x.expand(ctx.n, *x.shape).contiguous())
    return x if x.is_floating_point() or x.physical.is_contiguous() else wrap(ctx, x.physical.contiguous())


for _op in _CHANNELS_LAST:
    register(_op, _pool(_op, 3, channels_last=True), "rule")
for _core, _ops in _FOLDED.items():
    for _op in _ops:
        register(_op, _pool(_op, _core), "rule")


def _fractional(op: OpOverload, core: int) -> Any:
    """The random numbers have a batch axis even where the images have none; rows beyond the images' are not read."""

    def run(self: Any, kernel_size: Any, output_size: Any, random_samples: Any) -> Any:
        n = samples(self, random_samples)
        rows = 1 if self.dim() == core else self.shape[0]
        images, numbers = physical(self, n), physical(random_samples, n)[:, :rows].flatten(0, 1).contiguous()
        if self.dim() == core:
            return op(images, kernel_size, output_size, numbers)
        found = op(images.flatten(0, 1), kernel_size, output_size, numbers)
        return tuple(x.unflatten(0, (n, -1)) for x in found)

    run.__qualname__ = f"fractional({op})"
    return run


register(aten.fractional_max_pool2d.default, _fractional(aten.fractional_max_pool2d.default, 3), "rule")
register(aten.fractional_max_pool3d.default, _fractional(aten.fractional_max_pool3d.default, 4), "rule")


@rule(aten.constant_pad_nd.default)
def constant_pad_nd(self: Any, pad: Any, value: Any = 0) -> Any:
    if len(pad) > 2 * self.dim():
        raise RuntimeError(f"`pad` has {len(pad)} entries, but the input has {self.dim()} dimensions, with two entries each.")
    return torch.constant_pad_nd(self.physical, pad, value)
