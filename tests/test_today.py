"""Alpha in full for what people train today, and nothing of the run changed by it."""

import dataclasses
import math

import pytest
import torch

from alpha_optim import AlphaGuided
from alpha_optim.observe import random_state
from alpha_optim.slopes import forward_mode, repetition
from alpha_optim.slopes.base import by_chance
from tests.reference.losses_of_samples import observe
from tests.test_transparency import equal_states
from tests.today import CASES, CROSS, GPT, Case, flattened, tokens

QUANTITIES = [
    "step_length",
    *(f"{name}_{end}" for name in ("loss", "loss_variance", "slope", "slope_variance") for end in ("start", "end")),
]


def make(case, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = case.build().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    return model, case.loss_fn(), lambda: case.batch(generator, dtype)


def adamw(model, case):
    return torch.optim.AdamW(model.parameters(), lr=case.lr, weight_decay=0.1)


def train(case, wrapped, steps, dtype=torch.float32, **options):
    model, loss_fn, batch = make(case, dtype)
    optimizer = adamw(model, case)
    if wrapped:
        optimizer = AlphaGuided(optimizer, model, loss_fn, **{**case.options, **options})
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss(optimizer, model, loss_fn, batch())
        optimizer.step()
    return model, optimizer, torch.get_rng_state()


@pytest.mark.compatibility(
    "Models",
    "language models in all ways of writing their loss, experts, VAE, U-Net, graphs, weight and spectral norm",
)
@pytest.mark.parametrize("name", CASES)
def test_the_full_fit_without_a_trace(name):
    case = CASES[name]
    bare, _, random = train(case, False, 12)
    model, guided, same_random = train(case, True, 12)  # a warning would be an error here
    assert {m.information for m in guided.alpha_history[2:]} == {"full"}
    assert {m.samples_start for m in guided.alpha_history} == {case.samples}
    assert len(guided.alpha_history) == 11
    assert equal_states(bare.state_dict(), model.state_dict())
    assert torch.equal(random, same_random)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.of_samples is not None])
def test_exact_variances_are_those_of_one_backward_pass_per_sample(name):
    case = CASES[name]
    _, guided, _ = train(case, True, 7, torch.float64, variance="exact")
    model, _, batch = make(case, torch.float64)
    bare = adamw(model, case)
    torch.manual_seed(1)  # as `train` does
    expected = observe(lambda given: case.of_samples(model, given), bare, [batch() for _ in range(7)])
    assert len(guided.alpha_history) == 6
    for m, row in list(zip(guided.alpha_history, expected, strict=True))[2:]:
        assert m.information == "full"
        for quantity in QUANTITIES:
            assert getattr(m, quantity) == pytest.approx(row[quantity], rel=1e-8, abs=1e-10), (m.iteration, quantity)


@pytest.mark.parametrize(
    "name", ["gpt, flattened", "gpt, returns its loss", "gpt, 24 samples", "vae", "graphs, pooled"]
)
def test_large_outputs_are_contracted_a_sample_at_a_time(name, monkeypatch):
    """In float64 the logits of a language model would take more memory than training it does."""
    case, found = CASES[name], []
    for elements in (repetition.TOGETHER, 8):
        monkeypatch.setattr(repetition, "TOGETHER", elements)
        _, guided, _ = train(case, True, 5, torch.float64)
        found.append([(m.slope_variance_start, m.slope_variance_end) for m in guided.alpha_history])
    assert found[0] == [pytest.approx(pair, rel=1e-10) for pair in found[1]]


@pytest.mark.parametrize(("rows", "samples", "fits"), [(12, 4, True), (5, 4, False), (3, 4, False)])
def test_large_outputs_whose_rows_are_no_samples_are_not_taken_apart(rows, samples, fits, monkeypatch):
    gradient, tangent = (torch.randn(rows, 4, dtype=torch.float64) for _ in range(2))
    small = repetition._contracted(gradient, tangent, samples, 0)
    monkeypatch.setattr(repetition, "TOGETHER", 1)
    large = repetition._contracted(gradient, tangent, samples, 0)
    assert (small is None) == (large is None) == (not fits)
    if fits:
        expected = (gradient * tangent).reshape(samples, -1).sum(1)
        assert torch.allclose(large, expected, rtol=1e-12)
        assert torch.allclose(small, expected, rtol=1e-12)


