"""``functional``: a module and a loss as a pure function of one sample, against a loop over batches of one of the module itself."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from per_sample import (
    ArgumentError,
    BatchNormError,
    BatchSizeError,
    NotScalarError,
    RandomnessError,
    SharedWriteError,
    UnsupportedError,
    clipped_grad,
    functional,
    load_back,
    per_sample_grad,
    per_sample_grad_and_value,
    per_sample_grad_norm,
    per_sample_jacobian,
    set_grads,
)

N = 5


def looped(module: nn.Module, loss_of: Callable[[int], Tensor], n: int = N) -> dict[str, Tensor]:
    """Plain autograd on the module, one sample after the other."""
    names, leaves = zip(*[(name, p) for name, p in module.named_parameters() if p.requires_grad], strict=True)
    columns: list[list[Tensor]] = [[] for _ in leaves]
    for i in range(n):
        found = torch.autograd.grad(loss_of(i), leaves, allow_unused=True)
        for column, leaf, g in zip(columns, leaves, found, strict=True):
            column.append(torch.zeros_like(leaf) if g is None else g)
    return {name: torch.stack(column) for name, column in zip(names, columns, strict=True)}


def one(x: Tensor, i: int) -> Tensor:
    return x[i : i + 1]


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(6 * 4 * 5, 7)]
    model = nn.Sequential(*layers).double().eval()
    model[1].running_mean.normal_()  # type: ignore[operator,union-attr]
    return model


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, 2, 6, 7, dtype=torch.float64), torch.randint(7, (N,))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(6, 4)

    def forward(self, a: Tensor, b: Tensor, scale: float = 2.0) -> Tensor:
        return scale * (self.left(a) * self.right(b)).sum(-1)


class Keyed(nn.Module):
    """Called as the models of Hugging Face are."""

    def __init__(self, output: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.output = output

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        h = self.embedding(input_ids)
        if attention_mask is not None:
            h = h * attention_mask.unsqueeze(-1)
        logits = self.head(h.cumsum(1))
        return self.output(logits, logits.new_zeros(()) if labels is None else F.cross_entropy(logits.transpose(1, 2), labels))


class Output(UserDict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


def keyed_batch() -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(11, (N, 3))
    return {"input_ids": ids, "labels": torch.randint(11, (N, 3)), "attention_mask": torch.ones(N, 3, dtype=torch.float64)}


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(reduction="none")])
def test_a_module_and_a_loss(loss_fn: Any) -> None:
    model, (x, y) = network(), images()
    loss = functional(model, loss_fn)
    grads, values = per_sample_grad_and_value(loss)(loss.params, x, y)
    check(grads, looped(model, lambda i: loss_fn(model(one(x, i)), one(y, i)).sum()))
    torch.testing.assert_close(values, torch.stack([loss_fn(model(one(x, i)), one(y, i)).sum() for i in range(N)]))


def test_the_modules_own_parameters_make_the_result_differentiable() -> None:
    model, (x, y) = network(), images()
    loss = functional(model, F.cross_entropy)
    own = dict(model.named_parameters())
    norms = per_sample_grad_norm(loss)(own, x, y)
    torch.testing.assert_close(norms, per_sample_grad_norm(loss)(loss.params, x, y))
    found = torch.autograd.grad(norms.sum(), list(own.values()))

    def plain(params: dict[str, Tensor]) -> Tensor:
        grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
        return sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt().sum()  # type: ignore[union-attr,return-value]

    check(dict(zip(own, found, strict=True)), torch.func.grad(plain)(loss.params))


def test_the_same_function_under_torch_func() -> None:
    model, (x, y) = network(), images()
    loss = functional(model, F.cross_entropy)
    vmapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(loss.params, x, y)
    check(per_sample_grad(loss)(loss.params, x, y), vmapped)


def test_frozen_parameters_and_buffers_are_held_fixed() -> None:
    model, (x, y) = network(), images()
    model[0].requires_grad_(False)
    loss = functional(model, F.cross_entropy)
    assert list(loss.frozen) == ["0.weight", "0.bias"]
    assert list(loss.buffers) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert not loss.params.keys() & (loss.frozen.keys() | loss.buffers.keys())
    check(per_sample_grad(loss)(loss.params, x, y), looped(model, lambda i: F.cross_entropy(model(one(x, i)), one(y, i))))


def test_bound_tensors_replace_the_modules_own() -> None:
    model, (x, y) = network(), images()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].running_mean.add_(1)  # type: ignore[operator,union-attr]
        other[5].bias.mul_(3)  # type: ignore[operator,union-attr]
    loss = functional(model, F.cross_entropy).bind({"1.running_mean": other[1].running_mean, "5.bias": other[5].bias.detach()})  # type: ignore[dict-item,union-attr,operator]
    other[5].bias.requires_grad_(False)  # type: ignore[union-attr,operator]
    assert "5.bias" not in loss.params
    torch.testing.assert_close(loss.frozen["5.bias"], other[5].bias.detach())  # type: ignore[union-attr,operator]
    torch.testing.assert_close(loss.buffers["1.running_mean"], other[1].running_mean)
    before = copy.deepcopy(model.state_dict())
    check(per_sample_grad(loss)(loss.params, x, y), looped(other, lambda i: F.cross_entropy(other(one(x, i)), one(y, i))))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_the_module_runs_in_the_mode_it_is_in() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(2, (N,))
    loss = functional(model, F.cross_entropy)
    with pytest.raises(RandomnessError):
        per_sample_grad(loss)(loss.params, x, y)
    assert per_sample_grad(loss, randomness="different")(loss.params, x, y)["0.weight"].shape == (N, 4, 3)
    assert model.training
    model.eval()
    check(per_sample_grad(loss)(loss.params, x, y), looped(model, lambda i: F.cross_entropy(model(one(x, i)), one(y, i))))


def test_what_mixes_samples_or_writes_buffers_is_refused() -> None:
    (x, y), model = images(), network().train()
    loss = functional(model, F.cross_entropy)
    with pytest.raises(BatchNormError, match=r"1 batch norm layer.*'1'.*eval mode, or use group"):
        per_sample_grad(loss)(loss.params, x, y)
    # Without running statistics, in either mode, a batch of one is an instance norm, and a batch of several another function.
    for training in (True, False):
        loss = functional(
            nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).double().train(training), forward=lambda m, x: m(x).sum()
        )
        with pytest.raises(BatchNormError, match=r"no running statistics for eval mode: use group"):
            per_sample_grad(loss)(loss.params, x)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).double()
    loss = functional(spectral, F.mse_loss)
    with pytest.raises(SharedWriteError):
        per_sample_grad(loss)(loss.params, torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64))


def test_several_inputs_and_plain_values() -> None:
    model = TwoTowers().double()
    a, b, y = (torch.randn(N, *shape, dtype=torch.float64) for shape in ((3,), (6,), ()))
    loss = functional(model, F.mse_loss)
    check(per_sample_grad(loss)(loss.params, a, b, y), looped(model, lambda i: F.mse_loss(model(one(a, i), one(b, i)), one(y, i))))
    check(
        per_sample_grad(loss)(loss.params, a, b, 0.5, y), looped(model, lambda i: F.mse_loss(model(one(a, i), one(b, i), 0.5), one(y, i)))
    )


@pytest.mark.parametrize(
    "output", [lambda _, loss: loss, lambda logits, loss: {"logits": logits, "loss": loss}, lambda _, loss: Output(loss=loss)]
)
def test_a_module_with_a_loss_of_its_own(output: Any) -> None:
    model, batch = Keyed(output).double(), keyed_batch()
    loss = functional(model)

    def plain(i: int) -> Tensor:
        found = model(**{name: one(part, i) for name, part in batch.items()})
        return found if isinstance(found, Tensor) else found["loss"]

    assert list(loss.params) == ["embedding.weight"]  # tied
    check(per_sample_grad(loss)(loss.params, batch), looped(model, plain))
    check(per_sample_grad(loss)(loss.params, UserDict(batch)), looped(model, plain))


def test_a_dict_of_inputs_and_a_target() -> None:
    model, batch = Keyed(lambda logits, _: logits).double(), keyed_batch()
    y = batch.pop("labels")

    def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    loss = functional(model, loss_fn)
    expected = looped(model, lambda i: loss_fn(model(**{name: one(part, i) for name, part in batch.items()}), one(y, i)))
    check(per_sample_grad(loss)(loss.params, batch, y), expected)


def test_a_forward_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x, z = torch.randn(N, 2, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)

    def distance(model: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        return (model(x) - model(z)).square().sum()

    loss = functional(model, forward=distance)
    check(per_sample_grad(loss)(loss.params, x, z), looped(model, lambda i: distance(model, one(x, i), one(z, i))))


# torch.func.hessian imports what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_second_derivatives_inside_the_forward() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(N, 2, dtype=torch.float64)

    def residual(model: nn.Module, x: Tensor) -> Tensor:
        return torch.func.hessian(lambda x: model(x).squeeze())(x).trace().square()

    loss = functional(model, forward=residual, keep_batch_dim=False)
    check(per_sample_grad(loss)(loss.params, x), looped(model, lambda i: residual(model, x[i])))


def test_a_module_for_one_sample() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(N, 3, dtype=torch.float64), torch.randint(2, (N,))
    shapes: list[Sequence[int]] = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    loss = functional(model, F.cross_entropy, keep_batch_dim=False)
    found = per_sample_grad(loss)(loss.params, x, y)
    assert {tuple(shape) for shape in shapes} == {(3,)}
    check(found, looped(model, lambda i: F.cross_entropy(model(x[i]), y[i])))


def test_packed_sequences() -> None:
    lstm = nn.LSTM(3, 4).double()
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in (4, 2, 4, 3, 2)]
    y = torch.randn(N, 4, dtype=torch.float64)

    def last(lstm: nn.Module, packed: Any) -> Tensor:
        return lstm(packed)[1][0][-1]

    loss = functional(lstm, F.mse_loss, forward=last)
    found = per_sample_grad(loss)(loss.params, pack_sequence(sequences, enforce_sorted=False), y)
    check(found, looped(lstm, lambda i: F.mse_loss(last(lstm, pack_sequence([sequences[i]])), one(y, i))))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention, self.head = nn.LSTM(6, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
        h, _ = self.lstm(inputs["x"], (inputs["start"], torch.zeros_like(inputs["start"])))
        out: Tensor = self.head(self.attention(h, h, h, attn_mask=mask, need_weights=False)[0])
        return out


@pytest.mark.parametrize("dims", [({"x": 1, "start": 1}, None, 1), (1, None, 1)])
def test_a_module_that_wants_its_batch_elsewhere(dims: Any) -> None:
    model = SequenceFirst().double()
    x, start = torch.randn(7, N, 6, dtype=torch.float64), torch.randn(1, N, 4, dtype=torch.float64)
    mask, y = torch.randn(7, 7, dtype=torch.float64), torch.randn(7, N, 2, dtype=torch.float64)
    loss = functional(model, F.mse_loss, batch_dims=dims)
    assert loss.keep_batch_dim
    found = per_sample_grad(loss, in_dims=(None, 1, None, 1))(loss.params, {"x": x, "start": start}, mask, y)

    def of(i: int) -> Tensor:
        own: Tensor = F.mse_loss(model({"x": x[:, [i]], "start": start[:, [i]]}, mask), y[:, [i]])
        return own

    check(found, looped(model, of))


@pytest.mark.parametrize("dims", [(1,), (1, 0, 0), {"x": 1}, "first", True, (1, (0, 0))])
def test_places_of_the_batch_that_do_not_fit(dims: Any) -> None:
    loss = functional(nn.Linear(3, 2), F.mse_loss, batch_dims=dims)
    with pytest.raises(ArgumentError, match="`batch_dims` has"):
        per_sample_grad(loss)(loss.params, torch.randn(N, 3), torch.randn(N, 2))


def test_it_compiles() -> None:
    model, (x, y) = network(), images()
    loss = functional(model, F.cross_entropy)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
        return clipped_grad(loss, max_norm=0.3)(params, x, y), per_sample_grad_norm(loss)(params, x, y)

    summed, norms = step(loss.params, x, y)
    check(summed, clipped_grad(loss, max_norm=0.3)(loss.params, x, y))
    torch.testing.assert_close(norms, per_sample_grad_norm(loss)(loss.params, x, y))


def test_params_are_those_that_the_module_has_now() -> None:
    model = nn.Linear(3, 2)
    loss = functional(model, F.mse_loss)
    with torch.no_grad():
        model.weight.fill_(5)
    assert loss.params["weight"].eq(5).all()
    assert not loss.params["weight"].requires_grad
    model.double()
    assert loss.params["weight"].dtype is torch.float64
    assert "2 parameters" in repr(loss)


def test_back_into_the_module() -> None:
    model, other = network(), network()
    loss = functional(model, F.cross_entropy)
    load_back(model, {name: p + 1 for name, p in loss.params.items()})
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q + 1)
        assert p.requires_grad
    load_back(model, {"1.running_var": torch.full((6,), 4.0)})
    assert model[1].running_var.eq(4).all()  # type: ignore[union-attr,operator]


def test_gradients_for_an_optimizer() -> None:
    (x, y), model, other = images(), network(), network()
    loss = functional(model, F.cross_entropy)
    set_grads(model, {name: g.mean(0) for name, g in per_sample_grad(loss)(loss.params, x, y).items()})
    F.cross_entropy(other(x), y).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    half = nn.Linear(3, 2).bfloat16()
    set_grads(half, {"bias": torch.ones(2)})
    assert half.bias.grad is not None
    assert half.bias.grad.dtype is torch.bfloat16


def test_misuse_is_told() -> None:
    model, (x, y) = network(), images()
    loss = functional(model, F.cross_entropy)
    with pytest.raises(ArgumentError, match="must be an nn"):
        functional(F.cross_entropy, model)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`loss_fn` must be callable"):
        functional(model, y)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"missing \['0\.bias'\], not among them \['head'\]"):
        per_sample_grad(loss)({("head" if name == "0.bias" else name): p for name, p in loss.params.items()}, x, y)
    with pytest.raises(ArgumentError, match="first argument is the parameters by name"):
        per_sample_grad(loss)(x[0], x, y)
    with pytest.raises(ArgumentError, match=r"takes \(params, \*inputs, target\)"):
        per_sample_grad(loss)(loss.params, x)
    with pytest.raises(ArgumentError, match=r"by position; got \['target'\] by name"):
        per_sample_grad(loss)(loss.params, x, target=y)
    with pytest.raises(BatchSizeError, match="keyword arguments are shared"):
        per_sample_grad(loss)(loss.params, input=x, target=y)
    with pytest.raises(ArgumentError, match=r"'weight \d', 'weight \d'\] and 4 more"):
        load_back(model, {f"weight {i}": x for i in range(9)})
    with pytest.raises(ArgumentError, match="leave `keep_batch_dim` out"):
        per_sample_grad(loss, keep_batch_dim=True)
    with pytest.raises(ArgumentError, match="a dict without one"):
        per_sample_grad(functional(Keyed(lambda logits, _: {"logits": logits}).double()))(
            {"embedding.weight": torch.ones(11, 4, dtype=torch.float64)}, keyed_batch()
        )
    with pytest.raises(NotScalarError):
        per_sample_grad(functional(model))(loss.params, x)
    with pytest.raises(ArgumentError, match="does not have"):
        load_back(model, {"nowhere": x})
    with pytest.raises(ArgumentError, match="Sum or average over the samples first"):
        set_grads(model, per_sample_grad(loss)(loss.params, x, y))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ArgumentError, match="must have the shape"):
        loss.bind({"5.bias": torch.ones(3)})
    with pytest.raises(UnsupportedError, match="run the module once"):
        _ = functional(nn.LazyLinear(3), F.mse_loss).params


def test_the_output_comes_out_beside_the_loss() -> None:
    model, (x, y) = network(), images()
    loss = functional(model, F.cross_entropy, has_aux=True)
    grads, logits = per_sample_grad(loss, has_aux=True)(loss.params, x, y)
    torch.testing.assert_close(logits, torch.cat([model(one(x, i)) for i in range(N)]))
    check(grads, per_sample_grad(functional(model, F.cross_entropy))(loss.params, x, y))
    _, again = per_sample_grad_norm(loss, has_aux=True)(loss.params, x, y)
    torch.testing.assert_close(again, logits)
    with pytest.raises(NotScalarError, match="has_aux=True"):
        per_sample_grad(loss)(loss.params, x, y)


def test_what_a_forward_returns_beside_the_loss() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(N, 3, dtype=torch.float64)

    def forward(model: nn.Module, x: Tensor) -> Any:
        h = model(x)
        return h.square().sum(), {"h": h, "mean": h.mean(), "name": "linear"}

    loss = functional(model, forward=forward, has_aux=True)
    _, aux = per_sample_grad(loss, has_aux=True)(loss.params, x)
    torch.testing.assert_close(aux["h"], model(x))
    assert (aux["mean"].shape, aux["name"]) == ((N,), "linear")
    own = functional(Keyed(lambda logits, loss: Output(loss=loss, logits=logits)).double(), has_aux=True)
    _, aux = per_sample_grad(own, has_aux=True)(own.params, keyed_batch())
    assert (aux["logits"].shape, aux["loss"].shape) == ((N, 3, 11), (N,))
    with pytest.raises(ArgumentError, match="must return a pair"):
        per_sample_grad(functional(model, has_aux=True), has_aux=True)(loss.params, x)


def test_several_outputs_have_a_jacobian() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(N, 3, dtype=torch.float64)
    outputs = functional(model)
    jacobian = per_sample_jacobian(outputs)(outputs.params, x)
    expected = torch.stack([torch.stack([torch.autograd.grad(model(x[i])[k], model.weight)[0] for k in range(2)]) for i in range(N)])
    torch.testing.assert_close(jacobian["weight"], expected)
    with pytest.raises(NotScalarError, match=r"shape \[2\]. Reduce it"):
        per_sample_grad(outputs)(outputs.params, x)


def test_raw_errors_have_notes_where_a_module_was_misunderstood() -> None:
    model, (x, y) = network(), images()
    wants_logits = functional(Keyed(lambda logits, loss: Output(logits=logits)).double(), F.cross_entropy)
    with pytest.raises(TypeError, match="must be Tensor") as caught:
        per_sample_grad(wants_logits)(wants_logits.params, keyed_batch(), y)
    assert any("output.logits" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError) as caught:
        per_sample_grad(model)(functional(model, F.cross_entropy).params, x, y)
    assert any("functional(module, loss_fn)" in note for note in caught.value.__notes__)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad_mode", [False, True])
def test_a_frozen_encoder_with_padding_is_refused_while_torch_would_fuse_it(grad_mode: bool) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(8, 1)}).double().eval()
    encoder.requires_grad_(False)
    x, mask = torch.randn(N, 4, 8, dtype=torch.float64), torch.zeros(N, 4, dtype=torch.bool)

    def forward(model: Any, x: Tensor, mask: Tensor) -> Tensor:
        with torch.set_grad_enabled(grad_mode):
            h = model["encoder"](x, src_key_padding_mask=mask)
        return model["head"](h.mean(1)).sum()

    loss = functional(model, forward=forward)
    check(per_sample_grad(loss)(loss.params, x, mask), looped(model, lambda i: forward(model, one(x, i), one(mask, i))))
    mask[1, 2:] = True
    with pytest.raises(UnsupportedError, match="set_fastpath_enabled"):
        per_sample_grad(loss)(loss.params, x, mask)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        check(per_sample_grad(loss)(loss.params, x, mask), looped(model, lambda i: forward(model, one(x, i), one(mask, i))))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    encoder.requires_grad_(True)
    if grad_mode:
        check(per_sample_grad(loss)(loss.params, x, mask), looped(model, lambda i: forward(model, one(x, i), one(mask, i))))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_module_of_torchscript_is_refused() -> None:
    with pytest.raises(ArgumentError, match="TorchScript"):
        functional(torch.jit.script(nn.Linear(3, 2)), F.cross_entropy)


def test_classes_that_are_no_integers_are_told() -> None:
    loss = functional(nn.Linear(3, 2), F.cross_entropy)
    with pytest.raises(RuntimeError, match=r"must be an integer; got torch.float32"):
        per_sample_grad(loss)(loss.params, torch.randn(4, 3), torch.zeros(4))


def test_a_module_with_the_hooks_of_another_library_is_refused() -> None:
    model = network()
    model.autograd_grad_sample_hooks = []  # as Opacus leaves it
    with pytest.raises(ArgumentError, match="to_standard_module"):
        functional(model, F.cross_entropy)


def test_parameters_can_be_read_in_a_compiled_function() -> None:
    model, (x, y) = network(), images()
    loss = functional(model, F.cross_entropy)
    step = torch.compile(lambda x, y: per_sample_grad_norm(loss)(loss.params, x, y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x, y), per_sample_grad_norm(loss)(loss.params, x, y))


class Twice(nn.Module):
    """One part under two names, and one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(3, 3)
        self.c = nn.Linear(3, 3)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


