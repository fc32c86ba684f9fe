"""Every backend against one backward pass per sample, on models of many kinds."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alpha_optim import AlphaGuided
from tests import zoo
from tests.parity import QUANTITIES
from tests.reference.per_sample_loop import observe_run

SIZES = [6, 6, 4, 6]


def train(guided, model, loss_fn, batches):
    for x, y in batches:
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    return list(guided.alpha_history)


def check(measured, expected, tolerance=1e-9):
    assert len(measured) == len(expected)
    for m, row in zip(measured, expected, strict=True):
        assert m.information == "full"
        for name in QUANTITIES:
            assert getattr(m, name) == pytest.approx(row[name], rel=tolerance, abs=tolerance), name


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.3),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02),
}


@pytest.mark.compatibility(
    "Models",
    "convolutions, embeddings, attention, recurrent layers, tied weights, bare parameters",
)
@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["layerwise", "auto", "cached"])
def test_models_of_many_kinds(name, optimizer, backend):
    if backend == "cached" and name in zoo.NOT_CACHED:
        pytest.skip("vmap knows no rule for it; layerwise covers it")
    model, batches = zoo.make(name, SIZES)
    twin = copy.deepcopy(model)
    build = OPTIMIZERS[optimizer]
    expected = observe_run(twin, zoo.cross_entropy_of_one, F.cross_entropy, build(twin.parameters()), batches)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(build(model.parameters()), model, loss_fn, backend=backend, variance="exact")
    check(train(guided, model, loss_fn, batches), expected)


def with_two_rates(params):
    params = list(params)
    return torch.optim.SGD(
        [{"params": [p for p in params if p.dim() > 1], "lr": 0.3}, {"params": [p for p in params if p.dim() <= 1]}],
        lr=0.02,
    )


@pytest.mark.parametrize("backend", ["layerwise", "auto", "backpack", "cached"])
def test_weights_and_biases_of_one_layer_with_rates_of_their_own(backend):
    model, batches = zoo.make("in-place relu", SIZES)
    twin = copy.deepcopy(model)
    expected = observe_run(twin, zoo.cross_entropy_of_one, F.cross_entropy, with_two_rates(twin.parameters()), batches)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(with_two_rates(model.parameters()), model, loss_fn, backend=backend, variance="exact")
    check(train(guided, model, loss_fn, batches), expected)


@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - zoo.NOT_CACHED))
def test_float32_agrees_with_individual_gradients(name):
    histories = []
    for backend in ("layerwise", "cached"):
        model, batches = zoo.make(name, SIZES, torch.float32)
        loss_fn = nn.CrossEntropyLoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        guided = AlphaGuided(optimizer, model, loss_fn, backend=backend, variance="exact")
        histories.append(train(guided, model, loss_fn, batches))
    for m, reference in zip(*histories, strict=True):
        assert m.information == reference.information == "full"
        for name_of in QUANTITIES:
            assert getattr(m, name_of) == pytest.approx(getattr(reference, name_of), rel=1e-4), name_of
        assert m.alpha == pytest.approx(reference.alpha, abs=1e-4 * (abs(reference.alpha) + reference.alpha_std))


LOSSES = {
    "cross entropy": (nn.CrossEntropyLoss(), lambda o, y, i: F.cross_entropy(o, y)),
    "label smoothing": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda o, y, i: F.cross_entropy(o, y, label_smoothing=0.1),
    ),
    "nll": (nn.NLLLoss(), lambda o, y, i: -o[0, y[0]]),
    "multi margin": (nn.MultiMarginLoss(), lambda o, y, i: F.multi_margin_loss(o, y)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss_fn, one = LOSSES[name]
    model, batches = zoo.make("in-place relu", SIZES)
    twin = copy.deepcopy(model)
    expected = observe_run(twin, one, loss_fn, torch.optim.SGD(twin.parameters(), lr=0.1), batches)
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn, variance="exact")
    check(train(guided, model, loss_fn, batches), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss])
def test_reductions_give_the_same_slopes_of_the_mean(kind, reduction):
    model, batches = zoo.make("in-place relu", SIZES)
    batches = [(x, torch.randn(len(x), 3, dtype=torch.float64)) for x, _ in batches]
    loss_fn = kind(reduction=reduction)
    factor = 0.01 / (18 if reduction == "sum" else 1)  # the same steps whatever the reduction
    twin = copy.deepcopy(model)

    def mean_loss(output, y):
        loss = loss_fn(output, y)
        return loss.mean() if reduction == "none" else loss

    def one(output, y, _index):
        return kind(reduction="sum" if reduction == "sum" else "mean")(output, y)

    expected = observe_run(twin, one, mean_loss, torch.optim.SGD(twin.parameters(), lr=factor), batches)
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=factor), model, loss_fn, variance="exact")
    check(train(guided, model, mean_loss, batches), expected)


@pytest.mark.parametrize("case", ["weights", "ignore_index", "both", "per pixel"])
def test_weighted_cross_entropy_is_normalised_to_its_mean(case):
    weight = None if case == "ignore_index" else torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    ignored = -100 if case == "weights" else 1
    loss_fn = nn.CrossEntropyLoss(weight=weight, ignore_index=ignored)
    if case == "per pixel":
        torch.manual_seed(1)
        model = nn.Conv2d(2, 3, 3, padding=1).double()
        batches = [(torch.randn(n, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (n, 6, 6))) for n in SIZES]
    else:
        model, batches = zoo.make("in-place relu", SIZES)
    twin = copy.deepcopy(model)
    runs = []
    for batch in range(len(batches)):
        y = batches[batch][1]
        kept = (y != ignored).double() * (torch.ones(3, dtype=torch.float64) if weight is None else weight)[y]
        runs.append((len(y), float(kept.sum())))
    current = {"batch": -1}

    def one(output, target, index):
        if index == 0:
            current["batch"] += 1
        samples, total = runs[current["batch"]]
        summed = nn.CrossEntropyLoss(weight=weight, ignore_index=ignored, reduction="sum")(output, target)
        return summed * samples / total

    expected = observe_run(twin, one, loss_fn, torch.optim.SGD(twin.parameters(), lr=0.1), batches)
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn, variance="exact")
    check(train(guided, model, loss_fn, batches), expected)


@pytest.mark.compatibility("Models", "BatchNorm in training mode: the share of each position")
def test_batch_norm_shares_sum_to_the_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)).double()
    loss_fn = nn.CrossEntropyLoss()
    batches = [(torch.randn(8, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (8,))) for _ in range(4)]
    both = {}
    for backend in ("backpack", "cached"):
        net = copy.deepcopy(model)
        guided = AlphaGuided(torch.optim.SGD(net.parameters(), lr=0.1), net, loss_fn, backend=backend, variance="exact")
        both[backend] = train(guided, net, loss_fn, batches)
    gradients_only = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn, backend="gradients")
    reference = train(gradients_only, model, loss_fn, batches)
    for a, b, c in zip(both["backpack"], both["cached"], reference, strict=True):
        assert a.information == b.information == "full"
        assert a.slope_end == pytest.approx(c.slope_end, rel=1e-9)
        assert a.slope_variance_start == pytest.approx(b.slope_variance_start, rel=1e-9)
        assert a.slope_variance_start > 0.0


def test_eval_mode_batch_norm_equals_the_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    _, batches = zoo.make("in-place relu", SIZES)
    twin, loss_fn = copy.deepcopy(model), nn.CrossEntropyLoss()
    expected = observe_run(
        twin, zoo.cross_entropy_of_one, F.cross_entropy, torch.optim.SGD(twin.parameters(), lr=0.1), batches
    )
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn, variance="exact")
    assert guided.backend == "backpack"
    check(train(guided, model, loss_fn, batches), expected)


@pytest.mark.parametrize("backend", ["backpack", "cached"])
def test_sampled_variances_come_from_the_first_16_samples_and_means_from_all(backend):
    model, batches = zoo.make("in-place relu", [40] * 3)
    twin = copy.deepcopy(model)
    loss_fn = nn.CrossEntropyLoss()
    exact = train(
        AlphaGuided(torch.optim.SGD(twin.parameters(), lr=0.1), twin, loss_fn, variance="exact"),
        twin,
        loss_fn,
        batches,
    )
    first, x16 = copy.deepcopy(model), [(x[:16], y[:16]) for x, y in batches]
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn, backend=backend)
    sampled = train(guided, model, loss_fn, batches)
    for a, b in zip(sampled, exact, strict=True):
        assert a.slope_start == pytest.approx(b.slope_start, rel=1e-9)
        assert a.loss_variance_start == pytest.approx(b.loss_variance_start, rel=1e-12)
        assert (a.samples_start, a.information) == (40, "full")
    # The end of the first pair is seen at parameters both runs share: compare with the loop.
    params = list(first.parameters())
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(params, lr=0.1)
    before = torch.cat([p.detach().flatten() for p in params])
    F.cross_entropy(first(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    d = torch.cat([p.detach().flatten() for p in params]) - before
    from tests.reference.per_sample_loop import gradients_of_samples

    _, rows = gradients_of_samples(first, zoo.cross_entropy_of_one, *x16[1], params)
    assert sampled[0].slope_variance_end == pytest.approx(float((rows @ d / d.norm()).var()), rel=1e-9)


@pytest.mark.parametrize("variance", ["exact", "sampled"])
def test_time_first_inside_the_model_is_no_matter(variance):
    class TimeMajor(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.RNN(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.cell(x.transpose(0, 1))[0][-1])

    torch.manual_seed(0)
    model, loss_fn = TimeMajor().double(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    batches = [(torch.randn(8, 7, 6, dtype=torch.float64), torch.randint(0, 3, (8,))) for _ in range(3)]
    bare = torch.optim.Adam(twin.parameters())
    expected = observe_run(twin, zoo.cross_entropy_of_one, F.cross_entropy, bare, batches)
    guided = AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn, variance=variance)
    check(train(guided, model, loss_fn, batches), expected)  # all eight samples are few enough


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_parameter_used_outside_any_module_call_has_the_whole_model_differentiated(kind):
    torch.manual_seed(0)
    model, loss_fn = zoo.Outside(6).double(), nn.CrossEntropyLoss()
    _, batches = zoo.make("in-place relu", [6] * 6)
    twin = copy.deepcopy(model)
    build = OPTIMIZERS[kind]
    expected = observe_run(twin, zoo.cross_entropy_of_one, F.cross_entropy, build(twin.parameters()), batches)
    guided = AlphaGuided(build(model.parameters()), model, loss_fn, variance="exact")
    measured = train(guided, model, loss_fn, batches)
    assert measured[0].information == "slopes"
    assert guided.backend == "layerwise"
    check(measured[2:], expected[2:])


class Noisy(nn.Module):
    """Draws random numbers, in a module that owns a parameter and in one that owns none."""

    def __init__(self):
        super().__init__()
        self.weight, self.rest = nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.rest(self.dropout((F.dropout(x, 0.5) @ self.weight).tanh()))


class Masked(Noisy):
    """The same with the masks given, each sample with its own."""

    def forward(self, both):
        x, first, second = both[:, :6], both[:, 6:12], both[:, 12:]
        return self.rest(second * ((first * x) @ self.weight).tanh())


def test_random_numbers_inside_a_layer_are_drawn_again():
    torch.manual_seed(0)
    model, loss_fn = Noisy().double(), nn.CrossEntropyLoss()
    twin = Masked().double()
    twin.load_state_dict(model.state_dict())
    _, batches = zoo.make("in-place relu", SIZES)
    masked = []
    for k, (x, y) in enumerate(batches):
        torch.manual_seed(k)
        first = F.dropout(torch.ones_like(x), 0.5)
        second = F.dropout(torch.ones(len(x), 5, dtype=x.dtype), 0.5)
        masked.append((torch.cat([x, first, second], 1), y))
    expected = observe_run(
        twin, zoo.cross_entropy_of_one, F.cross_entropy, torch.optim.Adam(twin.parameters(), lr=0.02), masked
    )
    guided = AlphaGuided(torch.optim.Adam(model.parameters(), lr=0.02), model, loss_fn, variance="exact")
    for k, (x, y) in enumerate(batches):
        torch.manual_seed(k)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        after = torch.get_rng_state()
        guided.step()
        assert torch.equal(after, torch.get_rng_state())
    check(list(guided.alpha_history), expected)


@pytest.mark.parametrize("backend", ["backpack", "layerwise"])
def test_inputs_that_the_next_batch_overwrites(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    batches = [(torch.randn(6, 40, dtype=torch.float64), torch.randint(0, 3, (6,))) for _ in range(4)]
    twin, loss_fn, memory = copy.deepcopy(model), nn.CrossEntropyLoss(), torch.empty(6, 40, dtype=torch.float64)
    bare = torch.optim.SGD(twin.parameters(), lr=0.3)
    expected = observe_run(twin, zoo.cross_entropy_of_one, F.cross_entropy, bare, batches)
    sgd = torch.optim.SGD(model.parameters(), lr=0.3)
    guided = AlphaGuided(sgd, model, loss_fn, variance="exact", backend=backend)
    for x, y in batches:
        guided.zero_grad()
        loss_fn(model(memory.copy_(x)), y).backward()
        guided.step()
    check(list(guided.alpha_history), expected)


@pytest.mark.parametrize("backend", ["auto", "layerwise"])
def test_momentum_that_is_switched_on_and_off(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    batches = [(torch.randn(6, 40, dtype=torch.float64), torch.randint(0, 3, (6,))) for _ in range(9)]
    twin, loss_fn = copy.deepcopy(model), nn.CrossEntropyLoss()

    class Switched(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            self.param_groups[0]["momentum"] = 0.9 if self.steps in (3, 4, 5) else 0.0
            self.steps += 1
            return super().step(closure)

    expected = observe_run(
        twin, zoo.cross_entropy_of_one, F.cross_entropy, Switched(twin.parameters(), lr=0.1), batches
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    guided = AlphaGuided(sgd, model, loss_fn, variance="exact", backend=backend)
    for step, (x, y) in enumerate(batches):
        sgd.param_groups[0]["momentum"] = 0.9 if step in (3, 4, 5) else 0.0
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    full = [k for k, m in enumerate(guided.alpha_history) if m.information == "full"]
    # BackPACK's way needs plain SGD already before the backward pass: the first other step is lost to it.
    assert set(range(8)) - set(full) == ({3} if backend == "auto" else set())
    check([guided.alpha_history[k] for k in full], [expected[k] for k in full])


class Positions(nn.Module):
    """Looks positions up once for the whole batch."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(3, 4), nn.Embedding(12, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head((self.tokens(x) + self.positions(torch.arange(x.shape[1]))).mean(1))


