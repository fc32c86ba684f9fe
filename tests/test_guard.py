"""Steps are taken back bit for bit, and nothing ever holds a nan."""

import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from alpha_optim.alpha.loss_level import FALSE_ALARM, LossScatter, quantile
from alpha_optim.measure.step_ends import BatchLoss
from alpha_optim.steer.guard import PATIENCE, Guard
from tests.test_transparency import OPTIMIZERS


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def batches(count, size=32):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x = torch.randn(size, 6, generator=generator)
        yield x, (x[:, :3].argmax(1))


def all_finite(model):
    return all(bool(torch.isfinite(v).all()) for v in model.state_dict().values() if v.is_floating_point())


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


KINDS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def guarded(kind="sgd", policy=None, model=None, **options):
    model, loss_fn = make_model() if model is None else model, nn.CrossEntropyLoss()
    guided = AlphaGuided(KINDS[kind](model.parameters()), model, loss_fn)
    return model, loss_fn, guided, AlphaScheduler(guided, Hold() if policy is None else policy, **options)


def go(model, loss_fn, guided, scheduler, data):
    """One call of the loop per batch; returns the points before the forward passes and the losses."""
    points, losses = [], []
    for x, y in data:
        guided.zero_grad()
        points.append(snapshot(model))
        loss = loss_fn(model(x), y)
        losses.append(loss.item())
        loss.backward()
        guided.step()
        scheduler.step()
    return points, losses


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_not_finite_is_skipped_and_leaves_no_trace(kind):
    """Parameters, statistics, momentum, rates and what follows: as if the batch had never been there."""
    data = list(batches(30))
    bad = [(x * math.nan, y) if k in (5, 12, 20) else (x, y) for k, (x, y) in enumerate(data)]
    good = [pair for k, pair in enumerate(data) if k not in (5, 12, 20)]
    run, clean = guarded(kind), guarded(kind)
    go(*run, bad)
    go(*clean, good)
    assert same(snapshot(run[0]), snapshot(clean[0]))
    assert run[2].param_groups[0]["lr"] == clean[2].param_groups[0]["lr"]
    assert [(e.iteration, e.reason, e.restored, e.scale_factor) for e in run[2].guard_events] == [
        (5, "loss_not_finite", False, 1.0),
        (11, "loss_not_finite", False, 1.0),
        (18, "loss_not_finite", False, 1.0),
    ]
    assert run[2].iteration == 27
    assert run[2].alpha_history.dropped == {"not_finite": 3}
    assert all(math.isfinite(m.alpha_std) for m in run[2].alpha_history if m.iteration > 2)


@pytest.mark.parametrize("kind", KINDS)
def test_two_such_batches_take_the_last_step_back_bit_for_bit(kind):
    data = [(x * math.nan, y) if k in (5, 6) else (x, y) for k, (x, y) in enumerate(batches(9))]
    model, _, guided, scheduler = run = guarded(kind)
    lr = guided.param_groups[0]["lr"]
    points, _ = go(*run, data[:7])
    parameters = [name for name, _ in model.named_parameters()]
    assert all(torch.equal(points[4][name], snapshot(model)[name]) for name in parameters)
    assert [(e.restored, e.scale_factor) for e in guided.guard_events] == [(False, 1.0), (True, 0.5)]
    go(*run, data[7:])
    assert guided.param_groups[0]["lr"] == pytest.approx(lr / 2)
    assert all_finite(model)
    assert scheduler.last_epoch == 9


def test_three_such_batches_are_the_fault_of_the_data_and_the_rate_is_given_back():
    data = [(x * math.nan, y) if 5 <= k < 15 else (x, y) for k, (x, y) in enumerate(batches(20))]
    run = guarded("adam")
    with pytest.warns(UserWarning, match="data seem to be at fault") as caught:
        go(*run, data)
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 500
    guided = run[2]
    assert guided.param_groups[0]["lr"] == 0.01
    assert sum(event.restored for event in guided.guard_events) == 1
    assert guided.iteration == 10


