"""The shapes on which the choices between algorithms are judged."""

from __future__ import annotations

from bench.micro import Conv

# Channels in, size, channels out, kernel, stride, padding: the layers of ResNet-18 on images of 32 pixels.
_RESNET = (
    ("stem", 3, 32, 64, 3, 1, 1),
    ("1", 64, 32, 64, 3, 1, 1),
    ("2a", 64, 32, 128, 3, 2, 1),
    ("2s", 64, 32, 128, 1, 2, 0),
    ("2", 128, 16, 128, 3, 1, 1),
    ("3a", 128, 16, 256, 3, 2, 1),
    ("3s", 128, 16, 256, 1, 2, 0),
    ("3", 256, 8, 256, 3, 1, 1),
    ("4a", 256, 8, 512, 3, 2, 1),
    ("4s", 256, 8, 512, 1, 2, 0),
    ("4", 512, 4, 512, 3, 1, 1),
)
# The same for the four layers of a small network, and for the two of the MNIST network.
_SMALL = (("1", 3, 28, 32, 3, 1, 1), ("2", 32, 14, 64, 3, 1, 1), ("3", 64, 7, 64, 3, 1, 1), ("4", 64, 3, 128, 3, 1, 1))
_MNIST = (("1", 1, 28, 16, 8, 2, 3), ("2", 16, 13, 32, 4, 2, 0))


def _square(network: str, n: int, layer: tuple[str, int, int, int, int, int, int]) -> Conv:
    name, channels, size, outputs, kernel, stride, padding = layer
    shape = (n, channels, size, size), (outputs, channels, kernel, kernel)
    return Conv(f"{network}-{name} n{n}", *shape, stride=stride, padding=padding)


