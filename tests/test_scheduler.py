"""Effective rate = scheduled rate x scale x envelope, at every step and after a resume."""

import copy
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedules

from alpha_optim import AlphaGuided, AlphaScheduler, Bounded, CalibrateThenAnneal, Hold, TargetAlpha, WithWarmup
from alpha_optim.policies.base import name_of

SCHEDULES = {
    "step": lambda o: torch_schedules.StepLR(o, 5, 0.5),
    "lambda": lambda o: torch_schedules.LambdaLR(o, lambda n: 1.0 / (1 + n)),
    "cosine": lambda o: torch_schedules.CosineAnnealingLR(o, 30, eta_min=1e-3),
    "one cycle": lambda o: torch_schedules.OneCycleLR(o, max_lr=0.3, total_steps=40),
    "warm-up then cosine": lambda o: torch_schedules.SequentialLR(
        o,
        [torch_schedules.LinearLR(o, 0.1, total_iters=8), torch_schedules.CosineAnnealingLR(o, 30)],
        milestones=[8],
    ),
    "chained": lambda o: torch_schedules.ChainedScheduler(
        [torch_schedules.ConstantLR(o, 0.5, 4), torch_schedules.ExponentialLR(o, 0.95)]
    ),
    "restarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 7),
}


class Alternating:
    """A policy with a known product: 0.8, 1.1, 0.8, ... per measurement."""

    def __call__(self, m):
        return 0.8 if m.iteration % 2 else 1.1


def make(momentum=0.9, groups=False, tensor_lr=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    params = (
        [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}]
        if groups
        else model.parameters()
    )
    return model, torch.optim.SGD(params, lr=lr, momentum=momentum)


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 5, generator=generator), torch.randint(0, 2, (16,), generator=generator)) for _ in range(count)
    ]


def train(model, loss_fn, optimizer, scheduler, data):
    rates = []
    for x, y in data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        rates.append([float(g["lr"]) for g in optimizer.param_groups])
    return rates


def rates_of_schedule_alone(build, steps, **options):
    _, base = make(**options)
    schedule, rates = build(base), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            base.step()
            schedule.step()
            rates.append([float(g["lr"]) for g in base.param_groups])
    return rates


@pytest.mark.compatibility(
    "Schedules",
    "Step, Lambda, Cosine, OneCycle, warm-up in Sequential, Chained, WarmRestarts: their rate times scale",
)
@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_curve_of_a_schedule_is_kept(name, on):
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    schedule = SCHEDULES[name](guided if on == "wrapper" else base)
    scheduler = AlphaScheduler(guided, Alternating(), schedule=schedule, guard=False)
    effective = train(model, loss_fn, guided, scheduler, batches(25))
    scheduled = rates_of_schedule_alone(SCHEDULES[name], 25)
    scale = 1.0
    for n, (now, alone) in enumerate(zip(effective, scheduled, strict=True)):
        if n >= 1:  # step n delivers measurement n - 1
            scale *= 0.8 if (n - 1) % 2 else 1.1
        assert now[0] == pytest.approx(alone[0] * scale, rel=1e-9), n


@pytest.mark.compatibility("Schedules", "OneCycleLR with cycling momentum")
def test_one_cycle_cycles_the_momentum_too():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold(), schedule=SCHEDULES["one cycle"](guided))
    train(model, loss_fn, guided, scheduler, batches(10))
    assert base.param_groups[0]["momentum"] < 0.95


@pytest.mark.compatibility("Schedules", "ReduceLROnPlateau")
def test_reduce_on_plateau_gets_its_metric_through_step():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    plateau = torch_schedules.ReduceLROnPlateau(guided, factor=0.5, patience=1)
    scheduler = AlphaScheduler(guided, Hold(), schedule=plateau)
    for x, y in batches(6):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        scheduler.step(1.0)  # never improves
    assert base.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.compatibility("Schedules", "param groups with rates of their own keep their ratios")
