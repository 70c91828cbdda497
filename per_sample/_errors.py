"""Every exception the library raises on purpose."""

from collections.abc import Iterable
from typing import Any


class PerSampleError(Exception):
    """Base class of the library's own errors."""


class ArgumentError(PerSampleError, ValueError):
    """An argument of a transform has the wrong type, value or shape."""


class BatchSizeError(ArgumentError):
    """The batched arguments disagree about the number of samples, or there is none."""


class NotScalarError(PerSampleError, ValueError):
    """The function did not return one real scalar loss for one sample."""


class DataDependentError(PerSampleError, RuntimeError):
    """The function asks for the Python value of a tensor that differs between samples."""


class SharedWriteError(PerSampleError, RuntimeError):
    """A per-sample value would be written in place into a tensor that all samples share."""


class BatchNormError(PerSampleError, RuntimeError):
    """Batch normalisation in training mode mixes samples."""


class RandomnessError(PerSampleError, RuntimeError):
    """A random op was met that the ``randomness`` option does not allow."""


class RuleError(PerSampleError, RuntimeError):
    """A rule is wrongly declared, or returned something that does not fit its op."""


class UnsupportedError(PerSampleError, NotImplementedError):
    """An op or a combination that cannot be right is refused."""


class ModuleCallError(PerSampleError, RuntimeError):
    """``call_for_per_sample_grads`` was given something that it cannot use."""


class EscapedError(PerSampleError, RuntimeError):
    """A per-sample tensor was used after the transform that made it had ended."""


class UnusedArgumentWarning(UserWarning):
    """The function uses nothing that it is differentiated with respect to, but a tensor from outside that requires grad."""


class NonFiniteWarning(UserWarning):
    """Samples were left out of a sum, because their gradient is not finite."""


def few(names: Iterable[Any]) -> str:
    """For a message: the first of the names, and how many more there are."""
    found = sorted(names, key=str)
    return str(found) if len(found) <= 5 else f"{found[:5]} and {len(found) - 5} more"
