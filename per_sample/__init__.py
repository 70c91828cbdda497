"""Every sample's gradient at about the price of one batched gradient."""

from per_sample import grad as grad
from per_sample import reference as reference
from per_sample import rules as _rules  # noqa: F401  (fills the rule table)
from per_sample import testing as testing
from per_sample._batched import Batched, physical
from per_sample._errors import (
    ArgumentError,
    BatchNormError,
    BatchSizeError,
    DataDependentError,
    EscapedError,
    ModuleCallError,
    NonFiniteWarning,
    NotScalarError,
    PerSampleError,
    RandomnessError,
    RuleError,
    SharedWriteError,
    UnsupportedError,
    UnusedArgumentWarning,
)
from per_sample._options import options
from per_sample._registry import rule
from per_sample._write_back import load_back, set_grads
from per_sample.expanded_weights import call_for_per_sample_grads
from per_sample.explain import Explanation, explain
from per_sample.modules import ModuleFunction, functional
from per_sample.quantities.leaf import LeafGrads
from per_sample.quantities.projectors import (
    FactoredProjector,
    GaussianProjector,
    Projector,
    RademacherProjector,
    SparseProjector,
)
from per_sample.transforms import (
    ClippedGrad,
    clipped_grad,
    grad_gram,
    grad_second_moment,
    grad_variance,
    gradient_noise_scale,
    per_sample_grad,
    per_sample_grad_and_value,
    per_sample_grad_dot,
    per_sample_grad_map,
    per_sample_grad_norm,
    per_sample_jacobian,
    projected_grad,
    weighted_grad,
)

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BatchNormError",
    "BatchSizeError",
    "Batched",
    "ClippedGrad",
    "DataDependentError",
    "EscapedError",
    "Explanation",
    "FactoredProjector",
    "GaussianProjector",
    "LeafGrads",
    "ModuleCallError",
    "ModuleFunction",
    "NonFiniteWarning",
    "NotScalarError",
    "PerSampleError",
    "Projector",
    "RademacherProjector",
    "RandomnessError",
    "RuleError",
    "SharedWriteError",
    "SparseProjector",
    "UnsupportedError",
    "UnusedArgumentWarning",
    "call_for_per_sample_grads",
    "clipped_grad",
    "explain",
    "functional",
    "grad_gram",
    "grad_second_moment",
    "grad_variance",
    "gradient_noise_scale",
    "load_back",
    "options",
    "per_sample_grad",
    "per_sample_grad_and_value",
    "per_sample_grad_dot",
    "per_sample_grad_map",
    "per_sample_grad_norm",
    "per_sample_jacobian",
    "physical",
    "projected_grad",
    "rule",
    "set_grads",
    "weighted_grad",
]
