"""From the module one has: a pure function of its parameters for one sample, and the way back into the module."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from per_sample._errors import ArgumentError, BatchNormError, UnsupportedError, few
from per_sample._fsdp import resharded
from per_sample._ranks import is_distributed
from per_sample._swapped import by_place, swapped, turn
from per_sample._write_back import by_first_name, state_of


def functional(
    module: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    forward: Callable[..., Any] | None = None,
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    batch_dims: Any = 0,
) -> ModuleFunction:
    """Turn a module and a loss into a pure function ``loss(params, *inputs, target)`` of one sample, for the transforms to take.

    Args:
        module: any module. It is borrowed, not copied: the function runs it in the mode (``train()``, ``eval()``) and with the buffers and
            frozen parameters that it has when it is called.
        loss_fn: ``loss_fn(output, target)``, such as ``F.cross_entropy`` or ``nn.MSELoss()``; the target is the function's last argument.
            None: there is no target; what the module returns is the loss, or has it as ``.loss``, as models of Hugging Face do.
        forward: how the module is called, ``forward(module, *inputs)``; by default ``module(*inputs)``, and ``module(**inputs)`` for a
            single dict. Without a ``loss_fn`` it returns the loss.
        has_aux: the function returns ``(loss, aux)``, for transforms with ``has_aux``: with a ``loss_fn`` ``aux`` is the module's output;
            without one ``forward`` returns the pair. Its tensors lose a first axis of size 1, as that of a batch of one.
        keep_batch_dim: the module sees one sample as a batch of one, ``[1, *shape]``, and so does ``loss_fn``. False: it is written for a
            sample without that axis.
        batch_dims: where the module and ``loss_fn`` want that axis, if not in front: a tuple like ``in_dims``, with an entry for each input
            and the target, such as ``(1, 0)`` for a sequence-first ``nn.LSTM`` and its labels; None where one is
            passed on as it is. It says nothing of where the samples lie in the batch, which is what ``in_dims`` is for.

    Returns:
        A ``ModuleFunction``. Its ``params`` are the trainable parameters by name, as the transforms differentiate them.

    Raises:
        ArgumentError: for arguments that cannot be right. The function itself raises BatchNormError where a batch norm layer would
            normalise over the batch.

    Example:
        >>> import torch
        >>> from per_sample import functional, per_sample_grad
        >>> loss = functional(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy)
        >>> grads = per_sample_grad(loss)(loss.params, torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
        >>> {name: tuple(g.shape) for name, g in grads.items()}
        {'weight': (5, 2, 3), 'bias': (5, 2)}

    Source:
        ``torch.func.functional_call``.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"`module` must be an nn.Module; got {type(module).__name__}.")
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise ArgumentError(
            "`module`, or a part of it, is compiled by TorchScript; its parameters cannot be exchanged: pass the one that it is made from."
        )
    if hasattr(module, "autograd_grad_sample_hooks"):
        raise ArgumentError("`module` has the hooks of Opacus in its layers: take them off with `model.to_standard_module()`.")
    if isinstance(loss_fn, type):
        raise ArgumentError(f"`loss_fn` is the class {loss_fn.__name__}; make one: `{loss_fn.__name__}()`.")
    for name, own in (("loss_fn", loss_fn), ("forward", forward)):
        if own is not None and not callable(own):
            raise ArgumentError(f"`{name}` must be callable or None; got {type(own).__name__}.")
    return ModuleFunction(module, loss_fn, forward or _forward, has_aux, batch_dims if keep_batch_dim else None, {})