def _depthwise(n: int, channels: int, kernel: int, size: int, stride: int = 1, multiplier: int = 1) -> Conv:
    name = (
        f"depthwise{f' x{multiplier}' if multiplier > 1 else ''} {channels} {kernel}x{kernel} at {size}{' s2' if stride == 2 else ''} n{n}"
    )
    shape = (n, channels, size, size), (channels * multiplier, 1, kernel, kernel)
    return Conv(name, *shape, stride=stride, padding=kernel // 2, groups=channels)


def _grouped(n: int, channels: int, size: int, groups: int, kernel: int = 3) -> Conv:
    shape = (n, channels, size, size), (channels, channels // groups, kernel, kernel)
    return Conv(f"{groups} groups of {channels // groups} at {size} n{n}", *shape, padding=kernel // 2, groups=groups)


CONVS = (
    *(_square("resnet", n, layer) for n in (8, 32) for layer in _RESNET if n == 8 or layer[0] not in ("4a", "4")),
    *(_square("small", n, layer) for n in (16, 64) for layer in _SMALL),
    *(_square("mnist", n, layer) for n in (32, 256) for layer in _MNIST),
    # Large images: a stem, a stage, a shortcut; patches.
    Conv("stem 7x7 at 112", (8, 3, 112, 112), (64, 3, 7, 7), stride=2, padding=3),
    Conv("stem 3x3 at 96", (8, 3, 96, 96), (32, 3, 3, 3), stride=2, padding=1),
    Conv("stage at 56", (4, 64, 56, 56), (64, 64, 3, 3), padding=1),
    Conv("stage at 28", (8, 128, 28, 28), (128, 128, 3, 3), padding=1),
    Conv("patches 8x8 at 64", (32, 3, 64, 64), (192, 3, 8, 8), stride=8),
    Conv("patches 16x16 at 224", (2, 3, 224, 224), (384, 3, 16, 16), stride=16),
    Conv("wide to narrow 3x3", (16, 128, 16, 16), (3, 128, 3, 3), padding=1),
    Conv("to one channel", (32, 32, 28, 28), (1, 32, 3, 3), padding=1),
    Conv("to two channels 1x1", (16, 64, 16, 16), (2, 64, 1, 1)),
    Conv("5x5 at 28", (32, 6, 28, 28), (16, 6, 5, 5)),
    Conv("grey 3x3 at 28", (64, 1, 28, 28), (32, 1, 3, 3)),
    Conv("grey 5x5 at 28", (64, 1, 28, 28), (6, 1, 5, 5), padding=2),
    Conv("grey 3x3 at 64 s2", (16, 1, 64, 64), (32, 1, 3, 3), stride=2, padding=1),
    Conv("two channels 4x4 s2 at 64", (16, 2, 64, 64), (32, 2, 4, 4), stride=2),
    Conv("5x5 at 12", (64, 20, 12, 12), (50, 20, 5, 5)),
    # 1x1
    Conv("1x1 256-64 at 28", (8, 256, 28, 28), (64, 256, 1, 1)),
    Conv("1x1 64-256 at 14", (16, 64, 14, 14), (256, 64, 1, 1)),
    Conv("1x1 512-512 at 7", (16, 512, 7, 7), (512, 512, 1, 1)),
    Conv("1x1 16-96 at 32", (32, 16, 32, 32), (96, 16, 1, 1)),
    # Dilated
    Conv("dilated 32 at 20", (16, 32, 20, 20), (32, 32, 3, 3), padding=2, dilation=2),
    Conv("dilated 64 at 28", (8, 64, 28, 28), (64, 64, 3, 3), padding=4, dilation=4),
    # Depthwise and grouped
    _depthwise(32, 64, 3, 14),
    _depthwise(8, 96, 3, 28),
    _depthwise(16, 144, 3, 28, stride=2),
    _depthwise(16, 256, 3, 7),
    _depthwise(64, 32, 3, 28),
    _depthwise(8, 64, 5, 28),
    _depthwise(16, 192, 5, 14, stride=2),
    _depthwise(8, 96, 7, 14),
    _depthwise(16, 32, 3, 14, multiplier=2),
    _depthwise(8, 32, 5, 14, multiplier=4),
    _grouped(8, 128, 28, 32),
    _grouped(16, 256, 14, 32),
    _grouped(8, 512, 7, 32),
    _grouped(16, 64, 14, 2),
    _grouped(32, 48, 12, 3),
    # Sequences
    Conv("audio 80", (16, 1, 8000), (64, 1, 80), stride=4),
    Conv("audio 3", (8, 64, 1000), (64, 64, 3), padding=1),
    Conv("audio 3 short", (16, 128, 100), (128, 128, 3), padding=1),
    Conv("audio 10 s5", (4, 1, 16000), (128, 1, 10), stride=5),
    Conv("audio dilated", (8, 64, 500), (64, 64, 2), dilation=8, padding=4),
    Conv("audio depthwise 31", (16, 64, 250), (64, 1, 31), padding=15, groups=64),
    Conv("audio depthwise 7", (16, 128, 300), (128, 1, 7), padding=3, groups=128),
    Conv("audio depthwise 3", (32, 64, 500), (64, 1, 3), padding=1, groups=64),
    Conv("series 7", (64, 1, 300), (16, 1, 7)),
    Conv("series 5 of 6 channels", (64, 6, 128), (32, 6, 5)),
    Conv("audio stereo 25 s4", (8, 2, 8000), (32, 2, 25), stride=4),
    Conv("text 5", (32, 100, 40), (64, 100, 5)),
    # Volumes
    Conv("video", (4, 8, 8, 16, 16), (16, 8, 3, 3, 3), padding=1),
    Conv("video stem", (4, 3, 8, 32, 32), (32, 3, 3, 3, 3), padding=1),
    Conv("video stem n16", (16, 3, 8, 32, 32), (16, 3, 3, 3, 3), padding=1),
    Conv("video second n16", (16, 16, 4, 16, 16), (32, 16, 3, 3, 3), padding=1),
    Conv("video third n16", (16, 32, 2, 8, 8), (64, 32, 3, 3, 3), padding=1),
    Conv("volume", (4, 1, 24, 24, 24), (16, 1, 3, 3, 3), padding=1),
    Conv("volume 16 s2", (8, 16, 12, 12, 12), (32, 16, 3, 3, 3), stride=2, padding=1),
    Conv("depthwise volume", (4, 32, 8, 14, 14), (32, 1, 3, 3, 3), padding=1, groups=32),
    Conv("video late", (8, 64, 4, 7, 7), (64, 64, 3, 3, 3), padding=1),
)

# n, positions, in, out
OUTERS = (
    *((n, 1, i, o) for n, i, o in ((128, 784, 1024), (256, 512, 32), (8, 16, 32))),
    *((16, t, i, o) for t in (2, 16, 64) for i, o in ((256, 1024), (64, 64), (768, 256), (512, 10))),
    *((4, t, i, o) for t in (256, 512) for i, o in ((256, 768), (64, 64), (768, 768))),
    (16, 64, 256, 1000),
    (32, 32, 128, 512),
)
