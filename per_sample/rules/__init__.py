"""The rules, one file per family of ops; importing this package fills the table."""

from per_sample.rules import (  # noqa: F401
    attention,
    attention_gpu,
    attention_math,
    batch_norm,
    conv,
    embedding,
    embedding_bag,
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
