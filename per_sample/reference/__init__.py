"""The same transforms by ``vmap`` over ``grad``, and nothing clever: the meaning of the fast ones.

Every function here takes the arguments of its namesake in ``per_sample`` and gives the same numbers, from all samples' gradients in memory.
"""

from per_sample.reference.clipping import clipped_grad
from per_sample.reference.gradients import per_sample_grad, per_sample_grad_and_value, per_sample_jacobian
from per_sample.reference.map import LeafGrads, per_sample_grad_map
from per_sample.reference.moments import grad_second_moment, grad_variance, gradient_noise_scale
from per_sample.reference.norms import per_sample_grad_norm
from per_sample.reference.products import grad_gram, per_sample_grad_dot, projected_grad
from per_sample.reference.sums import weighted_grad

__all__ = [
    "LeafGrads",
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
