"""The rules, one file per family of ops; importing this package fills the table."""

from per_sample.rules import (
    attention,
    attention_gpu,
    batch_norm,
    conv,
    embedding,
    factory,
    index,
    linear,
    loss,
    norm,
    pointwise,
    pool,
    reduce,
    view,
    view_backward,
)
