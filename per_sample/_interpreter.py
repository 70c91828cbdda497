"""The interpreter: every op the program runs on ``Batched`` tensors comes through ``dispatch``.

Precedence for one op: no argument differs between samples: the op runs once; a rule of the table; the pointwise tag;
the fallback. A rule that returns ``NotImplemented`` leaves the op to the fallback.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from per_sample import _fallback, _guards, _out, _registry
from per_sample._batched import Batched, Context, Plain, storage_of, wrap, wrap_factor, wrap_shared
from per_sample._entries import EAGER, ENTRIES, RECORDED, Entry, resolve
from per_sample._errors import PerSampleError, UnsupportedError
from per_sample._factors import Factor
from per_sample._fresh import own_copies
from per_sample._keys import all_keys, see_conjugates
from per_sample._shapes import check_result
from per_sample._skipped import skip

aten = torch.ops.aten

_in_inference_mode = torch.is_inference_mode_enabled
_DETACH = aten.detach.default


class Interpreter(TorchDispatchMode):
    """Brings every op run inside the function to ``dispatch``, factories and ops on plain tensors too."""

    supports_higher_order_operators = True

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.ctx = ctx

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ctx = self.ctx
        if ctx.complex:
            see_conjugates()
        if _in_inference_mode():
            # A wrapper made in inference mode cannot become a view of one made outside of it.
            with torch.inference_mode(False), torch.no_grad():
                return dispatch(ctx, func, args, kwargs or {})
        return dispatch(ctx, func, args, kwargs or {})


def dispatch(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """Run one op of the program for all samples."""
    if func is _DETACH:
        return _alias(ctx, args[0])
    entry = ENTRIES.get(func)
    if entry is None:
        special = _special(ctx, func, args, kwargs)
        if special is not NotImplemented:
            return special
        entry = resolve(func)
    batched = lifted = False
    values = list(args)
    given = len(values)
    for i in entry.tensors:
        if i >= given:
            break
        a = values[i]
        if type(a) is Batched:
            if a.ctx is ctx:
                if a.shared:
                    lifted = True
                    values[i] = a._value
                else:
                    batched = True
            elif ctx.caller is None or a.ctx.closed:
                _guards.refuse_escaped(func)
        elif a is None:
            pass
        elif isinstance(a, Tensor):
            if a.requires_grad:
                _guards.check_closure(ctx, a, func)
        elif isinstance(a, (list, tuple)):
            values[i], inner_batched, inner_lifted = _unwrap_list(ctx, func, a)
            batched |= inner_batched
            lifted |= inner_lifted
    if kwargs:
        # Keyword arguments that are tensors are rare, so they take the general way.
        items, kw_batched, kw_lifted = _unwrap_list(ctx, func, kwargs.values())
        kwargs = dict(zip(kwargs, items, strict=True))
        batched |= kw_batched
        lifted |= kw_lifted
    if not batched:
        return _run_shared(ctx, entry, func, args, values, kwargs, lifted)
    if entry.simple and ctx.simple:
        # Most ops take this short way; the long one below gives the same.
        out = entry.run(*values, **kwargs)
        if type(out) is Tensor and out.dim() and out.shape[0] == ctx.n:
            return wrap(ctx, out)
        if out is not NotImplemented:
            return _rewrap(ctx, entry, func, out, args[0] if args else None)
    if entry.writes:
        _guards.unshare_targets(ctx, args, values, entry.writes)
        _guards.check_writes(ctx, func, args, entry.writes, values)
    if ctx.recorder is not None:
        return ctx.recorder.op(func, entry.route, lambda: _run(ctx, entry, func, args, values, kwargs))
    return _run(ctx, entry, func, args, values, kwargs)


def _special(ctx: Context, func: Any, args: Any, kwargs: Any) -> Any:
    """The few calls that are about the wrappers themselves."""
    if isinstance(func, HigherOrderOperator):
        _guards.check_higher_order(ctx, func, args, kwargs)
        return func(*args, **kwargs)
    if func is aten._has_compatible_shallow_copy_type.default:
        return True  # asked where a wrapper takes another one's sizes
    if torch.Tag.inplace_view in func.tags:
        return _view_in_place(ctx, func, args, kwargs)
    if func is aten._efficientzerotensor.default:
        # Zeros without memory can be read only above this level.
        return dispatch(ctx, aten.zeros.default, args, kwargs)
    if _out.is_out_form(func) and any(type(x) is Batched and x.ctx is ctx for x in pytree.arg_tree_leaves(*args, **kwargs)):
        return _out.run(functools.partial(dispatch, ctx), func, args, kwargs)
    return NotImplemented


Batched.interpret = staticmethod(dispatch)

skip(Interpreter.__torch_dispatch__)
skip(Batched.__torch_dispatch__)


def _alias(ctx: Context, x: Tensor) -> Tensor:
    """Autograd detaches what it saves: the same value without this level's history, and with all of the caller's."""
    if type(x) is not Batched or x.ctx is not ctx:
        return aten.detach.default(x)
    if x.shared:
        ctx.view(x.physical)
    if ctx.caller is not None and ctx.caller.detaches:
        with ctx.caller():
            return (wrap_shared if x.shared else wrap)(ctx, x.physical.detach())
    if x.factor is not None:
        return wrap_factor(ctx, x.factor, x)
    return (wrap_shared if x.shared else wrap)(ctx, x.physical)


def _view_in_place(ctx: Context, func: OpOverload, args: Any, kwargs: Any) -> Any:
    """`squeeze_`, `t_`, ...: the same view out of place, then the wrapper takes its sizes."""
    x = args[0]
    packet = getattr(aten, func._schema.name.removeprefix("aten::").removesuffix("_"), None)
    if type(x) is not Batched or x.ctx is not ctx:
        _guards.check_outside(ctx, func, args, kwargs)
        return func(*args, **kwargs)
    # `transpose_.default` has its namesake in `transpose.int`.
    name = next((o for o in (func._overloadname, "int") if packet is not None and o in packet.overloads()), None)
    if name is None:
        raise UnsupportedError(f"`{func}` changes the sizes of a per-sample tensor in place; use the form that returns a new tensor.")
    view = dispatch(ctx, getattr(packet, name), args, kwargs)
    _guards.settle(ctx)
    torch.Tensor.data.__set__(x, view)  # type: ignore[attr-defined]
    x._value = view.physical
    return x


def _unwrap_list(ctx: Context, func: Any, items: Any) -> tuple[list[Any], bool, bool]:
    batched = lifted = False
    values = []
    for x in items:
        if type(x) is Batched and x.ctx is ctx:
            if x.shared:
                lifted = True
                x = x._value
            else:
                batched = True
        elif type(x) is Batched and (ctx.caller is None or x.ctx.closed):
            _guards.refuse_escaped("A list or keyword argument")
        elif isinstance(x, Tensor) and x.requires_grad:
            _guards.check_closure(ctx, x, func)
        values.append(x)
    return values, batched, lifted


def _run(ctx: Context, entry: Entry, func: Any, args: Any, values: list[Any], kwargs: Any) -> Any:
    """The op on per-sample arguments."""
    if ctx.caller is not None:
        with ctx.caller():
            values, kwargs = pytree.tree_map_only(Batched, lambda x: _adopt(ctx, x), (values, kwargs))
            out = _physical(ctx, entry, func, values, kwargs)
    else:
        out = _physical(ctx, entry, func, values, kwargs)
    if entry.foreign:
        check_result(func, values, kwargs, out, ctx.n)
    if func in EAGER:
        ctx.split.update((storage_of(x), x) for x in (args[0].physical, out))
    if entry.writes and _registry.returns_written(func):
        return _written(func, entry, args, out)
    return _rewrap(ctx, entry, func, out, args[0] if args else None)


def _adopt(ctx: Context, x: Batched) -> Batched:
    """Where one transform runs inside another, a tensor of the outer one must not look like one of this one's to a rule."""
    return x if x.ctx is ctx else wrap(ctx, x.expand(ctx.n, *x.shape))