def test_groups_keep_their_ratio_also_at_the_bounds():
    model, base = make(groups=True)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: 1.5 if m.iteration < 10 else 0.5, min_lr=0.01, max_lr=0.5, guard=False)
    rates = train(model, loss_fn, guided, scheduler, batches(25))
    assert all(b / a == pytest.approx(5.0) for a, b in rates)
    assert max(b for _, b in rates) == pytest.approx(0.5)
    assert min(a for a, _ in rates) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("first", "then", "bound", "held"), [(2.0, 0.5, {"max_lr": 0.2}, 0.2), (0.5, 2.0, {"min_lr": 0.05}, 0.05)]
)
def test_the_scale_does_not_wind_up_against_a_bound(first, then, bound, held):
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: first if m.iteration < 20 else then, **bound, guard=False)
    rates = train(model, loss_fn, guided, scheduler, batches(23))
    assert rates[20][0] == pytest.approx(held)
    assert rates[21][0] == pytest.approx(0.1)


def test_a_scale_that_grows_against_the_upper_bound_leaves_the_curve_of_a_schedule():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    curve = torch_schedules.CosineAnnealingLR(guided, 40)
    scheduler = AlphaScheduler(guided, lambda m: 2.0, schedule=curve, max_lr=0.3, guard=False)
    rates = [rate for (rate,) in train(model, loss_fn, guided, scheduler, batches(40))]
    expected = [0.3 * (1 + math.cos(math.pi * n / 40)) / 2 for n in range(1, 41)]
    assert rates[5:] == pytest.approx(expected[5:], abs=1e-12)


def test_going_back_to_an_earlier_state_without_the_schedulers_makes_no_rate_of_it():
    """The rates in that state are what the scheduler wrote then, and its plan goes back as far."""
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, CalibrateThenAnneal(60), guard=False)
    rates = train(model, loss_fn, guided, scheduler, batches(20))
    state = copy.deepcopy(guided.state_dict())
    rates += train(model, loss_fn, guided, scheduler, batches(35))
    guided.load_state_dict(state)
    with pytest.warns(UserWarning, match="load both states"):
        again = train(model, loss_fn, guided, scheduler, batches(35))
    assert [rate for (rate,) in again] == pytest.approx([rate for (rate,) in rates[20:]])


def test_rates_that_are_told_are_those_in_force():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, CalibrateThenAnneal(60), max_lr=0.02)
    train(model, loss_fn, guided, scheduler, batches(5))
    assert "holds 0.02 " in repr(scheduler)
    for group in guided.param_groups:
        group["lr"] *= 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, loss_fn, guided, scheduler, batches(1))
    assert "holds 0.01 " in repr(scheduler)  # a tenth of what was given
    other = AlphaScheduler(AlphaGuided(make()[1]), lambda m: 0.5)
    other.scale = 0.25
    assert "0.25 times the rates given, by policy and guard" in repr(other)


def test_a_search_that_passes_the_bound_still_knows_where_it_is():
    """The climbs go above 0.01, and so does the rate found: what remains is the bound, nothing below it."""
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, CalibrateThenAnneal(600, anneal=False), max_lr=0.01)
    data = [(x, (x[:, 0] > 0).long()) for x, _ in batches(320)]
    rates = [rate for (rate,) in train(model, loss_fn, guided, scheduler, data)]
    assert max(rates) == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("policy", [lambda: CalibrateThenAnneal(300), lambda: WithWarmup(CalibrateThenAnneal(300), 10)])
def test_a_search_held_by_a_bound_is_annealed_all_the_same(policy):
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, policy(), max_lr=0.02)
    data = [(x, (x[:, 0] > 0).long()) for x, _ in batches(300)]
    rates = [rate for (rate,) in train(model, loss_fn, guided, scheduler, data)]
    assert max(rates) <= 0.02 * (1 + 1e-9)
    assert max(rates[150:]) > 0.002
    assert rates[-1] < 0.1 * max(rates[150:])