def spiked(run, data, at, factor=1000.0):
    """A step at a rate far too high."""
    model, loss_fn, guided, scheduler = run
    points, losses = [], []
    for k, (x, y) in enumerate(data):
        for group in guided.param_groups:
            group["lr"] *= factor if k == at else 1.0
        guided.zero_grad()
        points.append(snapshot(model))
        loss = loss_fn(model(x), y)
        losses.append(loss.item())
        loss.backward()
        guided.step()
        for group in guided.param_groups:
            group["lr"] /= factor if k == at else 1.0
        scheduler.step()
    return points, losses


@pytest.mark.parametrize("kind", KINDS)
def test_an_explosion_costs_a_few_steps(kind):
    run = guarded(kind)
    points, losses = spiked(run, batches(40), at=20)
    assert min(losses[21:23]) > 3 * losses[20]
    assert sum(losses[23:33]) < 1.2 * sum(losses[11:21])
    names = [name for name, _ in run[0].named_parameters()]
    assert all(torch.equal(points[23][name], points[20][name]) for name in names)
    events = run[2].guard_events
    assert [(e.reason, e.restored, e.scale_factor) for e in events] == [
        ("loss_rose", False, 1.0),
        ("loss_rose", True, 0.5),
    ]
    assert 20 in run[2].alpha_history.iterations  # what the step did was measured all the same


def test_a_hard_batch_is_no_explosion_and_the_next_one_is_used():
    run = guarded("adam")
    data = [(x, (y + 1) % 3) if k in (45, 70) else (x, y) for k, (x, y) in enumerate(batches(90))]
    go(*run, data)
    (event,) = run[2].guard_events
    assert (event.iteration, event.reason, event.restored) == (45, "loss_rose", False)
    assert run[2].param_groups[0]["lr"] == 0.01
    assert run[2].iteration == 89


def test_after_one_explosion_the_rate_is_lowered_for_a_while():
    run = guarded("sgd")
    spiked(run, batches(200), at=20)
    assert run[2].param_groups[0]["lr"] == pytest.approx(0.05)
    go(*run, batches(80))
    assert run[2].param_groups[0]["lr"] == pytest.approx(0.1)


def test_pairs_of_hard_batches_lower_nothing_for_long():
    """The second pair comes at half the rate, and is as hard as the first: it was not the rate."""
    run = guarded("adam")
    go(*run, [(x, (y + 1) % 3 if k % 60 in (58, 59) else y) for k, (x, y) in enumerate(batches(300))])
    taken_back = [event.scale_factor for event in run[2].guard_events if event.restored]
    assert taken_back == [0.5, 2.0]
    assert run[2].param_groups[0]["lr"] == pytest.approx(0.01)