WIDE = Case(lambda: GPT(width=64, dropout=0.2), lambda g, d: tokens(g, d, 16), flattened, None, CROSS, samples=16)
UNREPEATABLE = {"gpt, dropout": CASES["gpt, dropout"], "24 samples": CASES["gpt, dropout, 24 samples"], "wide": WIDE}


@pytest.fixture
def drops_others(monkeypatch):
    """A GPU's fused attention drops other units than its plain kernels do with the same random numbers."""

    def others(call, replay, seed):
        return random_state.untouched(call.random.own, 1000 + (seed or 0))

    monkeypatch.setattr(repetition, "_random_numbers", others)
    return lambda: monkeypatch.setattr(forward_mode.ForwardMode, "_may_draw_others", lambda *_: True)


@pytest.mark.parametrize("name", UNREPEATABLE)
def test_dropout_that_cannot_be_repeated(name, drops_others):
    with pytest.warns(UserWarning, match="another run of the model does not repeat it"):
        train(UNREPEATABLE[name], True, 12)
    drops_others()
    _, guided, _ = train(UNREPEATABLE[name], True, 24)
    assert {m.information for m in guided.alpha_history} == {"full"}


@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_proves_no_random_numbers_to_be_those_of_the_loop(autocast, monkeypatch):
    """In 16 bits others may come as near by chance; then a later comparison would fail."""
    monkeypatch.setattr(forward_mode.ForwardMode, "_may_draw_others", lambda *_: True)

    def loss(optimizer, model, loss_fn, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            WIDE.loss(optimizer, model, loss_fn, batch)

    _, guided, _ = train(dataclasses.replace(WIDE, loss=loss), True, 12)
    assert guided._session.plan._built["layerwise"]._forward._draws_others == autocast
    assert {m.information for m in guided.alpha_history[2:]} == {"full"}


def test_variances_with_other_dropout_are_those_of_the_dropout_of_the_loop(request):
    _, same, _ = train(WIDE, True, 24, variance="exact")
    request.getfixturevalue("drops_others")()
    _, others, _ = train(WIDE, True, 24, variance="exact")
    assert [m.information for m in others.alpha_history[1:]] == ["full"] * 22
    pairs = list(zip(others.alpha_history, same.alpha_history, strict=True))[1:]
    for name in ("slope_variance_start", "slope_variance_end"):
        ratios = [getattr(m, name) / getattr(n, name) for m, n in pairs]
        assert ratios != [1.0] * 22
        assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.25)  # each scatters by about a third
    assert [m.slope_end for m in others.alpha_history] == [m.slope_end for m in same.alpha_history]


@pytest.mark.parametrize("name", UNREPEATABLE)
def test_a_term_of_the_loss_that_is_not_seen_where_dropout_cannot_be_repeated(name, drops_others):
    """The sum over samples then tells only at the end of a step, and but for chance."""
    case = UNREPEATABLE[name]

    def loss(optimizer, model, loss_fn, batch):
        case.loss(optimizer, model, loss_fn, batch)
        (3.0 * sum(p.sum() for p in model.parameters())).backward()

    drops_others()
    with pytest.warns(UserWarning, match="not all of the loss that is sent backward"):
        _, guided, _ = train(dataclasses.replace(case, loss=loss), True, 12)
    assert {m.information for m in guided.alpha_history} == {"slopes"}


def test_of_one_sample_nothing_is_known_by_chance():
    assert by_chance(torch.tensor([1.0])) == math.inf
    assert by_chance(torch.tensor([1.0, 1.0])) == 0.0
    assert 0.0 < by_chance(torch.tensor([1.0, 2.0, 4.0])) < math.inf
