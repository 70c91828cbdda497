"""What dynamo is told before it traces a function of one sample: of the numbers in its graphs, and of what it would get wrong."""

from __future__ import annotations

from typing import Any

import torch


def prepare() -> None:
    """Called while dynamo traces, before each quantity."""
    _share_numbers()
    _allow_views()
    _refuse_custom_functions_below_transforms()


# `assume_constant_result` would do the same, but import dynamo first.
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _share_numbers() -> None:
    """Let Python numbers that are inputs of the graph be read outside of subgraphs, so that the next subgraph knows them, too.

    Dynamo reads one (`Tensor.item`) where it meets it first. In a second subgraph, as of chunks, it would then look for it in vain.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    graph = InstructionTranslator.current_tx().output
    create_proxy = graph.create_proxy

    def shared(kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        # What is recorded of a graph's input that stands for a number.
        source = args[0].node.meta.get("grapharg") if kind == "call_method" and target == "item" else None
        create = graph.root_tracer.create_proxy if getattr(source, "pass_arg_as_tensor", False) else create_proxy
        return create(kind, target, args, kwargs, *rest, **options)

    graph.create_proxy = shared  # type: ignore[method-assign]


def _allow_views() -> None:
    """Arguments may be views of one tensor, such as tokens and the next ones: the subgraph is never run as one op, nor writes into them."""
    from torch._dynamo.variables.higher_order_ops import BaseHOPVariable, _hop_name_to_variable_class

    class PerSampleVariable(BaseHOPVariable):
        supports_aliasing = True

    _hop_name_to_variable_class.setdefault("per_sample", PerSampleVariable)


def _refuse_custom_functions_below_transforms() -> None:
    """Dynamo traces only the forward pass of a custom function below a `vmap`, and a backward pass without derivatives below a `grad`."""
    from torch._dynamo.exc import unimplemented
    from torch._dynamo.variables.misc import AutogradFunctionVariable

    call_apply = AutogradFunctionVariable.call_apply
    if call_apply.__module__ == __name__:
        return

    def checked(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None and _in_one_sample(tx.output.current_tracer):
            unimplemented(
                gb_type="A custom function below a transform in a per-sample gradient",
                context=self.fn_cls.__name__,
                explanation=f"torch.compile would ignore the `backward` of `{self.fn_cls.__name__}` there. Leave the transform uncompiled.",
                hints=[],
            )
        return call_apply(self, tx, *args, **kwargs)

    AutogradFunctionVariable.call_apply = checked  # type: ignore[method-assign]


def _in_one_sample(tracer: Any) -> bool:
    while tracer is not None and str(tracer.source_target) != "per_sample":
        tracer = tracer.parent
    return tracer is not None
