"""Calls in an unusual order: states loaded late or without the other one, guards that come and go, rates written."""

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, Bounded, CalibrateThenAnneal, Hold, WithWarmup, find_lr
from alpha_optim.alpha.records import GuardEvent, GuardReason
from alpha_optim.integrations.loggers import record
from alpha_optim.policies.base import Decision
from alpha_optim.policies.calibrate.loss_watch import UNKNOWN

NAN = torch.full((32, 8), math.nan)
TARGETS = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))


def build(policy=None, normed=False, lr=0.1, rates=None, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), *([nn.BatchNorm1d(16)] if normed else []), nn.Tanh(), nn.Linear(16, 4)]
    model, loss_fn = nn.Sequential(*layers), nn.CrossEntropyLoss()
    groups = [list(model[0].parameters()), list(model[1:].parameters())]
    given = [lr, lr] if rates is None else rates
    params = [{"params": group, "lr": rate} for group, rate in zip(groups, given, strict=True)]
    guided = AlphaGuided(torch.optim.SGD(params if rates else model.parameters(), lr=lr), model, loss_fn)
    steered = policy is not None or "total_steps" in options
    return model, loss_fn, guided, AlphaScheduler(guided, policy, **options) if steered else None


def batch(n):
    generator = torch.Generator().manual_seed(1000 + n)
    x = torch.randn(32, 8, generator=generator)
    return x, (x @ TARGETS + torch.randn(32, 4, generator=generator)).argmax(1)


def go(model, loss_fn, guided, scheduler, numbers, broken=(), scheduled=True):
    for n in numbers:
        x, y = batch(n)
        guided.zero_grad()
        loss_fn(model(NAN if n in broken else x), y).backward()
        guided.step()
        if scheduler is not None and scheduled:
            scheduler.step()


def loaded(states, **options):
    """A new run that goes on from states, loaded once everything is built."""
    run = build(**options)
    for part, state in zip((run[0], run[2], run[3]), states, strict=True):
        if part is not None and state is not None:
            part.load_state_dict(copy.deepcopy(state))
    return run


def states_of(model, loss_fn, guided, scheduler):
    return copy.deepcopy([model.state_dict(), guided.state_dict(), scheduler.state_dict() if scheduler else None])


def all_finite(model):
    return all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_the_guard_judges_the_first_batch_after_the_state_of_an_unsteered_run():
    run = build()
    go(*run, range(50))
    resumed = loaded(states_of(*run), policy=Hold())
    go(*resumed, [50], broken=[50])
    assert [event.reason for event in resumed[2].guard_events] == [GuardReason.LOSS_NOT_FINITE]
    assert all_finite(resumed[0])


@pytest.mark.parametrize("between", [None, {"policy": Hold(), "guard": False}])
def test_a_guard_remembers_no_point_from_before_a_stretch_without_one(between):
    first = build(Hold())
    go(*first, range(30))
    second = loaded(states_of(*first), **(between or {}))
    go(*second, range(30, 60))
    before = copy.deepcopy(second[0].state_dict())
    if between is None:
        third = (*second[:3], AlphaScheduler(second[2], Hold()))
    else:
        third = loaded(states_of(*second), policy=Hold())
    go(*third, [60, 61], broken=[60, 61])
    assert all(torch.equal(value, before[name]) for name, value in third[0].state_dict().items())
    assert not any(event.restored for event in third[2].guard_events)


def constrained(model, guided):
    with torch.no_grad():
        model[0].weight.renorm_(2, 0, 0.5)


def grown(model, guided):
    model.append(nn.Linear(4, 4))
    guided.add_param_group({"params": list(model[-1].parameters())})


@pytest.mark.parametrize("change", [constrained, grown])
@pytest.mark.parametrize("late", [False, True])
def test_statistics_are_as_before_an_unused_batch_where_there_is_no_point_to_go_back_to(change, late):
    model, loss_fn, guided, scheduler = build(Hold(), normed=True)
    go(model, loss_fn, guided, scheduler, range(20))
    before = copy.deepcopy(model[1].state_dict())
    assert float(before["running_mean"].abs().max()) > 0.0
    guided.zero_grad()
    if not late:
        change(model, guided)
    loss_fn(model(NAN), batch(20)[1]).backward()
    if late:  # between the forward pass and the step
        change(model, guided)
    guided.step()
    assert guided.guard_events[-1].skipped
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())


