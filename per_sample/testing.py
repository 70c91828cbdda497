"""Checks for users' own equivalence tests: a function against the reference, an op's rule against a loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from per_sample import _arguments, _registry, reference
from per_sample import _trees as trees
from per_sample._batched import Batched, Context, wrap
from per_sample._errors import ArgumentError, RuleError
from per_sample._interpreter import Interpreter
from per_sample._record import Recorder
from per_sample.transforms import per_sample_grad_and_value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch._ops import OpOverload

    from per_sample._arguments import Argnums
    from per_sample._signatures import Randomness


def assert_matches_reference(
    fn: Callable[..., Any],
    *args: Any,
    argnums: Argnums = 0,
    in_dims: Any = None,
    has_aux: bool = False,
    keep_batch_dim: bool = False,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
    rtol: float | None = None,
    atol: float | None = None,
    **kwargs: Any,
) -> None:
    """Assert that the fast per-sample gradients and values of ``fn`` equal those of ``vmap(grad(fn))``.

    Where ``torch.func`` cannot run ``fn`` (ops of ``torch.library``, writes that vmap refuses), they are compared with a loop of plain
    autograd.

    Args:
        fn: the loss of one sample.
        *args: its arguments, with a sample axis where batched.
        argnums: as in ``per_sample_grad``, and so are the other options.
        in_dims: as in ``per_sample_grad``.
        has_aux: as in ``per_sample_grad``.
        keep_batch_dim: as in ``per_sample_grad``.
        chunk_size: as in ``per_sample_grad``.
        randomness: as in ``per_sample_grad``; both runs start from the same seed.
        rtol: relative tolerance of ``torch.testing.assert_close``.
        atol: absolute tolerance.
        **kwargs: keyword arguments of ``fn``.

    Raises:
        AssertionError: if a gradient, a value or the structure differs.

    Example:
        >>> import torch
        >>> from per_sample.testing import assert_matches_reference
        >>> assert_matches_reference(lambda w, x: (x @ w).tanh().sum(), torch.ones(3, 2), torch.randn(5, 3))
    """
    options: dict[str, Any] = {
        "has_aux": has_aux,
        "keep_batch_dim": keep_batch_dim,
        "chunk_size": chunk_size,
        "randomness": randomness,
    }
    state = torch.get_rng_state()
    actual = per_sample_grad_and_value(fn, argnums, in_dims, **options)(*args, **kwargs)
    torch.set_rng_state(state)
    try:
        expected = reference.per_sample_grad_and_value(fn, argnums, in_dims, **options)(*args, **kwargs)
    except RuntimeError:
        # torch.func does not differentiate ops of `torch.library`, nor an autograd.Function in the old style, and vmap refuses some ops,
        # or fails in them (recurrent layers).
        if randomness != "error":
            raise
        expected = _by_loop(fn, argnums, in_dims, has_aux, keep_batch_dim, args, kwargs)
    found, spec = optree.tree_flatten(actual, none_is_leaf=True)
    wanted, wanted_spec = optree.tree_flatten(expected, none_is_leaf=True)
    assert spec == wanted_spec, f"structures differ: {spec} and {wanted_spec}"
    for got, want in zip(found, wanted, strict=True):
        if isinstance(want, Tensor):
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
        else:
            assert got == want, f"{got!r} is not {want!r}"


def _by_loop(
    fn: Callable[..., Any], argnums: Argnums, in_dims: Any, has_aux: bool, keep_batch_dim: bool, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Every sample's gradients and value by plain autograd, one sample after the other."""
    arguments = _arguments.read(args, argnums, in_dims)
    found = []
    for i in range(arguments.n):
        leaves, targets = [], []
        for x, dim, diff in zip(arguments.leaves, arguments.dims, arguments.diff, strict=True):
            own = x if dim is None else x.select(dim, i)
            if diff and isinstance(x, Tensor):
                own = own.detach().requires_grad_()
                targets.append(own)
            leaves.append(own.unsqueeze(0) if keep_batch_dim and dim is not None else own)
        out = fn(*trees.unflatten(arguments.spec, leaves), **kwargs)
        loss, aux = out if has_aux else (out, None)
        grads = torch.autograd.grad(loss, targets, materialize_grads=True)
        found.append((list(grads), loss.detach(), trees.map(lambda x: x.detach() if isinstance(x, Tensor) else x, aux)))
    grads, values, aux = trees.map(lambda *own: torch.stack(own) if isinstance(own[0], Tensor) else own[0], *found)
    structured = _arguments.as_arguments(grads, arguments, isinstance(argnums, tuple), args)
    return structured, ((values, aux) if has_aux else values)