def test_another_task_is_no_explosion_and_the_rate_is_given_back():
    """And what is done in vain is not done for ever."""
    run = guarded("adam")
    with pytest.warns(UserWarning, match="guard=False") as caught:
        go(*run, [(x, (y + k // 40) % 3) for k, (x, y) in enumerate(batches(240))])
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 500
    events = run[2].guard_events
    assert [event.reason for event in events] == ["loss_rose", "loss_rose", "no_effect"] * PATIENCE
    assert run[2].param_groups[0]["lr"] == 0.01
    assert run[2].iteration == 240 - 2 * PATIENCE


def test_a_gradient_that_is_not_finite_skips_the_step_and_lowers_nothing():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.Adam(model.parameters(), lr=0.01), model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    for k, (x, y) in enumerate(batches(6)):
        guided.zero_grad()
        before = snapshot(model) if k == 3 else {}
        loss_fn(model(x), y).backward()
        if k == 3:
            model[0].weight.grad[0, 0] = math.inf
        guided.step()
        scheduler.step()
        if k == 3:
            assert all(torch.equal(v, model.state_dict()[name]) for name, v in before.items())
    (event,) = guided.guard_events
    assert (event.reason, event.restored) == ("gradient_not_finite", False)
    assert guided.param_groups[0]["lr"] == 0.01
    for state in guided.state.values():
        assert all(bool(torch.isfinite(v).all()) for v in state.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("lr", [1e-6, 1.0, 1e3, 1e6])
@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name not in ("LBFGS", "SGD tensor lr", "SGD maximize")]
)
def test_nothing_ever_holds_a_nan_whatever_the_initial_rate(name, lr):
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    base = OPTIMIZERS[name](list(model.parameters()))
    for group in base.param_groups:
        group["lr"] = lr
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, total_steps=40)
    for x, y in batches(40):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        scheduler.step()
        assert all_finite(model)


def test_without_variances_the_usual_difference_between_batches_is_the_measure():
    weight = nn.Parameter(torch.tensor([1.0]))
    guided = AlphaGuided(torch.optim.SGD([weight], lr=0.1))
    scheduler = AlphaScheduler(guided, Hold())
    generator = torch.Generator().manual_seed(0)
    for k in range(40):
        guided.zero_grad()
        loss = weight.square().sum() + 1.0 + 0.1 * torch.rand((), generator=generator) + (50.0 if k == 30 else 0.0)
        guided.record_losses(loss)
        loss.backward()
        guided.step()
        scheduler.step()
    assert [event.iteration for event in guided.guard_events] == [30]
    assert guided.param_groups[0]["lr"] == 0.1


def test_healthy_training_is_never_interrupted():
    for size in (2, 8, 64):
        torch.manual_seed(1)
        model, loss_fn = make_model(), nn.CrossEntropyLoss()
        guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.02), model, loss_fn, backend="gradients")
        scheduler = AlphaScheduler(guided, Hold())
        for x, y in batches(600, size):
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
            scheduler.step()
        assert guided.guard_events == ()


def test_the_quantile_is_that_of_two_batches_that_agree_by_chance_once_in_a_million():
    from scipy.stats import t

    for freedom in (1, 2, 14, 254):
        assert t.sf(quantile(freedom), freedom) ** 2 == pytest.approx(FALSE_ALARM, rel=1e-3)
    assert math.isinf(quantile(0))


def test_chance_alone_is_called_an_explosion_as_rarely_as_promised():
    """Of normal losses far more rarely; of losses with the tails that are assumed, about as often as allowed."""
    generator = torch.Generator().manual_seed(0)
    for tails, most in ((None, 0), (4, 400)):
        count = 100_000
        losses = torch.randn(count, generator=generator)
        if tails is not None:
            losses = losses / (torch.randn(count, tails, generator=generator).square().sum(1) / tails).sqrt()
        scatter, alarms, before = LossScatter(), 0, 0.0
        for loss in losses.tolist():
            alarms += loss - before > scatter.limit(before, math.nan, 0) if len(scatter._differences) > 20 else 0
            scatter.note(loss)
            before = loss
        assert alarms <= most  # single ones; two in a row have to agree


def test_the_noise_over_samples_is_a_lower_bound():
    def skips(rise, deviation):
        guard, params = Guard(None), [torch.zeros(1)]
        for n in range(30):  # consecutive losses differ by 0.001
            guard.judge(n, BatchLoss(torch.tensor(1.0 + 0.001 * (n % 2)), torch.tensor(deviation**2), 100), params)
            guard.step_made(params)
        judgement = guard.judge(30, BatchLoss(torch.tensor(1.0 + rise), torch.tensor(deviation**2), 100), params)
        return not judgement.step

    limit = quantile(198) * 2.0 * math.sqrt(2 / 100)
    assert skips(1.01 * limit, 2.0)
    assert not skips(0.98 * limit, 2.0)
    assert skips(0.1 * limit, 0.0)