class ModuleFunction:
    """What ``functional`` returns: the loss of one sample as a function of a module's parameters, and these parameters."""

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        forward: Callable[..., Any],
        has_aux: bool,
        batch_dims: Any,
        bound: dict[str, Tensor],
    ) -> None:
        self.module = module
        self._loss_fn = loss_fn
        self._forward = forward
        self._has_aux = has_aux
        self._batch_dims = batch_dims
        self._bound = bound
        self._call = _Call(module, forward)

    @property
    def keep_batch_dim(self) -> bool:
        """Whether the module sees one sample as a batch of one."""
        return self._batch_dims is not None

    @property
    def params(self) -> dict[str, Tensor]:
        """The trainable parameters by name, detached: those that require grad. They share the module's memory, so that what an optimizer
        writes into the module shows in them; nothing here writes into them."""
        return {name: _detached(name, p) for name, p in self._trainable().items()}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The parameters by name that do not require grad, or are bound: they are held fixed."""
        return {name: self._bound.get(name, p.detach()) for name, p in self._named() if name in self._bound or not p.requires_grad}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name, all samples' own."""
        with turn():
            named = list(self.module.named_buffers())
        return {name: self._bound.get(name, b) for name, b in named}

    def bind(self, tensors: Mapping[str, Tensor]) -> ModuleFunction:
        """Hold some parameters or buffers fixed at other values.

        Args:
            tensors: by name, as in ``params``, ``frozen`` and ``buffers``; the module keeps its own.

        Returns:
            A function whose ``params`` lack what is bound.

        Raises:
            ArgumentError: for a name that the module does not have, another shape, or different tensors for names that are tied.

        Example:
            >>> import torch
            >>> from per_sample import functional, per_sample_grad
            >>> loss = functional(torch.nn.Linear(3, 1), torch.nn.functional.mse_loss).bind({"bias": torch.ones(1)})
            >>> list(loss.params), loss.frozen
            (['weight'], {'bias': tensor([1.])})
        """
        bound = {**self._bound, **by_first_name(tensors, state_of(self.module), "tensors")}
        return ModuleFunction(self.module, self._loss_fn, self._forward, self._has_aux, self._batch_dims, bound)

    def __call__(self, params: Mapping[str, Tensor], *batch: Any, **named: Any) -> Any:
        """The loss of one sample, with ``has_aux`` a pair; ``batch`` is the inputs, and last the target where there is a ``loss_fn``."""
        if named:
            raise ArgumentError(
                f"The function takes its inputs by position; got {sorted(named)} by name. Inputs that the module takes by name go in one "
                "dict: `loss(params, {'input_ids': ..., 'attention_mask': ...})`."
            )
        self._check_names(params)
        if self._loss_fn is not None and len(batch) < 2:
            raise ArgumentError(
                f"The function takes (params, *inputs, target), since it has a `loss_fn`; it got {len(batch)} after params. A batch "
                "that is a list or a tuple goes as `loss(params, *batch)`."
            )
        if self.keep_batch_dim:
            self._check_batch_norms()
            batch = _batch_of_one(batch, self._batch_dims)
        inputs = batch if self._loss_fn is None else batch[:-1]
        output = self._output({**self._bound, **params}, inputs)
        if self._loss_fn is not None:
            loss, aux = self._loss_of(output, batch[-1]), output
        elif self._has_aux:
            loss, aux = _pair(output)
        else:
            loss, aux = _own_loss(output), None
        if self.keep_batch_dim:
            loss = loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else _without_batch(loss)
            aux = _without_batch(aux)
        return (loss, aux) if self._has_aux else loss

    def gathered(self) -> ModuleFunction:
        """The function with all that it holds fixed whole on every rank, where it is sharded over them."""
        found = {name: x for name, x in {**self.frozen, **self.buffers}.items() if is_distributed(x)}
        return self.bind({name: x.full_tensor() for name, x in found.items()}) if found else self  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"ModuleFunction({type(self.module).__name__}, {len(list(self.module.parameters()))} parameters)"

    # What dynamo traces has no comprehension inside a `with`: since Python 3.13 it loses count of the blocks there.
    def _named(self) -> list[tuple[str, nn.Parameter]]:
        with turn():
            return list(resharded(self.module).named_parameters())

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._named() if p.requires_grad and name not in self._bound}

    def _output(self, tensors: dict[str, Tensor], inputs: tuple[Any, ...]) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return functional_call(
                self._call, {f"module.{name}": x for name, x in by_place(self.module, tensors).items()}, inputs, tie_weights=False
            )
        with swapped(self.module, tensors):
            return self._forward(self.module, *inputs)

    def _loss_of(self, output: Any, target: Any) -> Any:
        assert self._loss_fn is not None
        try:
            return self._loss_fn(output, target)
        except Exception as err:
            if not isinstance(output, Tensor):
                err.add_note(
                    f"`loss_fn` got the module's output, a {type(output).__name__}. Pick what it wants: "
                    "`lambda output, y: F.cross_entropy(output.logits, y)`."
                )
            raise

    def _check_batch_norms(self) -> None:
        """Refuse what would normalise each sample by itself here, and all of a batch together where the module is used otherwise."""
        norms = [(name, m) for name, m in self.module.named_modules() if isinstance(m, _BatchNorm)]
        found = [name for name, m in norms if m.training or m.running_mean is None]
        if found:
            trained = any(m.training and m.running_mean is not None for _, m in norms)
            eval_mode = "Put them in eval mode, or use" if trained else "They have no running statistics for eval mode: use"
            raise BatchNormError(
                f"{len(found)} batch norm layer(s), such as {found[0]!r}, would normalise over the batch, which mixes samples: there is no "
                f"per-sample gradient. {eval_mode} group, layer or instance norm instead."
            )

    def _check_names(self, params: Any) -> None:
        if not isinstance(params, Mapping):
            found = f"a tensor of shape {list(params.shape)}" if isinstance(params, Tensor) else type(params).__name__
            raise ArgumentError(f"The first argument is the parameters by name, such as `loss.params`; got {found}.")
        # A function mode around the transform's caller would show the parameters in a form of its own.
        with torch._C.DisableTorchFunction():
            own = self._trainable().keys()
        if params.keys() != own:
            missing, unknown = few(own - params.keys()), few(params.keys() - own)
            raise ArgumentError(
                f"The parameters are not those of the function's `params`: missing {missing}, not among them {unknown}. To hold some "
                "fixed, use `bind`, or `requires_grad_(False)` on the module."
            )