def test_the_bound_cuts_the_curve_of_a_schedule_and_leaves_the_rest():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    peak = torch_schedules.LambdaLR(guided, lambda n: [1, 5, 10, 5, 1, 1][min(n, 5)])
    scheduler = AlphaScheduler(guided, Hold(), schedule=peak, max_lr=0.5, guard=False)
    rates = train(model, loss_fn, guided, scheduler, batches(4))
    assert [r for (r,) in rates] == pytest.approx([0.5, 0.5, 0.5, 0.1])


WARM_UPS = {
    "lambda": lambda opt: torch_schedules.LambdaLR(opt, lambda n: min(1.0, n / 250)),
    "one cycle": lambda opt: torch_schedules.OneCycleLR(opt, max_lr=0.1, total_steps=1000, cycle_momentum=False),
    "linear, then cosine": lambda opt: torch_schedules.SequentialLR(
        opt,
        [
            torch_schedules.LinearLR(opt, 0.01, total_iters=250),
            torch_schedules.CosineAnnealingLR(opt, 750),
        ],
        milestones=[250],
    ),
}


@pytest.mark.compatibility("Schedules", "warm-up longer than the search: the rate found is that of the peak")
@pytest.mark.parametrize("name", WARM_UPS)
def test_a_search_during_a_warm_up_finds_the_peak(name):
    def run(schedule):
        model, base = make()
        loss_fn = nn.CrossEntropyLoss()
        guided = AlphaGuided(base, model, loss_fn)
        schedule = None if schedule is None else schedule(guided)
        policy = CalibrateThenAnneal(1000, anneal=False)
        scheduler = AlphaScheduler(guided, policy, schedule=schedule)
        data = [(x, (x[:, 0] > 0).long()) for x, _ in batches(150)]
        rates = [rate for (rate,) in train(model, loss_fn, guided, scheduler, data)]
        assert policy.calibrated
        return policy, scheduler, rates

    alone, _, rates_alone = run(None)
    policy, scheduler, rates = run(WARM_UPS[name])
    assert policy.story == alone.story  # the same rate, found at the same step for the same reasons
    assert rates[:60] == pytest.approx(rates_alone[:60], rel=1e-9)
    share = scheduler.schedule.optimizer.param_groups[0]["lr"] / rates_alone[-1]
    assert 0.05 < share < 1.0  # and the rest of the warm-up is still to come
    assert share == pytest.approx(scheduler._rates.scheduled[0] / 0.1, rel=1e-6)


def test_a_search_without_measurements_does_not_hold_the_schedule_back_for_ever():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn, every=lambda n: n < 3)
    schedule = torch_schedules.LambdaLR(guided, lambda n: 0.5 if n > 50 else 1.0)
    scheduler = AlphaScheduler(guided, CalibrateThenAnneal(500, anneal=False), schedule=schedule, guard=False)
    rates = [rate for (rate,) in train(model, loss_fn, guided, scheduler, batches(140))]
    assert scheduler.policy.calibrated
    assert "the rate given is kept" in repr(scheduler)
    assert rates[99] == rates[40] < 1e-3  # the peak stands in for what the schedule says
    assert rates[130] == pytest.approx(0.5 * 0.1)


def test_a_copied_pair_of_optimizer_and_scheduler_keeps_guard_and_policy():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, total_steps=40)
    train(model, loss_fn, guided, scheduler, batches(5))
    model2, loss_fn2, guided2, scheduler2 = copy.deepcopy((model, loss_fn, guided, scheduler))
    first = train(model, loss_fn, guided, scheduler, batches(12, seed=1))
    assert train(model2, loss_fn2, guided2, scheduler2, batches(12, seed=1)) == first
    x, y = batches(1)[0]
    loss_fn2(model2(x * math.nan), y).backward()
    guided2.step()
    assert [event.reason for event in guided2.guard_events] == ["loss_not_finite"]
    assert guided.guard_events == ()


@pytest.mark.compatibility("torch.optim", "tensor learning rates, written in place")
def test_tensor_rates_are_written_in_place():
    model, base = make(tensor_lr=True)
    loss_fn = nn.CrossEntropyLoss()
    rate = base.param_groups[0]["lr"]
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: 0.5, guard=False)
    train(model, loss_fn, guided, scheduler, batches(3))
    assert base.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.025)
    assert scheduler.get_last_lr()[0] is not rate