class Folded(Positions):
    """Looks up all tokens of the batch in one row."""

    def forward(self, x):
        rows = self.tokens(x.reshape(-1)).reshape(*x.shape, -1)
        return self.head(rows.mean(1))


@pytest.mark.parametrize("build", [Positions, Folded])
def test_positions_are_not_taken_for_rows_of_samples(build):
    torch.manual_seed(0)
    loss_fn = nn.CrossEntropyLoss()
    batches = [(torch.randint(0, 3, (6, 12)), torch.randint(0, 3, (6,))) for _ in range(5)]  # T = 2 N
    model = build().double()
    twin = copy.deepcopy(model)
    bare = torch.optim.Adam(twin.parameters(), lr=0.01)
    expected = observe_run(twin, zoo.cross_entropy_of_one, F.cross_entropy, bare, batches)
    guided = AlphaGuided(torch.optim.Adam(model.parameters(), lr=0.01), model, loss_fn, variance="exact")
    measured = train(guided, model, loss_fn, batches)
    check(measured[2:], expected[2:])


class TimeFirstCell(nn.Module):
    """Takes and returns ``[T, N, ...]``; ``pooled`` returns one row of N numbers for each sample."""

    def __init__(self, classes, pooled=False):
        super().__init__()
        self.cell, self.head, self.pooled = nn.RNN(6, 5), nn.Linear(5, classes), pooled

    def forward(self, x):
        output = self.head(self.cell(x)[0])
        return output.mean(0) if self.pooled else output


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [3, 6, 12])
@pytest.mark.parametrize("rows", ["flattened", "squares"])
def test_time_first_with_more_as_many_and_fewer_steps_than_samples(rows, steps, kind):
    samples, classes = 6, 4

    def loss_of_one(output, target, _):
        return F.mse_loss(output, target) if rows == "squares" else F.cross_entropy(output[0], target[0])

    def mean_loss(output, target):
        output, target = output.transpose(0, 1), target.transpose(0, 1)
        return loss_fn(*((output, target) if rows == "squares" else (output.flatten(0, 1), target.flatten())))

    class SamplesFirst(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    model = TimeFirstCell(classes).double()
    twin = SamplesFirst(copy.deepcopy(model))
    loss_fn = nn.MSELoss() if rows == "squares" else nn.CrossEntropyLoss()
    batches = []
    for _ in range(4):
        target = torch.randint(0, classes, (samples, steps))
        target = torch.randn(samples, steps, classes, dtype=torch.float64) if rows == "squares" else target
        batches.append((torch.randn(samples, steps, 6, dtype=torch.float64), target))
    expected = observe_run(twin, loss_of_one, mean_loss, OPTIMIZERS[kind](twin.parameters()), batches)
    guided = AlphaGuided(OPTIMIZERS[kind](model.parameters()), model, loss_fn, variance="exact", sample_dim=1)
    for x, target in batches:
        guided.zero_grad()
        output, wanted = model(x.transpose(0, 1)), target.transpose(0, 1)
        loss_fn(*((output, wanted) if rows == "squares" else (output.flatten(0, 1), wanted.flatten()))).backward()
        guided.step()
    check(list(guided.alpha_history), expected)


@pytest.mark.parametrize("variance", ["sampled", "exact"])
def test_pooled_rows_that_may_be_steps_in_time_are_declined(variance):
    torch.manual_seed(0)
    model, loss_fn = TimeFirstCell(6, pooled=True), nn.MSELoss()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters()), model, loss_fn, variance=variance, sample_dim=1)
    with pytest.warns(UserWarning, match="neither the samples of the model's batch nor a multiple"):
        for _ in range(4):
            guided.zero_grad()
            loss_fn(model(torch.randn(6, 6, 6)), torch.randn(6, 6)).backward()
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"slopes"}
    assert all(math.isnan(m.loss_variance_start) for m in guided.alpha_history)


