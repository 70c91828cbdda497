"""The tables of what the sweeps let pass, each row with its reason. A wrong number is never let pass."""

# Pattern of the case's name (`sweep/...`, as in `fnmatch`) -> why it is refused, here and by vmap(grad).
EXCEPTIONS: dict[str, str] = {
    "ops/tensor_split/*": "torch reads a tensor of positions by pointer",
    "ops/to_sparse/*": "a per-sample tensor is dense",
    "modules/nn.Transformer/eval/25/frozen": "torch's fused kernel gives zeros at padded positions",
    "modules/nn.Transformer/eval/57/frozen": "torch's fused kernel gives zeros at padded positions",
}

# What is refused by promise, although vmap(grad) may run it.
PROMISES: dict[str, str] = {
    "modules/nn.*BatchNorm*/train/*": "statistics of the batch mix the samples",
    "modules/nn.*InstanceNorm*/train/*": "it updates running statistics, which the samples share",
    "ops/*batch_norm*": "statistics of the batch mix the samples",
    "ops/nn.functional.instance_norm/*": "it updates running statistics",
    "ops/as_strided*/*all": "strides of another layout would reach other samples",
}