def test_an_envelope_may_be_zero_and_does_not_change_the_scale():
    class Blink:
        def __call__(self, m):
            return 1.0

        def envelope(self, iteration):
            return 0.0 if iteration == 3 else 1.0

    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, Blink())
    rates = train(model, loss_fn, guided, scheduler, batches(5))
    assert [r for (r,) in rates] == [0.1, 0.1, 0.0, 0.1, 0.1]


@pytest.mark.compatibility("Schedules", "rates changed by hand")
def test_a_rate_changed_by_hand_is_taken_over_as_a_ratio_with_one_warning():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: 0.5, guard=False)
    train(model, loss_fn, guided, scheduler, batches(3))
    assert base.param_groups[0]["lr"] == pytest.approx(0.025)
    base.param_groups[0]["lr"] *= 10
    with pytest.warns(UserWarning, match=r"changed outside AlphaScheduler.*AlphaScheduler\(schedule=") as caught:
        train(model, loss_fn, guided, scheduler, batches(2))
        base.param_groups[0]["lr"] *= 2
        train(model, loss_fn, guided, scheduler, batches(1))
    assert len(caught) == 1
    assert base.param_groups[0]["lr"] == pytest.approx(0.1 * 10 * 2 * 0.5**5)


@pytest.mark.compatibility("Schedules", "a scheduler attached beside AlphaScheduler: taken over, with a warning")
def test_a_schedule_attached_beside_is_noticed():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    beside = torch_schedules.StepLR(guided, 1, 0.5)
    scheduler = AlphaScheduler(guided, Hold())
    with pytest.warns(UserWarning, match="changed outside AlphaScheduler"):
        for x, y in batches(3):
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
            beside.step()
            scheduler.step()
    assert base.param_groups[0]["lr"] == pytest.approx(0.0125)


@pytest.mark.compatibility("Schedules", "the loop writes the rate at every step: it stays the loop's")
@pytest.mark.parametrize("policy", [Hold, lambda: lambda m: 0.5, lambda: CalibrateThenAnneal(60)])
def test_a_rate_written_at_every_step_is_the_loops(policy):
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, policy())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n, (x, y) in enumerate(batches(30)):
            base.param_groups[0]["lr"] = written = 0.1 / (n + 1)
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
            scheduler.step()
            if n > 2:
                assert base.param_groups[0]["lr"] == written
    said = [str(warning.message) for warning in caught if "3 times in a row" in str(warning.message)]
    assert len(said) == 1
    assert "schedule=" in said[0]
    assert scheduler.scale == 1.0
    assert [m.lr[0] for m in guided.alpha_history][5:] == pytest.approx([0.1 / (n + 1) for n in range(5, 29)])
    assert repr(scheduler).endswith(f"written by the training loop; {name_of(scheduler.policy)} rests)")


def test_the_guards_cut_applies_inside_the_step_where_the_loop_owns_the_rate():
    model, base = make(momentum=0.0)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    used = []
    base.register_step_pre_hook(lambda optimizer, args, kwargs: used.append(optimizer.param_groups[0]["lr"]))
    scheduler = AlphaScheduler(guided, Hold())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n, (x, y) in enumerate(batches(30)):
            base.param_groups[0]["lr"] = written = 0.1 + 0.001 * n
            guided.zero_grad()
            loss_fn(model(x * (math.nan if n in (10, 11) else 1.0)), y).backward()
            guided.step()
            assert base.param_groups[0]["lr"] == written
            scheduler.step()
    assert [event.scale_factor for event in guided.guard_events] == [1.0, 0.5]
    assert used[9] == pytest.approx(0.109)
    shares = [rate / (0.1 + 0.001 * n) for rate, n in zip(used[10:], range(12, 30), strict=True)]
    assert shares[0] == pytest.approx(0.65)  # half, and the first of the steps in which it grows back
    assert shares[-1] == pytest.approx(1.0)