@pytest.mark.compatibility("Loops", "two targets that are mixed (mixup, CutMix), with another weight in every batch")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_targets_that_are_mixed(kind, reduction, scale):
    """The weights of a batch add up to one; none of them may set the scale, which would be another one in each."""

    def mixed(loss_of, output, target):
        share = float(target[0, 2])
        return share * loss_of(output, target[:, 0].long()) + (1.0 - share) * loss_of(output, target[:, 1].long())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    twin, loss_fn = copy.deepcopy(model), nn.CrossEntropyLoss(reduction=reduction)
    batches = []
    for share in (0.9, 0.5, 1e-4, 0.3):
        targets = torch.randint(0, 4, (6, 2)).double()
        batches.append((torch.randn(6, 6).double(), torch.cat([targets, torch.full((6, 1), share)], 1)))
    expected = observe_run(
        twin,
        lambda output, target, _: mixed(F.cross_entropy, output, target),
        lambda output, target: mixed(F.cross_entropy, output, target) * scale,
        OPTIMIZERS[kind](twin.parameters()),
        batches,
    )
    guided = AlphaGuided(OPTIMIZERS[kind](model.parameters()), model, loss_fn, variance="exact")
    for x, target in batches:
        guided.zero_grad()
        (mixed(loss_fn, model(x), target).mean() * scale).backward()
        guided.step()
    check(list(guided.alpha_history), expected)