def test_switched_off_it_keeps_nothing_and_does_nothing():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=1e6), model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold(), guard=False)
    for x, y in batches(5):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        scheduler.step()
    assert guided.guard_events == ()
    assert guided.iteration == 5


def judged(guard, losses, params):
    """Events of a guard that sees these mean losses, one after the other."""
    events = []
    for n, loss in enumerate(losses):
        judgement = guard.judge(n, BatchLoss(torch.tensor(float(loss)), None, 0), params)
        if judgement.step:
            guard.step_made(params)
        if judgement.event is not None:
            events.append(judgement.event)
    return events


def drift(start, end, steps):
    return [start + (end - start) * k / steps + 0.02 * math.sin(7 * k) for k in range(steps)]


def test_a_loss_that_rises_slowly_is_the_users_business():
    assert judged(Guard(None), drift(1.0, 3.0, 100), [nn.Parameter(torch.ones(3))]) == []


def test_noise_before_any_progress_is_no_drift():
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.ones(3))]
    losses = 1.0 + 0.2 * torch.randn(600, generator=generator)
    losses[0] = 0.7  # a lucky first batch
    assert judged(Guard(None), losses.tolist(), params) == []


# ------------------------------------------------------------------ points are put back whole, or not at all


class Cache(nn.Module):
    """A buffer that grows, with a counter beside it, before layers with statistics."""

    def __init__(self, persistent):
        super().__init__()
        self.inner = make_model()
        self.register_buffer("rows", torch.zeros(0, 6), persistent=persistent)
        self.register_buffer("fixed", torch.zeros(4, 6), persistent=persistent)
        self.register_buffer("mask", torch.full((3, 3), -math.inf))
        self.filled = 0

    def forward(self, x):
        self.rows = torch.cat([self.rows, x[:1].detach()])
        self.filled += 1
        return self.inner(x)


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_that_grow_are_not_restored_and_statistics_are(persistent):
    model = Cache(persistent)
    run = guarded("momentum", model=model)
    points, _ = spiked(run, batches(30), at=20)
    assert [e.restored for e in run[2].guard_events] == [False, True]
    assert len(model.rows) == model.filled == 30
    names = [name for name, _ in model.named_parameters()]
    assert all(torch.equal(points[23][name], points[20][name]) for name in names)


def test_a_mask_of_infinities_is_not_judged():
    model = Cache(True)
    run = guarded("adam", model=model)
    go(*run, batches(10))
    assert run[2].guard_events == ()


@pytest.mark.parametrize("change", ["group", "replaced", "resized"])
def test_a_point_of_other_tensors_is_forgotten_and_nothing_is_half_written(change):
    """One call after a step that exploded the parameters are others: nothing can be put back."""
    model, extra = make_model(), nn.Linear(6, 6)
    run = guarded("adam", model=nn.Sequential(extra, model))
    guided = run[2]
    data = list(batches(40))
    spiked(run, data[:21], at=20)
    if change == "group":
        guided.optimizer.param_groups.append({**guided.param_groups[0], "params": [nn.Parameter(torch.zeros(2))]})
    elif change == "replaced":
        extra.weight = new = nn.Parameter(extra.weight.detach().clone())
        guided.param_groups[0]["params"][0] = new
    else:
        extra.weight.data = torch.cat([extra.weight.data, torch.zeros(1, 6)])
        extra.bias.data = torch.cat([extra.bias.data, torch.zeros(1)])
        extra.weight.grad = extra.bias.grad = None
        guided.state.clear()
        run[0][1][0].weight.data = torch.cat([run[0][1][0].weight.data, torch.zeros(16, 1)], 1)
        run[0][1][0].weight.grad = None
    before = snapshot(run[0])
    x, y = data[21]
    guided.zero_grad()
    run[1](run[0](x), y).backward()
    guided.step()
    assert guided.guard_events == ()
    assert not same(snapshot(run[0]), before)  # the step was made