def test_the_rate_given_with_an_added_group_is_the_one_it_gets():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    extra = nn.Parameter(torch.zeros(2))
    guided = AlphaGuided(base, nn.ModuleList([model, nn.ParameterList([extra])]), loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: 0.5 if m.iteration < 3 else 1.0, guard=False)
    train(model, loss_fn, guided, scheduler, batches(6))
    assert base.param_groups[0]["lr"] == pytest.approx(0.0125)
    guided.add_param_group({"params": [extra], "lr": 0.04})
    train(model, loss_fn, guided, scheduler, batches(2))
    assert [group["lr"] for group in base.param_groups] == pytest.approx([0.0125, 0.04])


@pytest.mark.parametrize("at", [0, 1, 5, 30, 45, 60, 300])
def test_a_group_added_during_a_search(at):
    """No point of the search can be gone back to with it: the search ends where it began, or at its best trial."""
    torch.manual_seed(0)
    x = torch.randn(500, 20)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model, loss_fn = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)), nn.CrossEntropyLoss()
    optimizer = AlphaGuided(torch.optim.AdamW(model[2].parameters(), lr=1e-3), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, total_steps=400)
    begin, generator = copy.deepcopy(model.state_dict()), torch.Generator().manual_seed(0)

    def train(steps):
        for _ in range(steps):
            picked = torch.randint(len(x), (64,), generator=generator)
            optimizer.zero_grad()
            loss_fn(model(x[picked]), y[picked]).backward()
            optimizer.step()
            scheduler.step()

    train(at)
    searching, before = not scheduler.policy.calibrated, copy.deepcopy(model.state_dict())
    assert searching == (at < 300)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 1e-4})
    after = model.state_dict()
    if at in (0, 300):
        assert not caught
        assert all(torch.equal(after[name], before[name]) for name in after)
    else:
        assert "a param group is added while the learning rate is searched" in str(caught[0].message)
        assert scheduler.policy.calibrated
        # The first step or two of a search move no weight that can be seen.
        assert scheduler.policy.story[-1][1].startswith("the best rate so far") or all(
            torch.allclose(after[name], begin[name], atol=1e-6) for name in after
        )
    train(1)
    rates = [group["lr"] for group in optimizer.param_groups]
    if at == 0:  # nothing has been made of the rates given
        assert rates[1] / rates[0] == pytest.approx(0.1)
    else:
        assert rates[1] == pytest.approx(1e-4, rel=0.05)  # it is annealed from there


@pytest.mark.parametrize("path", ["cool down", "not stepped"])
def test_a_group_added_since_the_last_call_disturbs_nothing(path):
    model, base = make()
    loss_fn, extra = nn.CrossEntropyLoss(), nn.Parameter(torch.zeros(2))
    guided = AlphaGuided(base, nn.ModuleList([model, nn.ParameterList([extra])]), loss_fn)
    scheduler = AlphaScheduler(guided, Hold()) if path == "cool down" else AlphaScheduler(guided, total_steps=1000)
    train(model, loss_fn, guided, scheduler, batches(3) if path == "cool down" else [])  # a search would end
    guided.add_param_group({"params": [extra], "lr": 0.04})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path == "cool down":
            scheduler.cool_down(10)
        else:
            for x, y in batches(14):
                guided.zero_grad()
                loss_fn(model(x), y).backward()
                guided.step()
    assert len(scheduler.get_last_lr()) == 2
    if path == "cool down":
        assert [group["lr"] for group in base.param_groups] == pytest.approx([0.1, 0.04])


def test_a_rate_written_before_cooling_down_is_cooled_down_from():
    model, base = make()
    guided = AlphaGuided(base, model)
    scheduler = AlphaScheduler(guided, Hold())
    base.param_groups[0]["lr"] = 0.02
    with pytest.warns(UserWarning, match="changed outside"):
        scheduler.cool_down(10)
    assert base.param_groups[0]["lr"] == pytest.approx(0.02)