def _physical(ctx: Context, entry: Entry, func: Any, values: list[Any], kwargs: Any) -> Any:
    if entry.run is not None:
        out = entry.run(*values, **kwargs)
        if out is not NotImplemented:
            return out
        if ctx.recorder is not None:
            ctx.recorder.took("fallback" if _fallback.has_vmap_rule(func) else "loop")
    if entry.random and _guards.draws(func, values, kwargs):
        _guards.check_random(ctx, func)
    if ctx.caller is not None:
        return _fall_back(ctx, func, values, kwargs)
    with all_keys(), torch.no_grad():
        return _fall_back(ctx, func, values, kwargs)


def _fall_back(ctx: Context, func: Any, values: list[Any], kwargs: Any) -> Any:
    try:
        return _fallback.run(func, tuple(values), kwargs, ctx.n, ctx.randomness)
    except PerSampleError:
        raise
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as err:
        raise UnsupportedError(
            f"`{func}` failed on per-sample tensors, and it has no rule here: {err}\nIf it works on one sample, register a rule with "
            "`per_sample.rule`, or write it with other ops."
        ) from err


def _run_shared(ctx: Context, entry: Entry, func: Any, args: Any, values: list[Any], kwargs: Any, lifted: bool) -> Any:
    """An op none of whose arguments differs between samples: once for all."""
    if entry.random and _guards.draws(func, values, kwargs) and ctx.randomness != "same":
        if ctx.randomness == "error":
            _guards.refuse_random(func)
        _guards.unshare_targets(ctx, args, values, entry.writes)
        if any(type(v) is Batched and v.ctx is ctx for v in values):
            return _run(ctx, entry, func, args, values, kwargs)
        _guards.check_shared_draw(ctx, func, entry.writes, values)
        return _fallback.shared_draw(func, tuple(values), kwargs, ctx)
    if not lifted:
        # Plain tensors of the caller's: autograd has seen them where they live.
        if entry.writes:
            _guards.check_outside(ctx, func, args, kwargs)
        see_conjugates()
        out = func(*args, **kwargs)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and (not entry.views or func is aten.lift_fresh.default):
                ctx.born.add(storage_of(x))
        return own_copies(ctx, entry, func, out) if ctx.expands else out
    if entry.writes:
        _guards.check_writes(ctx, func, args, entry.writes, values)
    run = functools.partial(_run_once, ctx, func, values, kwargs)
    out = run() if ctx.recorder is None else ctx.recorder.op(func, "shared", run)
    if entry.writes and _registry.returns_written(func):
        return _written(func, entry, args, out)
    if entry.views:
        for v in values:
            if isinstance(v, Tensor):
                ctx.view(v)
    if ctx.expands:
        out = own_copies(ctx, entry, func, out)
    if isinstance(out, Tensor):
        if not any(isinstance(v, Tensor) and v.layout is out.layout for v in values):
            _guards.check_layout(func, out)
        return _shared(ctx, out)
    if func is aten._pack_padded_sequence.default:
        # Recurrent layers read the batch sizes by pointer.
        return wrap_shared(ctx, out[0]), out[1]
    if isinstance(out, (tuple, list)):
        return type(out)(_shared(ctx, o) for o in out)
    return out