def check_rule(op: OpOverload, *args: Any, rtol: float | None = None, atol: float | None = None, **kwargs: Any) -> None:
    """Assert that an op's rule gives each sample what the op itself gives it, for every choice of batched arguments.

    Args:
        op: the op overload, for instance ``torch.ops.mylib.scale.default``.
        *args: ONE sample's arguments. Other samples are made from them: noise is added to floating point, integers are exchanged for
            smaller ones of the same tensor and booleans for others, or repeated where the op refuses these.
        rtol: relative tolerance of ``torch.testing.assert_close``.
        atol: absolute tolerance.
        **kwargs: keyword arguments of the op.

    Raises:
        AssertionError: if a result, or an argument afterwards, differs from that of a loop over samples, or follows another sample's NaN.
        ArgumentError: if no argument is a tensor.
        RuleError: if the op has no rule, or that left all to the fallback.

    Example:
        >>> import torch
        >>> from per_sample.testing import check_rule
        >>> check_rule(torch.ops.aten.mm.default, torch.randn(2, 3), torch.randn(3, 4))
    """
    if op not in _registry.TABLE and torch.Tag.pointwise not in op.tags:
        raise RuleError(f"`{op}` has no rule; register one with `per_sample.rule`.")
    arguments: Any = (args, kwargs)
    paths, leaves, spec = optree.tree_flatten_with_path(arguments, none_is_leaf=True)
    tensors = [i for i, a in enumerate(leaves) if isinstance(a, Tensor)]
    if not tensors:
        raise ArgumentError("`check_rule` needs at least one argument that is a tensor.")
    recorder = Recorder()
    written = {i for i in tensors if _writes(op, paths[i])}
    for choice in [choice for choice in _choices(tensors) if written <= set(choice)]:
        where = f"`{op}` with {', '.join(_name(op, paths[i]) for i in choice)} batched"
        for n in (1, 3):
            rows, expected = _one_by_one(op, leaves, spec, choice, n)
            for innermost in (False, True):
                found = _at_once(op, leaves, spec, rows, n, recorder, innermost)
                _compare(where, range(n), found, expected, rtol, atol)
        try:
            found = _at_once(op, leaves, spec, {i: _with_nan(x) for i, x in rows.items()}, n, recorder)
        except Exception:
            continue
        _compare(f"{where} and NaN in sample 1", (0, 2), found, expected, rtol, atol)
    if not any(name == str(op) and route in ("rule", "pointwise") for name, route in recorder.rows):
        raise RuleError(f"The rule of `{op}` left every choice of batched arguments to the fallback.")


def _name(op: OpOverload, path: tuple[Any, ...]) -> str:
    kind, of, *places = path
    return "".join([of if kind else op._schema.arguments[of].name, *(f"[{place}]" for place in places)])


def _writes(op: OpOverload, path: tuple[Any, ...]) -> bool:
    """Whether the op writes into the argument, which then cannot be shared."""
    arguments = op._schema.arguments
    alias = (arguments[path[1]] if path[0] == 0 else next(a for a in arguments if a.name == path[1])).alias_info
    return alias is not None and alias.is_write


def _choices(tensors: list[int]) -> list[list[int]]:
    """Which tensors differ between samples: every choice, or each alone and all together where those are too many."""
    if len(tensors) > 6:
        return [*([i] for i in tensors), tensors]
    return [[i for bit, i in enumerate(tensors) if choice >> bit & 1] for choice in range(1, 2 ** len(tensors))]


def _one_by_one(op: OpOverload, leaves: list[Any], spec: Any, batched: list[int], n: int) -> tuple[dict[int, Tensor], list[Any]]:
    """The samples' arguments, and for each sample its arguments and results after a call of its own."""
    rows = {i: _samples_like(leaves[i], n) for i in batched}
    try:
        return rows, [_call(op, spec, [rows[i][j].clone() if i in rows else _copy(a) for i, a in enumerate(leaves)]) for j in range(n)]
    except Exception:
        exact = [i for i in batched if not leaves[i].dtype.is_floating_point and not leaves[i].dtype.is_complex]
        if not exact:
            raise
        # Some integers mean nothing to some ops: then only floating point differs.
        rows |= {i: leaves[i].detach().expand(n, *leaves[i].shape).clone() for i in exact}
        return rows, [_call(op, spec, [rows[i][j].clone() if i in rows else _copy(a) for i, a in enumerate(leaves)]) for j in range(n)]


def _at_once(
    op: OpOverload, leaves: list[Any], spec: Any, rows: dict[int, Tensor], n: int, recorder: Recorder, innermost: bool = False
) -> tuple[list[Any], list[Any]]:
    """The arguments and results after one call for all samples, these innermost in memory or not."""
    ctx = Context(n, recorder=recorder, simple=False)

    def lift(x: Tensor) -> Any:
        return wrap(ctx, x.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0) if innermost else x.clone())

    with torch.no_grad(), Interpreter(ctx):
        return _call(op, spec, [lift(rows[i]) if i in rows else _copy(a) for i, a in enumerate(leaves)])


def _call(op: OpOverload, spec: Any, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
    args, kwargs = optree.tree_unflatten(spec, leaves)
    return leaves, optree.tree_leaves(op(*args, **kwargs), none_is_leaf=True)


def _compare(where: str, samples: Sequence[int], found: tuple[list[Any], list[Any]], expected: list[Any], rtol: Any, atol: Any) -> None:
    n = len(expected)
    for kind, what in enumerate(("argument", "result")):
        for k, got in enumerate(found[kind]):
            if not isinstance(got, Tensor):
                continue
            value = got.physical if type(got) is Batched and not got.shared else got.expand(n, *got.shape)
            for j in samples:
                try:
                    torch.testing.assert_close(value[j], expected[j][kind][k], rtol=rtol, atol=atol, equal_nan=True)
                except AssertionError as err:
                    raise AssertionError(f"{where}, sample {j}, {what} {k}{' afterwards' if kind == 0 else ''}: {err}") from err


def _with_nan(rows: Tensor) -> Tensor:
    rows = rows.clone()
    if rows.is_floating_point() or rows.is_complex():
        rows[1] = torch.nan
    return rows


def _samples_like(x: Tensor, n: int) -> Tensor:
    rows = x.detach().expand(n, *x.shape).clone()
    if x.is_floating_point() or x.is_complex():
        rows[1:] += torch.randn_like(rows[1:])
        return rows
    for j in range(1, n):
        rolled = x.detach().flatten().roll(j).view(x.shape)
        if x.dtype == torch.bool:
            rows[j] = ~x if torch.equal(rolled, x) else rolled
            continue
        # Never above what stands in this place, which may be the index that the place allows at most.
        smaller = torch.minimum(x, rolled)
        rows[j] = torch.where(x > 0, x - 1, x) if torch.equal(smaller, x) else smaller
    return rows


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x