@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.5, 1.0), (0.0, 1.0), (3.0, 0.0), (-0.1, 2.0)])
def test_of_terms_of_two_predictions_the_largest_weight_sets_the_scale(weights):
    def total(outputs, y):
        return sum(weight * F.cross_entropy(output, y) for weight, output in zip(weights, outputs, strict=True))

    torch.manual_seed(0)
    model, loss_fn = zoo.TwoHeads(4, 4).double(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    batches = [(torch.randn(6, 6).double(), torch.randint(0, 4, (6,))) for _ in range(4)]
    mean = lambda outputs, y: total(outputs, y) / max(weights)  # noqa: E731
    bare = OPTIMIZERS["adamw"](twin.parameters())
    expected = observe_run(twin, lambda outputs, y, _: mean(outputs, y), total, bare, batches)
    guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), model, loss_fn, variance="exact")
    for x, y in batches:
        guided.zero_grad()
        sum(weight * loss_fn(output, y) for weight, output in zip(weights, model(x), strict=True)).backward()
        guided.step()
    check(list(guided.alpha_history), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
def test_ctc_losses_of_sequences_of_unequal_length(reduction, time_first, concatenated):
    """CTCLoss wants time first, whatever the model's output is; its mean divides by the lengths of the targets."""
    samples, steps, lengths = 6, 9, torch.tensor([4, 2, 3, 1, 4, 2])
    seen = torch.tensor([9, 9, 7, 8, 9, 6])
    loss_fn = nn.CTCLoss(reduction=reduction)

    class Recurrent(nn.Module):
        def __init__(self, time_first):
            super().__init__()
            self.cell, self.head = nn.GRU(6, 5, batch_first=not time_first), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.cell(x)[0]).log_softmax(-1)

    def loss_of_one(output, target, n):
        loss = F.ctc_loss(output.transpose(0, 1), target, seen[n : n + 1], lengths[n : n + 1], reduction="sum")
        return loss / lengths[n] if reduction == "mean" else loss

    def mean_loss(output, target):
        return torch.stack([loss_of_one(output[n : n + 1], target[n : n + 1], n) for n in range(samples)]).mean()

    torch.manual_seed(0)
    twin = Recurrent(False).double()
    model = Recurrent(time_first).double()
    model.load_state_dict(twin.state_dict())
    batches = [
        (torch.randn(samples, steps, 6, dtype=torch.float64), torch.randint(1, 4, (samples, 4))) for _ in range(4)
    ]
    expected = observe_run(twin, loss_of_one, mean_loss, OPTIMIZERS["momentum"](twin.parameters()), batches)
    # A sum is sent backward as a mean, so that both make the same steps.
    guided = AlphaGuided(
        OPTIMIZERS["momentum"](model.parameters()), model, loss_fn, variance="exact", sample_dim=int(time_first)
    )
    for x, target in batches:
        guided.zero_grad()
        output = model(x.transpose(0, 1) if time_first else x)
        output = output if time_first else output.transpose(0, 1)
        flat = torch.cat([row[:length] for row, length in zip(target, lengths, strict=True)])
        loss = loss_fn(output, flat if concatenated else target, seen, lengths)
        (loss / samples if reduction == "sum" else loss).backward()
        guided.step()
    check(list(guided.alpha_history), expected)