def test_statistics_are_as_before_an_unused_batch_right_after_the_guard_has_rested():
    model, loss_fn, guided, scheduler = build(Hold(), normed=True)
    go(model, loss_fn, guided, scheduler, range(20))
    go(model, loss_fn, guided, scheduler, range(20, 24), scheduled=False)
    scheduler.step()
    states, before = states_of(model, loss_fn, guided, scheduler), copy.deepcopy(model[1].state_dict())
    go(model, loss_fn, guided, scheduler, [24], broken=[24])
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
    resumed = loaded(states, policy=Hold(), normed=True)
    huge = batch(24)[0].clone()
    huge[0] = 1e38  # the loss is finite, a running variance would not be
    for run in (resumed, loaded(states, policy=Hold(), normed=True)):
        run[2].zero_grad()
        run[1](run[0](huge), batch(24)[1]).backward()
        run[2].step()
        assert [event.reason for event in run[2].guard_events] == [GuardReason.STATE_NOT_FINITE]


def test_find_lr_puts_a_rate_back_that_is_a_tensor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.05), foreach=False)
    rate = optimizer.param_groups[0]["lr"]
    find_lr(model, optimizer, [batch(n) for n in range(10)], nn.CrossEntropyLoss())
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == float(optimizer.defaults["lr"]) == pytest.approx(0.05)


@pytest.mark.parametrize("wrapped", [lambda p: Bounded(p), lambda p: WithWarmup(p, 1)])
def test_a_policy_that_is_wrapped_gets_lowered_rates_back_as_it_does_alone(wrapped):
    rates = {}
    for name, policy in (("alone", Hold()), ("wrapped", wrapped(Hold()))):
        run = build(policy)
        go(*run, range(60))
        go(*run, [60, 61], broken=[60, 61])
        lowered = run[2].param_groups[0]["lr"]
        go(*run, range(62, 400))
        rates[name] = lowered, run[2].param_groups[0]["lr"]
    assert rates["alone"] == rates["wrapped"] == (pytest.approx(0.05), pytest.approx(0.1))


@pytest.mark.parametrize("bound", [{"min_lr": 0.01}, {"max_lr": 0.02}])
def test_an_added_group_gets_its_rate_where_a_bound_is_in_force(bound):
    policy = (lambda m: 0.5) if "min_lr" in bound else CalibrateThenAnneal(90, anneal=False)
    run = build(policy, **bound)
    go(*run, range(20))
    assert run[2].param_groups[0]["lr"] == pytest.approx(*bound.values())
    run[0].append(nn.Linear(4, 4))
    run[2].add_param_group({"params": list(run[0][-1].parameters()), "lr": 0.015})
    go(*run, range(20, 23))
    assert [group["lr"] for group in run[2].param_groups] == [*map(pytest.approx, bound.values()), pytest.approx(0.015)]


@pytest.mark.parametrize("at", [5, 60, 100])
def test_a_rate_written_while_one_is_searched_moves_no_trial(at):
    """It counts as the rate given, for its own group; what is tried are rates, not multiples of it."""
    rates = {}
    for written in (False, True):
        run = build(rates=[0.1, 0.01], total_steps=1000)
        go(*run, range(at))
        if written:
            run[2].param_groups[0]["lr"] = 0.2
            with pytest.warns(UserWarning, match="it is the rate given"):
                go(*run, [at])
        else:
            go(*run, [at])
        rates[written] = [group["lr"] for group in run[2].param_groups]
    first, second = rates[False], rates[True]
    assert first[0] / first[1] == pytest.approx(10.0)
    assert second[0] / second[1] == pytest.approx(20.0)
    assert second[0] == pytest.approx(first[0], rel=0.5)  # its next rate hangs on that of the step made meanwhile


def test_broken_batches_say_nothing_about_the_level_of_the_loss():
    policy = CalibrateThenAnneal(1000, anneal=False)
    policy.decide(0, 1.0)
    policy.give_up(0)
    policy._held.begin(0.0, UNKNOWN, 0.0)
    policy.on_event(GuardEvent(5, GuardReason.LOSS_NOT_FINITE, 1.0, math.nan, restored=False))
    policy.on_event(GuardEvent(4, GuardReason.LOSS_NOT_FINITE, 1.0, math.nan, restored=True, scale_factor=0.5))
    assert policy.decide(5, 1.0).scale == pytest.approx(0.5)
    policy.on_event(GuardEvent(4, GuardReason.NO_EFFECT, 1.0, 1.0, restored=False, scale_factor=2.0, skipped=False))
    assert policy.decide(5, 1.0).scale * policy.envelope(5) == pytest.approx(1.0)
    assert not policy._held._high_loss.gave_up


