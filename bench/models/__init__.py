"""The networks, made of plain torch modules, so that methods that hook modules can run them too."""

from bench.models.convolutional import Audio, Clips, Convnet, MnistCnn, ResNet18, Separable
from bench.models.dense import Experts, Mlp
from bench.models.sequences import Gpt, Lstm, MeanEmbedding

__all__ = ["Audio", "Clips", "Convnet", "Experts", "Gpt", "Lstm", "MeanEmbedding", "Mlp", "MnistCnn", "ResNet18", "Separable"]