def test_numbers_that_were_not_finite_before_are_not_judged():
    model = make_model()
    model.register_parameter("bound", nn.Parameter(torch.tensor([math.inf, 1.0])))
    run = guarded("sgd", model=model)
    go(*run, batches(12))
    assert run[2].guard_events == ()


def test_half_precision_is_judged_in_a_wider_type():
    """The norms are beyond what 16 bits hold, the numbers are not."""
    weight = nn.Parameter(torch.full((4000,), 1.0, dtype=torch.float16))
    guided = AlphaGuided(torch.optim.SGD([weight], lr=1e-6))
    scheduler = AlphaScheduler(guided, Hold())
    for _ in range(4):
        weight.grad = torch.full_like(weight, 6e4)
        guided.step()
        scheduler.step()
    assert guided.guard_events == ()
    assert guided.iteration == 4


OWN = {
    "schedulefree": ("schedulefree", "AdamWScheduleFree", {"lr": 0.01}),
    "prodigy": ("prodigyopt", "Prodigy", {}),
    "dadaptation": ("dadaptation", "DAdaptAdam", {}),
}


def all_of(optimizer):
    """Everything in an optimizer but its rates, as plain values."""
    state = [
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in entry.items()}
        for entry in optimizer.state.values()
    ]
    groups = [
        {name: value for name, value in group.items() if name not in ("lr", "params")}
        for group in optimizer.param_groups
    ]
    return state, groups


@pytest.mark.parametrize("name", [*OWN, "lookahead", "declared"])
def test_weights_of_the_optimizers_own_go_back_with_the_point(name):
    from tests.test_transparency import equal_states

    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    if name == "lookahead":
        lookahead = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed").Lookahead
        base = lookahead(torch.optim.AdamW(model.parameters(), lr=0.01))
    elif name == "declared":
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        base.state_belongs_to_weights = True
    else:
        module, kind, options = OWN[name]
        base = getattr(pytest.importorskip(module, reason=f"{module} is not installed"), kind)(
            model.parameters(), **options
        )
    if hasattr(base, "train"):
        base.train()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    data = [(x * math.nan, y) if k in (12, 13) else (x, y) for k, (x, y) in enumerate(batches(16))]
    for k, (x, y) in enumerate(data[:14]):
        if k == 11:
            before = all_of(base), snapshot(model)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        scheduler.step()
    assert [e.restored for e in guided.guard_events] == [False, True]
    assert equal_states(dict(enumerate(before[0])), dict(enumerate(all_of(base))))
    assert all(torch.equal(before[1][n], p) for n, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:10 optimizer steps without:UserWarning")
def test_it_rests_where_nobody_steps_the_scheduler():
    """Lightning's averaging of weights replaces the scheduler: nothing is taken back any more."""
    model, loss_fn, guided, scheduler = guarded("sgd")
    data = list(batches(40))
    go(model, loss_fn, guided, scheduler, data[:20])
    for x, y in data[20:]:
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(1.5)
        guided.zero_grad()
        loss_fn(model(x * 10), y).backward()
        guided.step()
    assert guided.guard_events == ()
    assert guided.iteration == 40


def test_accepted_points_are_told_before_the_next_step_and_others_are_not():
    run = guarded("sgd")
    model, _, guided, _ = run
    told = []
    handle = guided.register_accepted_hook(lambda optimizer: told.append((optimizer.iteration, snapshot(model))))
    points, _ = spiked(run, batches(30), at=20)
    assert [n for n, _ in told] == list(range(28))
    names = [name for name, _ in model.named_parameters()]
    used = [k for k in range(30) if k not in (21, 22)]  # the exploded point was never accepted
    assert all(torch.equal(told[n][1][name], points[k][name]) for n, k in enumerate(used) for name in names)
    handle.remove()
    go(*run, batches(1))
    assert len(told) == 28


def test_without_a_guard_every_step_is_told():
    model = make_model()
    guided, told = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1)), []
    guided.register_accepted_hook(lambda optimizer: told.append(optimizer.iteration))
    for x, y in batches(4):
        guided.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        guided.step()
    assert told == [0, 1, 2, 3]