class Decides:
    """Doubles the scale it decides on in the middle."""

    def __call__(self, measurement):
        return 1.0

    def decide(self, iteration, given):
        return Decision(scale=1.0 if iteration < 25 else 2.0)


@pytest.mark.parametrize("policy", [Hold(), Decides()])
def test_cooling_down_is_linear_whatever_a_policy_decides_and_goes_on_from_where_it_is(policy):
    run = build(policy)
    go(*run, range(20))
    run[3].cool_down(10)
    rates = []
    for n in range(20, 28):
        go(*run, [n])
        rates.append(run[2].param_groups[0]["lr"])
    assert rates == pytest.approx([0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.02])
    run[3].cool_down(4)
    assert run[2].param_groups[0]["lr"] == pytest.approx(0.02)
    resumed = loaded(states_of(*run), policy=policy)
    go(*resumed, range(28, 30))
    assert resumed[2].param_groups[0]["lr"] == pytest.approx(0.01)


def test_at_the_end_of_cooling_down_a_lower_bound_keeps_the_ratios():
    run = build(Hold(), rates=[0.1, 0.01], min_lr=1e-4)
    go(*run, range(3))
    run[3].cool_down(3)
    go(*run, range(3, 8))
    assert [group["lr"] for group in run[2].param_groups] == pytest.approx([1e-3, 1e-4])


def test_without_the_schedulers_state_the_points_of_a_search_are_dropped():
    run = build(total_steps=1000)
    go(*run, range(60))
    resumed = loaded([*states_of(*run)[:2], None])
    calls = []
    resumed[2].register_accepted_hook(lambda optimizer: calls.append(optimizer.iteration))
    go(*resumed, range(60, 70))
    assert len(calls) == 10
    assert not resumed[2].state_dict()["alpha_guided"]["search_points"]["points"]


def test_a_search_that_is_resumed_in_a_shorter_run_ends_in_time():
    run = build(total_steps=10_000, lr=1e-3)
    go(*run, range(60))
    assert "trials" in repr(run[3])
    resumed = loaded(states_of(*run), total_steps=400, lr=1e-3)
    go(*resumed, range(60, 63))
    assert resumed[3].policy.calibrated
    go(*resumed, range(63, 400))
    assert resumed[2].param_groups[0]["lr"] < 0.01 * resumed[3].policy.found_lr


def test_a_state_without_a_model_leaves_the_choice_of_how_to_measure():
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(8, 4), nn.CrossEntropyLoss()
    blind = AlphaGuided(torch.optim.Adam(model.parameters()))
    go(model, loss_fn, blind, None, range(6))
    seeing = AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn)
    seeing.load_state_dict(copy.deepcopy(blind.state_dict()))
    go(model, loss_fn, seeing, None, range(6, 12))
    assert str(seeing.alpha_history[-1].information) == "full"


def several():
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), nn.CrossEntropyLoss()
    parts = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters(), lr=1e-3)]
    return model, loss_fn, AlphaGuided(parts, model, loss_fn)


def test_a_state_that_fits_one_of_several_optimizers_changes_none():
    guided = several()[2]
    state = guided.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    state["param_groups"][1]["params"] = state["param_groups"][1]["params"][:1]
    with pytest.raises(ValueError, match="nothing was changed"):
        guided.load_state_dict(state)
    assert guided.param_groups[0]["lr"] == 0.1


def test_a_group_that_is_refused_ends_no_search():
    model, loss_fn, guided = several()
    scheduler = AlphaScheduler(guided, total_steps=1000)
    go(model, loss_fn, guided, scheduler, range(10))
    with pytest.raises(ValueError, match="which of them gets the group"):
        model.append(nn.Linear(4, 4))
        guided.add_param_group({"params": list(model[-1].parameters())})
    assert not scheduler.policy.calibrated


def test_a_second_scheduler_that_comes_later_is_noticed_when_both_make_steps():
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), nn.CrossEntropyLoss()
    first, second = (AlphaGuided(torch.optim.SGD(model[k].parameters(), lr=0.1), model, loss_fn) for k in (0, 2))
    steered = AlphaScheduler(first, Hold())
    go(model, loss_fn, first, steered, [0])
    also = AlphaScheduler(second, Hold())  # as for a second phase of training
    go(model, loss_fn, second, also, [1])
    with pytest.warns(UserWarning, match="two of them would take back different steps"):
        go(model, loss_fn, first, steered, [2])


