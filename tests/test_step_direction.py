"""Which way and how far the parameters moved, against float64 arithmetic on whole vectors."""

import math

import pytest
import torch
from torch import nn

from alpha_optim.observe import inner_products
from alpha_optim.observe.inner_products import PIECE, squared_norms
from alpha_optim.observe.step_direction import AlongGradient, BetweenPoints, copied, is_plain_sgd, restored

SHAPES = [(7,), (3, 4), (PIECE // 4 + 5, 9), (2, 3, 3, 3), ()]


def flat(tensors):
    return torch.cat([torch.zeros(0) if t is None else t.detach().flatten() for t in tensors]).double()


def points(dtype=torch.float32, step=1e-2, scale=1.0):
    """Parameters before and after a step, and gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    before = [(scale * draw(shape)).to(dtype) for shape in SHAPES]
    after = [nn.Parameter((b.double() + step * draw(b.shape)).to(dtype)) for b in before]
    gradients = [draw(shape).to(dtype) for shape in SHAPES]
    return before, after, gradients


def check_length_and_products(dtype, overwrite):
    """Against whole vectors."""
    before, after, gradients = points(dtype)
    moved = [inner_products.at_least_float32(a.detach()) - b for a, b in zip(after, before, strict=True)]
    d, g = flat(moved), flat(gradients)
    exact = 1e-2 if dtype == torch.bfloat16 and overwrite else 1e-5
    direction, product = BetweenPoints.of([b.clone() for b in before], after, gradients, overwrite)
    assert float(direction.length) == pytest.approx(float(d.norm()), rel=exact)
    assert float(product) == pytest.approx(float(d @ g), rel=exact, abs=exact * float(d.norm() * g.norm()) * 1e-2)
    others = [torch.randn_like(g) for g in gradients]
    others[1] = None
    expected = flat([m for m, o in zip(moved, others, strict=True) if o is not None]) @ flat(others)
    assert float(direction.products(others)) == pytest.approx(float(expected), rel=10 * exact, abs=10 * exact)
    assert direction.is_step is overwrite
    assert bool(direction.moved)
    change, rounding = flat(direction.change().tensors()), 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(change, d, rtol=rounding, atol=rounding * float(d.abs().max()))
    assert torch.allclose(flat(direction.start()), flat(before), atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_length_and_products_are_those_of_whole_vectors(dtype, overwrite):
    check_length_and_products(dtype, overwrite)


@pytest.mark.parametrize("step", [1e-25, 1e15])
def test_lengths_whose_squares_leave_float32_are_right(step):
    before, after, gradients = points(step=step, scale=step)
    d = flat([a.detach() - b for a, b in zip(after, before, strict=True)])
    direction, _ = BetweenPoints.of(before, after, gradients, overwrite=True)
    assert float(direction.length) == pytest.approx(float(d.norm()), rel=1e-5)


def test_no_step_is_no_step():
    before, _, gradients = points()
    same = [nn.Parameter(b.clone()) for b in before]
    direction, product = BetweenPoints.of(before, same, gradients, overwrite=True)
    assert not bool(direction.moved)
    assert float(direction.length) == float(product) == 0.0


def sgd(**options):
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    model(torch.randn(4, 5)).square().sum().backward()
    return model, optimizer


def test_plain_sgd_is_told_from_all_else():
    for options in ({}, {"maximize": True}):
        assert is_plain_sgd(sgd(**options)[1])
    for options in ({"momentum": 0.9}, {"weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}):
        assert not is_plain_sgd(sgd(**options)[1])
    _, optimizer = sgd()
    optimizer.register_step_pre_hook(lambda *_: None)  # may change anything
    assert not is_plain_sgd(optimizer)

    class Mine(torch.optim.SGD):
        pass

    assert not is_plain_sgd(Mine(nn.Linear(2, 2).parameters(), lr=0.1))


@pytest.mark.parametrize("maximize", [False, True])
def test_the_step_of_plain_sgd_is_that_of_the_parameters(maximize):
    model, optimizer = sgd(maximize=maximize)
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    d = flat([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    direction = AlongGradient.of(optimizer, True)
    assert float(direction.length) == pytest.approx(float(d.norm()), rel=1e-5)
    assert float(direction.products([p.grad for p in model.parameters()])) == pytest.approx(
        float(d @ flat(gradients)), rel=1e-4
    )
    assert torch.allclose(flat(direction.change().tensors()), d, atol=1e-6)
    assert torch.allclose(flat(direction.start()), flat(before), atol=1e-6)
    assert direction.intact()
    model.weight.grad.add_(1.0)  # somebody writes to what is the step
    assert not direction.intact()


def test_gradients_that_are_kept_are_copies():
    model, optimizer = sgd()
    direction = AlongGradient.of(optimizer, True)
    kept = flat(direction.change().tensors())
    direction.keep()
    for p in model.parameters():
        p.grad.zero_()
    assert direction.intact()
    assert torch.equal(flat(direction.change().tensors()), kept)


@pytest.mark.parametrize("kind", ["along", "between", "between, shared"])
def test_a_state_builds_the_same_direction(kind):
    if kind == "along":
        model, optimizer = sgd()
        params, direction = list(model.parameters()), AlongGradient.of(optimizer, True)
    else:
        before, params, gradients = points()
        direction, _ = BetweenPoints.of(before, params, gradients, overwrite=kind == "between")
    again = restored(direction.state(), params)
    assert again is not None
    assert float(again.length) == pytest.approx(float(direction.length), rel=1e-12)
    gradients = [torch.randn_like(p) for p in params]
    assert float(again.products(gradients)) == pytest.approx(float(direction.products(gradients)), rel=1e-12)
    assert again.belongs_to(params)
    assert not again.belongs_to(params[:-1])
    assert restored(direction.state(), params[:-1]) is None


def test_copies_use_the_memory_that_fits():
    first = [torch.zeros(3), torch.zeros(2, 2)]
    store = copied([], first)
    again = copied(store, [torch.ones(3), torch.ones(2, 2)])
    assert all(a is b for a, b in zip(store, again, strict=True))
    assert all(bool((t == 1).all()) for t in again)
    other = copied(store, [torch.ones(4), torch.ones(2, 2)])
    assert other[0].shape == (4,)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_squared_norms_of_any_size(size):
    tensors = [size * torch.randn(50), None, size * torch.randn(3, 3)]
    found = squared_norms(tensors, torch.device("cpu"))
    assert found[1] is None
    expected = [float(t.double().square().sum()) for t in tensors if t is not None]
    assert [found[0], found[2]] == pytest.approx(expected, rel=1e-5)
    (overflown,) = squared_norms([torch.tensor([math.inf])], torch.device("cpu"))
    assert math.isinf(overflown)


def test_pieces_are_smaller_than_what_they_are_cut_from(monkeypatch):
    """The same numbers whatever the size of a piece."""
    results = []
    for piece in (PIECE, 10, 1):
        monkeypatch.setattr(inner_products, "PIECE", piece)
        before, after, gradients = points(torch.float64)
        before, after, gradients = before[:2], after[:2], gradients[:2]
        direction, product = BetweenPoints.of(before, after, gradients, overwrite=True)
        results.append((float(direction.length), float(product)))
    assert results[1] == pytest.approx(results[0], rel=1e-12)
    assert results[2] == pytest.approx(results[0], rel=1e-12)


@pytest.fixture
def waits(monkeypatch):
    """Numbers are read as from an accelerator: not at all."""
    for module in ("inner_products", "step_direction"):
        monkeypatch.setattr(f"alpha_optim.observe.{module}.free_to_read", lambda device: False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_many_tensors_as_one_vector_give_the_same(dtype, overwrite, waits, monkeypatch):
    bundles, found = inner_products._bundles, []

    def noted(*args):
        found.append(bundles(*args))
        return found[-1]

    monkeypatch.setattr(inner_products, "_bundles", noted)
    sizes = []
    for name, elements in ((None, None), ("TOGETHER", 40), ("ALONE", 10)):
        if name is not None:
            monkeypatch.setattr(inner_products, name, elements)
        found.clear()
        check_length_and_products(dtype, overwrite)
        sizes.append(max(len(bundle) for each in found for bundle in each))
    assert sizes == [len(SHAPES), 2, 2]  # all of them, then at most 40 elements, then those below 10


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_many_small_tensors_go_together_on_the_cpu(dtype, overwrite, monkeypatch):
    calls, flatten = [], torch._utils._flatten_dense_tensors

    def noted(tensors):
        calls.append(len(tensors))
        return flatten(tensors)

    monkeypatch.setattr(torch._utils, "_flatten_dense_tensors", noted)
    check_length_and_products(dtype, overwrite)
    assert not calls  # they are few
    monkeypatch.setattr(inner_products, "FEW", 1)
    check_length_and_products(dtype, overwrite)
    assert max(calls) == len(SHAPES) - 1  # all but the large one


@pytest.mark.parametrize("few", [1, inner_products.FEW])
def test_on_the_cpu_tensors_with_gaps_sparse_ones_and_many_rates(few, monkeypatch):
    monkeypatch.setattr(inner_products, "FEW", few)
    check_unusual_tensors()


def test_of_tensors_with_gaps_sparse_ones_and_many_rates(waits):
    check_unusual_tensors()


def check_unusual_tensors():
    """Against dense products, one by one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ones = [draw(3, 4), draw(4, 3).t(), draw(2, 3, 4, 4).to(memory_format=torch.channels_last), None, draw(5), draw(6)]
    others = [draw(4, 3).t(), draw(3, 4), draw(2, 3, 4, 4), draw(2), draw(5).to_sparse(), draw(6)]
    rates = [0.1, 0.1, torch.tensor(0.2), 0.3, 0.3, 0.4]
    expected = sum(
        float(rate) * float((one * other.to_dense()).sum())
        for one, other, rate in zip(ones, others, rates, strict=True)
        if one is not None
    )
    found = inner_products.product(ones, others, torch.device("cpu"), rates)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_tiny_steps_of_many_tensors_have_a_length(waits):
    before, after, gradients = points(scale=0.0, step=1e-25)
    direction, _ = BetweenPoints.of([b.clone() for b in before], after, gradients, overwrite=False)
    assert float(direction.length) == pytest.approx(float(flat(after).norm()), rel=1e-6)