def test_a_group_that_is_removed_is_forgotten():
    model, base = make(groups=True)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: 0.5, guard=False)
    train(model, loss_fn, guided, scheduler, batches(3))
    del base.param_groups[0]
    train(model, loss_fn, guided, scheduler, batches(1))
    assert base.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)  # the pair across the change is dropped


def test_a_rate_set_to_0_and_back_is_the_one_written():
    model, base = make(groups=True)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: 2.0 if m.iteration < 4 else 1.0, guard=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, loss_fn, guided, scheduler, batches(8))
        base.param_groups[0]["lr"] = 0.0
        train(model, loss_fn, guided, scheduler, batches(2))
        assert base.param_groups[0]["lr"] == 0.0
        base.param_groups[0]["lr"] = 0.32
        train(model, loss_fn, guided, scheduler, batches(2))
    assert base.param_groups[0]["lr"] == pytest.approx(0.32)


def test_an_empty_param_group_is_none_of_our_business():
    model = make()[0]
    base = torch.optim.SGD([{"params": []}, {"params": model.parameters()}], lr=0.1)
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    train(model, loss_fn, guided, scheduler, batches(3))
    assert guided.iteration == 3


def test_a_plateau_without_its_metric_raises_as_in_torch():
    model, base = make()
    guided = AlphaGuided(base, model)
    scheduler = AlphaScheduler(guided, Hold(), schedule=torch_schedules.ReduceLROnPlateau(guided))
    with pytest.raises(TypeError, match=r"scheduler.step\(metric\)"):
        scheduler.step()


@pytest.mark.compatibility("Schedules", "stepped once per epoch: a search waits, the rate given is used")
def test_a_search_stepped_once_per_epoch_waits_at_the_rate_given():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, total_steps=400)
    rates = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n, (x, _) in enumerate(batches(400)):
            guided.zero_grad()
            loss_fn(model(x), (x[:, 0] > 0).long()).backward()
            guided.step()
            rates.append(base.param_groups[0]["lr"])
            if n % 20 == 19:
                scheduler.step()
    said = [str(warning.message) for warning in caught]
    assert len([text for text in said if "it waits" in text]) == 1
    assert len(said) == 2  # and that it is to be stepped once per step
    assert rates[12:200] == pytest.approx([0.1] * 188)
    assert rates[-1] < 0.02  # annealed
    assert scheduler.scale == 1.0


def test_a_resumed_run_of_another_length_plans_the_rest_anew():
    def build(total):
        model, base = make()
        loss_fn = nn.CrossEntropyLoss()
        guided = AlphaGuided(base, model, loss_fn)
        return model, loss_fn, guided, AlphaScheduler(guided, total_steps=total)

    data = [(x, (x[:, 0] > 0).long()) for x, _ in batches(600)]
    model, loss_fn, guided, scheduler = build(300)
    train(model, loss_fn, guided, scheduler, data[:150])
    assert scheduler.policy.calibrated
    states = [copy.deepcopy(part.state_dict()) for part in (model, guided, scheduler)]
    model, loss_fn, guided, scheduler = build(600)
    for part, state in zip((model, guided, scheduler), states, strict=True):
        part.load_state_dict(state)
    rates = [rate for (rate,) in train(model, loss_fn, guided, scheduler, data[150:])]
    assert rates[-1] < 0.02 * max(rates)
    assert rates[300] > 0.3 * max(rates)  # by the old plan it would have been 0 for long


def test_cool_down_anneals_whenever_the_user_decides():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    train(model, loss_fn, guided, scheduler, batches(5))
    scheduler.cool_down(10)
    rates = [rate for (rate,) in train(model, loss_fn, guided, scheduler, batches(12))]
    assert rates == pytest.approx([0.1 * max(0.0, 1 - (n + 1) / 10) for n in range(12)])
    assert "cools down over 10 steps from step 5 on" in repr(scheduler)


def test_a_search_for_a_loss_that_is_to_rise_is_told(caplog):
    model, _ = make()
    base = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    AlphaScheduler(AlphaGuided(base, model, nn.CrossEntropyLoss()), total_steps=300)
    assert "Train the negated loss without maximize" in caplog.text