@pytest.mark.parametrize("leave", [lambda guided: guided.detach(), lambda guided: guided.__exit__(None, None, None)])
def test_a_climb_that_is_left_is_put_back(leave):
    run = build(total_steps=1000, lr=1e-3)
    before = copy.deepcopy(run[0].state_dict())
    go(*run, range(30))
    assert not all(torch.equal(value, before[name]) for name, value in run[0].state_dict().items())
    hooks = [len(module._forward_hooks) for module in run[0].modules()]
    leave(run[2])
    assert all(torch.equal(value, before[name]) for name, value in run[0].state_dict().items())
    assert not any(len(module._forward_hooks) for module in run[0].modules())
    assert any(hooks)


def test_finish_has_no_batch_to_skip_and_judges_nothing_while_the_guard_rests():
    run = build(Hold())
    go(*run, range(30))
    go(*run, range(30, 32), scheduled=False)
    run[3].finish(1e9)
    assert not run[2].guard_events
    run = build(Hold())
    go(*run, range(30))
    run[3].finish(1e9)
    assert [(event.restored, event.skipped) for event in run[2].guard_events] == [(True, False)]
    assert run[2].guard_counts["batches_skipped"] == 0


def test_a_checkpoint_of_an_accepted_hook_counts_its_batch_once():
    run, saved = build(Hold()), []

    def keep(optimizer):
        if optimizer.iteration == 40:
            saved.extend(states_of(*run))

    run[2].register_accepted_hook(keep)
    go(*run, range(60))
    resumed = loaded(saved, policy=Hold())
    go(*resumed, range(40, 60))
    ours = [part[2].state_dict()["alpha_guided"]["guard"] for part in (run, resumed)]
    names = [name for name in ours[0] if name not in ("last",)]
    assert len(names) > 5
    assert [ours[0][name] for name in names] == [ours[1][name] for name in names]


def test_events_from_after_the_checkpoint_are_cut_off_the_file_of_a_run(tmp_path):
    path = tmp_path / "run.jsonl"
    run = build(Hold())
    stop = record(run[2], path, run[3])
    go(*run, range(20), broken=[10])
    states = states_of(*run)
    go(*run, range(20, 40), broken=[20, 30])
    stop()
    resumed = loaded(states, policy=Hold())
    stop = record(resumed[2], path, resumed[3])
    go(*resumed, range(40, 60))
    stop()
    events = [line for line in path.read_text().splitlines() if line.startswith('{"event"')]
    assert len(events) == len(resumed[2].guard_events) == 1


def test_a_first_group_at_rate_0_does_not_stop_the_search():
    run = build(rates=[0.0, 0.01], total_steps=1000)
    go(*run, range(200))
    assert run[3].policy.calibrated
    assert run[3].policy.found_lr > 0.1
    assert [group["lr"] > 0.0 for group in run[2].param_groups] == [False, True]


def test_a_loop_that_takes_the_rates_over_in_a_search_leaves_no_point_in_memory():
    run = build(total_steps=1000, lr=1e-3)
    go(*run, range(45))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(45, 55):
            run[2].param_groups[0]["lr"] = 0.05 - 1e-4 * n
            go(*run, [n])
    assert any("the policy rests" in str(warning.message) for warning in caught)
    assert not run[2].state_dict()["alpha_guided"]["search_points"]["points"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_runs_with_one_loss_function_leave_nothing_behind(reduction):
    """A sweep in a notebook: the names of the run before are bound anew, the loss and its graph among them."""
    loss_fn, models = nn.CrossEntropyLoss(reduction=reduction), []
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        guided = AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn)
        assert len(loss_fn._forward_hooks) == 1
        models.append(weakref.ref(model))
        for n in range(5):
            x, y = batch(n)
            guided.zero_grad()
            loss = loss_fn(model(x), y).mean()
            loss.backward()
            guided.step()
        assert guided.alpha_history[-1].information == "full"
        model(torch.randn(37, 8))  # an evaluation under autograd; a warning of the next run would be an error here
        gc.collect()
    assert [known() is not None for known in models] == [False, False, False, True]


def test_rprop_has_no_rate_to_search(caplog):
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(8, 4), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.Rprop(model.parameters(), lr=0.01), model, loss_fn)
    scheduler = AlphaScheduler(guided, total_steps=200)
    assert "Rprop" in caplog.text
    go(model, loss_fn, guided, scheduler, range(3))
    assert scheduler.policy.calibrated
    assert guided.param_groups[0]["lr"] == pytest.approx(0.01)
