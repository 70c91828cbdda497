"""The public transforms."""

from per_sample.transforms.clipped import ClippedGrad, clipped_grad
from per_sample.transforms.gradients import per_sample_grad, per_sample_grad_and_value
from per_sample.transforms.jacobian import per_sample_jacobian
from per_sample.transforms.mapped import per_sample_grad_map
from per_sample.transforms.norms import per_sample_grad_norm
from per_sample.transforms.projected import projected_grad
from per_sample.transforms.similarity import grad_gram, per_sample_grad_dot
from per_sample.transforms.statistics import grad_second_moment, grad_variance, gradient_noise_scale
from per_sample.transforms.weighted import weighted_grad

__all__ = [
    "ClippedGrad",
    "clipped_grad",
    "grad_gram",
    "grad_second_moment",
    "grad_variance",
    "gradient_noise_scale",
    "per_sample_grad",
    "per_sample_grad_and_value",
    "per_sample_grad_dot",
    "per_sample_grad_map",
    "per_sample_grad_norm",
    "per_sample_jacobian",
    "projected_grad",
    "weighted_grad",
]