def test_no_policy_bends_a_cool_down():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda measurement: 1.05)
    train(model, loss_fn, guided, scheduler, batches(5))
    begin = guided.param_groups[0]["lr"]
    scheduler.cool_down(10)
    rates = [rate for (rate,) in train(model, loss_fn, guided, scheduler, batches(10))]
    assert rates == pytest.approx([begin * (1 - (n + 1) / 10) for n in range(10)])


def test_a_cool_down_of_rates_that_the_loop_writes_says_that_it_does_nothing():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(5):
            guided.param_groups[0]["lr"] = 0.1 / (n + 1)
            train(model, loss_fn, guided, scheduler, batches(1))
    with pytest.warns(UserWarning, match="changes nothing"):
        scheduler.cool_down(10)


def test_a_search_that_learned_nothing_keeps_the_rate_given():
    """Labels are random: no rate makes the loss fall."""
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, CalibrateThenAnneal(600, anneal=False))
    rates = [rate for (rate,) in train(model, loss_fn, guided, scheduler, batches(420))]
    assert scheduler.policy.calibrated
    assert "the rate given is kept" in repr(scheduler)
    assert rates[300:] == pytest.approx([0.1] * 120)


def test_a_step_that_was_not_executed_is_no_progress():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold(), schedule=torch_schedules.StepLR(guided, 1, 0.5))
    train(model, loss_fn, guided, scheduler, batches(2))
    scheduler.step()
    scheduler.step()
    assert base.param_groups[0]["lr"] == pytest.approx(0.025)


def test_policies_see_every_measurement_once_in_order():
    seen = []
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, lambda m: seen.append(m.iteration) or 1.0)
    for k, (x, y) in enumerate(batches(9)):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        if k % 3 == 2:
            scheduler.step()
    assert seen == list(range(8))


def test_a_scheduler_that_is_not_stepped_is_noticed_once():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    with pytest.warns(UserWarning, match=r"10 optimizer steps without scheduler.step\(\)") as caught:
        for k, (x, y) in enumerate(batches(40)):
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
            if k % 20 == 19:
                scheduler.step()
    assert len(caught) == 1


def test_an_optimizer_that_is_not_stepped_is_noticed_once():
    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    scheduler = AlphaScheduler(AlphaGuided(base, model, loss_fn), Hold())
    with pytest.warns(UserWarning, match=r"50 scheduler steps in which the optimizer made none") as caught:
        train(model, loss_fn, base, scheduler, batches(120))  # the bare one instead of the wrapper
    assert len(caught) == 1


def test_defaults():
    def policy_of(**arguments):
        model, base = make()
        schedule = torch_schedules.StepLR(base, 3) if arguments.pop("schedule", False) else None
        return AlphaScheduler(AlphaGuided(base, model), schedule=schedule, **arguments).policy

    assert isinstance(policy_of(), TargetAlpha)
    assert isinstance(policy_of(total_steps=100), CalibrateThenAnneal)
    assert policy_of(total_steps=100).anneal
    assert not policy_of(total_steps=100, schedule=True).anneal


def test_when_every_is_none_the_policy_decides_what_is_measured():
    class Picky:
        def __call__(self, m):
            return 1.0

        def wants(self, iteration):
            return iteration in (2, 5)

    model, base = make()
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(base, model, loss_fn, every=None)
    scheduler = AlphaScheduler(guided, WithWarmup(Picky(), 2))
    train(model, loss_fn, guided, scheduler, batches(9))
    assert guided.alpha_history.iterations.tolist() == [2, 5]