def _shared(ctx: Context, out: Any) -> Any:
    return wrap_shared(ctx, out) if isinstance(out, Tensor) and not (type(out) is Batched and out.ctx is ctx) else out


def _run_once(ctx: Context, func: Any, values: list[Any], kwargs: Any) -> Any:
    if ctx.caller is None and func in EAGER:
        out = EAGER[func](*values, **kwargs)
        ctx.split.update((storage_of(x), x) for x in (values[0], out))
        return out
    if ctx.caller is None:
        return func(*values, **kwargs)
    with ctx.caller():
        return RECORDED.get(func, func)(*values, **kwargs)


def _written(func: Any, entry: Entry, args: Any, out: Any) -> Any:
    if len(func._schema.returns) == 0:
        return None
    written = tuple(args[i] for i in entry.writes)
    return written if isinstance(out, (tuple, list)) else written[0]


def _rewrap(ctx: Context, entry: Entry, func: Any, out: Any, parent: Any) -> Any:
    """Wrap what a rule or the fallback returned."""
    kind = type(out)
    if kind is tuple or kind is list:
        return kind([_rewrap(ctx, entry, func, o, parent) for o in out])
    if kind is Plain:
        return out.value
    if isinstance(out, Tensor):
        if isinstance(out, Batched) and out.ctx is ctx:
            return out
        _guards.check_layout(func, out)
        if out.dim() == 0 or out.shape[0] != ctx.n:
            _guards.refuse_shape(func, entry.run, out, ctx.n)
        return wrap(ctx, out)
    return wrap_factor(ctx, out, parent if entry.views else None) if isinstance(out, Factor) else out