def test_parts_under_two_names_compile() -> None:
    model = Twice().double()
    loss = functional(model, F.mse_loss)
    own = dict(model.named_parameters())
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    step = torch.compile(lambda p, x, y: per_sample_grad(loss)(p, x, y), fullgraph=True, backend="aot_eager")
    for params in (loss.params, {name: p + 1 for name, p in loss.params.items()}):
        torch.testing.assert_close(step(params, x, y), per_sample_grad(loss)(params, x, y))
        assert all(p is own[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["a.weight", "b.weight", "c.weight"])
def test_a_tied_tensor_is_bound_by_any_of_its_names(name: str) -> None:
    model = Twice().double()
    loss = functional(model, F.mse_loss)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    other = torch.randn(3, 3, dtype=torch.float64)
    bound = loss.bind({name: other})
    assert (bound.params.keys(), bound.frozen.keys()) == ({"a.bias", "c.bias"}, {"a.weight"})
    expected = per_sample_grad(loss)({**loss.params, "a.weight": other}, x, y)
    step = torch.compile(lambda p, x, y: per_sample_grad(bound)(p, x, y), fullgraph=True, backend="aot_eager")
    for found in (per_sample_grad(bound)(bound.params, x, y), step(bound.params, x, y)):
        torch.testing.assert_close(found, {key: expected[key] for key in found})
    assert loss.bind(model.state_dict()).frozen.keys() == {"a.weight", "a.bias", "c.bias"}
    with pytest.raises(ArgumentError, match="which are tied"):
        loss.bind({"a.weight": other, "c.weight": 2 * other})


def test_an_error_in_a_compiled_program_is_itself_and_passes() -> None:
    model, (x, y) = network(), images()
    loss = functional(model, F.cross_entropy)
    wrong = [False]

    def fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        if wrong[0]:
            raise ValueError("mine")
        return loss(params, x, y)

    step = torch.compile(lambda p, x, y: per_sample_grad_norm(fn)(p, x, y), backend="aot_eager")
    expected = per_sample_grad_norm(loss)(loss.params, x, y)
    torch.testing.assert_close(step(loss.params, x, y), expected)
    wrong[0] = True
    with pytest.raises(ValueError, match="mine"):
        step(loss.params, x, y)
    wrong[0] = False
    torch.testing.assert_close(step(loss.params, x, y), expected)
    model.train()
    with pytest.raises(BatchNormError):
        step(loss.params, x, y)
    model.eval()
    torch.testing.assert_close(step(loss.params, x, y), expected)
