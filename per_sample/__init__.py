"""Every sample's gradient at about the price of one batched gradient."""

from per_sample import grad, reference, testing
from per_sample import rules as _rules  # noqa: F401  (fills the rule table)
from per_sample._batched import Batched, physical
from per_sample._errors import (
    ArgumentError,
    BatchNormError,
    BatchSizeError,
    DataDependentError,
    EscapedError,
    ModuleCallError,
    NotScalarError,
    PerSampleError,
    RandomnessError,
    RuleError,
    SharedWriteError,
    UnsupportedError,
)
from per_sample._options import options
from per_sample._registry import rule
from per_sample.expanded_weights import call_for_per_sample_grads
from per_sample.explain import Explanation, explain
from per_sample.transforms import per_sample_grad, per_sample_grad_and_value

__all__ = [
    "ArgumentError",
    "BatchNormError",
    "BatchSizeError",
    "Batched",
    "DataDependentError",
    "EscapedError",
    "Explanation",
    "ModuleCallError",
    "NotScalarError",
    "PerSampleError",
    "RandomnessError",
    "RuleError",
    "SharedWriteError",
    "UnsupportedError",
    "call_for_per_sample_grads",
    "explain",
    "grad",
    "options",
    "per_sample_grad",
    "per_sample_grad_and_value",
    "physical",
    "reference",
    "rule",
    "testing",
]