@pytest.mark.parametrize("loss", [None, 1e9])
def test_the_last_point_is_judged_by_finish(loss):
    run = guarded("sgd")
    model, _, guided, scheduler = run
    points, _ = go(*run, batches(20))
    if loss is None:
        scheduler.finish()
        assert guided.guard_events == ()
        with torch.no_grad():
            model[0].weight[0, 0] = math.inf
    scheduler.finish(loss)
    (event,) = guided.guard_events
    assert event.restored
    assert all(torch.equal(points[19][name], param) for name, param in model.named_parameters())


def test_a_scaler_that_skips_what_is_not_finite_does_not_hide_it():
    """``step`` is never called, but the gradients are thrown away."""
    run = guarded("adam")
    model, loss_fn, guided, scheduler = run
    for k, (x, y) in enumerate(batches(30)):
        guided.zero_grad()
        loss = loss_fn(model(x * (math.nan if k in (10, 20, 21) else 1.0)), y)
        loss.backward()
        if bool(torch.isfinite(loss)):
            guided.step()
        scheduler.step()
    assert all_finite(model)
    assert [(e.restored, e.scale_factor) for e in guided.guard_events] == [(False, 1.0), (False, 1.0), (True, 0.5)]
    assert scheduler.last_epoch == 27  # what a scaler skips is no progress


def test_progress_counts_what_the_guard_skips():
    model, loss_fn = make_model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(KINDS["sgd"](model.parameters()), model, loss_fn)
    schedule = torch.optim.lr_scheduler.LinearLR(guided, 1.0, 0.0, total_iters=20)
    scheduler = AlphaScheduler(guided, Hold(), schedule=schedule)
    go(
        model,
        loss_fn,
        guided,
        scheduler,
        [(x * (math.nan if k % 4 == 3 else 1), y) for k, (x, y) in enumerate(batches(20))],
    )
    assert guided.iteration == 15
    assert guided.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_points_in_the_memory_of_the_cpu_are_put_back_as_well(kind):
    results = []
    for guard in (True, "cpu"):
        run = guarded(kind, guard=guard)
        spiked(run, batches(40), at=20)
        results.append(snapshot(run[0]))
    assert same(*results)


def test_a_buffer_that_is_meant_to_become_infinite_stops_nothing():
    class Highest(nn.Module):
        """Keeps a bound, which is lifted after some calls."""

        def __init__(self):
            super().__init__()
            self.inner = make_model()
            self.register_buffer("bound", torch.tensor([1.0]))
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 10:
                self.bound.fill_(math.inf)
            return self.inner(x)

    run = guarded("adam", model=Highest())
    go(*run, batches(30))
    assert [str(event.reason) for event in run[2].guard_events] == ["state_not_finite"] * (PATIENCE - 1)
    assert run[2].param_groups[0]["lr"] == 0.01
    assert run[2].iteration == 30 - (PATIENCE - 1)


@pytest.mark.parametrize("broken", ["gradient", "loss", "nothing"])
def test_without_memory_to_judge_a_batch_what_is_not_finite_is_not_used(broken, monkeypatch):
    model, loss_fn, guided, _ = guarded("adam")

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    monkeypatch.setattr(guided._session.supervision, "judge", no_memory)
    before = [param.detach().clone() for param in model.parameters()]
    ((x, y),) = batches(1)
    guided.zero_grad()
    loss = loss_fn(model(x), y) * (math.nan if broken == "loss" else 1.0)
    loss.backward()
    if broken == "gradient":
        next(model.parameters()).grad[0] = math.inf
    with pytest.warns(UserWarning, match="memory ran out"):
        guided.step()
    unmoved = all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert unmoved == (broken != "nothing")