@pytest.mark.compatibility("Schedules", "each of them after a resume")
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("policy", [Alternating, lambda: CalibrateThenAnneal(40), TargetAlpha])
def test_a_resumed_run_has_the_same_rates(name, policy, tmp_path):
    def build():
        model, base = make(momentum=0.9)
        loss_fn = nn.CrossEntropyLoss()
        guided = AlphaGuided(base, model, loss_fn)
        return model, loss_fn, guided, AlphaScheduler(guided, policy(), schedule=SCHEDULES[name](guided))

    data = batches(24)
    model, loss_fn, guided, scheduler = build()
    train(model, loss_fn, guided, scheduler, data[:11])
    saved = {
        "model": model.state_dict(),
        "optimizer": guided.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    torch.save(saved, tmp_path / "run.pt")
    expected = train(model, loss_fn, guided, scheduler, data[11:])

    model, loss_fn, guided, scheduler = build()
    loaded = torch.load(tmp_path / "run.pt", weights_only=True)
    model.load_state_dict(loaded["model"])
    guided.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    assert train(model, loss_fn, guided, scheduler, data[11:]) == expected


def test_it_is_a_torch_scheduler():
    model, base = make()
    guided = AlphaGuided(base, model)
    scheduler = AlphaScheduler(guided)
    assert isinstance(scheduler, torch_schedules.LRScheduler)
    assert scheduler.get_last_lr() == [0.1]
    assert scheduler.optimizer is guided
    assert copy.deepcopy(scheduler.state_dict()) == scheduler.state_dict()
    assert math.isinf(scheduler.max_lr)


def test_a_policys_own_attributes_are_its_own():
    class Mine:
        limit = 0.5

        def __call__(self, measurement):
            return 1.0

    model = nn.Linear(3, 1)
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model)
    scheduler = AlphaScheduler(optimizer, Mine(), max_lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [0.1]


def classified(optimizer, model, loss_fn, scheduler, steps):
    """Train on a small classification; yields the rate after every step."""
    for _ in range(steps):
        x = torch.randn(32, 6)
        optimizer.zero_grad()
        loss_fn(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        scheduler.step()
        yield scheduler.get_last_lr()[0]


@pytest.mark.parametrize(("lr", "most", "around"), [(1.0, 0.01, True), (100.0, 0.1, False), (1e-5, 2e-5, False)])
def test_a_bound_below_the_rate_given_or_just_above_it(lr, most, around):
    """What is held is a rate that there is, so that a cut of the guard's lowers it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=lr), model, loss_fn)
    policy = CalibrateThenAnneal(300, around=around)
    scheduler = AlphaScheduler(optimizer, policy, max_lr=most)
    assert max(classified(optimizer, model, loss_fn, scheduler, 140)) <= most * (1 + 1e-9)
    assert policy.calibrated
    assert lr * math.exp(policy._held.now) <= most * (1 + 1e-9)
    told = [float(number) for _, text in policy.story for number in re.findall(r"(?:to|at|is) (\d[\d.e-]*\d)", text)]
    assert all(rate <= most * 1.01 for rate in told)
    assert not any("too few steps were measured" in text for _, text in policy.story)


@pytest.mark.parametrize("how", ["max_lr", "Bounded", "two groups"])
def test_a_search_knows_the_highest_rate(how):
    """It takes no steps beyond it and speaks of no rate above it."""
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), nn.CrossEntropyLoss()
    layers = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 5e-7}]
    groups = layers if how == "two groups" else model.parameters()
    optimizer = AlphaGuided(torch.optim.AdamW(groups, lr=1e-6), model, loss_fn)
    policy, most = CalibrateThenAnneal(400), 1e-3
    scheduler = (
        AlphaScheduler(optimizer, Bounded(policy, 1e-9, most / 1e-6))
        if how == "Bounded"
        else AlphaScheduler(optimizer, policy, max_lr=most)
    )
    told, rates = [], []
    for rate in classified(optimizer, model, loss_fn, scheduler, 400):
        rates.append(rate)
        told.append(float(re.search(r"at (\S+)\)", repr(policy)).group(1)) if not policy.calibrated else 0.0)
    assert max(rates) == pytest.approx(most, rel=1e-6)
    assert max(told) <= most * 1.01
    assert "which is the highest allowed" in policy.story[0][1]
    assert policy._envelope.found_at < 0.3 * 400