class _Call(nn.Module):
    """What is run with other parameters in place of the module's: the module, in the caller's way."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.run = forward

    def forward(self, *inputs: Any) -> Any:
        return self.run(self.module, *inputs)


def _forward(module: nn.Module, *inputs: Any) -> Any:
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return module(**inputs[0])
    return module(*inputs)


def _own_loss(output: Any) -> Any:
    """The loss that a module has computed itself."""
    if isinstance(output, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ArgumentError(
            f"What was to be the loss is a {type(output).__name__} without one: give `functional` a `loss_fn(output, target)`, or the "
            "module its labels. With `has_aux=True`, a `forward` may return (loss, aux)."
        )
    return loss


def _pair(output: Any) -> tuple[Any, Any]:
    """The loss and the rest of what a module or a ``forward`` has returned."""
    if isinstance(output, Mapping) or hasattr(output, "loss"):
        return _own_loss(output), dict(output) if isinstance(output, Mapping) else vars(output)
    if not isinstance(output, tuple) or len(output) != 2:
        raise ArgumentError(
            f"With `has_aux=True` and no `loss_fn`, `forward` must return a pair (loss, aux); it returned {type(output).__name__}."
        )
    return output


def _without_batch(tree: Any) -> Any:
    """The tensors of a tree without the axis of a batch of one."""
    return pytree.tree_map(lambda x: x.squeeze(0) if isinstance(x, Tensor) and x.dim() and x.shape[0] == 1 else x, tree)


def _batch_of_one(tree: Any, dims: Any) -> Any:
    """Every tensor with an axis of size 1 at its place of ``dims``, a prefix tree; a packed sequence of one has its own."""
    if isinstance(tree, (dict, UserDict)) and isinstance(dims, dict) and tree.keys() == dims.keys():
        return type(tree)({name: _batch_of_one(part, dims[name]) for name, part in tree.items()})
    if type(tree) in (tuple, list) and isinstance(dims, (tuple, list)) and len(tree) == len(dims):
        return type(tree)([_batch_of_one(part, dim) for part, dim in zip(tree, dims, strict=True)])
    if dims is None:
        return tree
    if not isinstance(dims, int) or isinstance(dims, bool):
        length = f" of {len(tree)}" if isinstance(tree, (tuple, list)) else ""
        raise ArgumentError(
            f"`batch_dims` has {dims!r} for a {type(tree).__name__}{length}; it wants a tuple with "
            " an entry (an axis or None) for each input and the target."
        )

    def one(x: Any) -> Any:
        if isinstance(x, UserDict):
            return type(x)({name: _batch_of_one(part, dims) for name, part in x.items()})
        return x.unsqueeze(dims) if isinstance(x, Tensor) else x

    return pytree.tree_map(one, tree, is_leaf=lambda x: type(x) is PackedSequence)


def _detached(name: str, param: Tensor) -> Tensor:
    # Not by `is_lazy`, which `torch.compile` does not know.
    if isinstance(param, UninitializedTensorMixin):
        raise UnsupportedError(f"The parameter {name!r} is not initialised; run the module once first.")
    return param.detach()
