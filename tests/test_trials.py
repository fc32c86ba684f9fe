"""The points of a search: what is put back, bit for bit, and who is told."""

import copy
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedules

from alpha_optim import AlphaGuided, AlphaScheduler, Bounded, CalibrateThenAnneal, TargetAlpha, WithWarmup
from alpha_optim.policies.base import Decision
from alpha_optim.steer.point import all_finite
from alpha_optim.steer.search import Search
from tests.test_transparency import equal_states

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "adamw amsgrad": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "asgd": lambda params: torch.optim.ASGD(params, lr=1e-2),
    "nadam": lambda params: torch.optim.NAdam(params, lr=1e-2),
    "rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
}


class Net(nn.Module):
    """With BatchNorm, whose statistics move at every step."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        return self.layers(x)


class Scripted:
    """A policy that keeps and restores points when it is told to."""

    def __init__(self, moves, searching_until=math.inf):
        self.moves, self.until = moves, searching_until

    def __call__(self, measurement):
        return 1.0

    def decide(self, iteration, given):
        keep, restore = self.moves.get(iteration, (None, None))
        searching = iteration < self.until
        return Decision(0.5, keep, restore, trial=searching, searching=searching)


def make(kind="adamw"):
    torch.manual_seed(0)
    model = Net()
    return model, nn.CrossEntropyLoss(), OPTIMIZERS[kind](model.parameters())


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 6, generator=generator)
        yield x, (x[:, 0] > 0).long()


def guided(policy, kind="adamw", every=1, **options):
    model, loss_fn, base = make(kind)
    optimizer = AlphaGuided(base, model, loss_fn, every=every)
    return model, loss_fn, optimizer, AlphaScheduler(optimizer, policy, **options)


def train(model, loss_fn, optimizer, scheduler, data, after=None):
    for x, y in data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        if after is not None:
            after(optimizer.iteration)


def everything(model, optimizer):
    states = copy.deepcopy([model.state_dict(), optimizer.optimizer.state_dict()])
    for group in states[1]["param_groups"]:
        del group["lr"]
    return states


@pytest.mark.parametrize("guard", [True, False, "cpu"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_point_is_put_back_bit_for_bit_with_buffers_and_the_whole_state_of_the_optimizer(kind, guard):
    run = guided(Scripted({5: ("start", None), 12: (None, "start")}), kind, guard=guard)
    seen = {}
    train(*run, batches(12), lambda n: seen.update({n: everything(run[0], run[2])}))
    assert not equal_states(seen[11], seen[5])
    assert equal_states(seen[12], seen[5])


def test_what_follows_is_what_would_have_followed_from_that_point():
    """Against bare torch, which is taken back by deep copies of its state dicts."""
    model, loss_fn, base = make()
    for group in base.param_groups:
        group["lr"] *= 0.5
    kept = None
    for n, (x, y) in enumerate(batches(30)):
        if n == 5:
            kept = copy.deepcopy([model.state_dict(), base.state_dict()])
        if n in (12, 20):
            model.load_state_dict(copy.deepcopy(kept[0]))
            base.load_state_dict(copy.deepcopy(kept[1]))
        base.zero_grad()
        loss_fn(model(x), y).backward()
        base.step()
    run = guided(Scripted({5: ("start", None), 12: (None, "start"), 20: (None, "start")}))
    train(*run, batches(30))
    assert equal_states(run[0].state_dict(), model.state_dict())
    assert run[2].guard_events == ()


def test_the_best_of_two_trials_is_gone_on_from():
    run = guided(Scripted({3: ("start", None), 6: ("best", "start"), 9: (None, "best")}))
    seen = {}
    ends = {}
    session = run[2]._session
    restore = session.restore_point

    def watched(place):
        ends[run[2].iteration] = everything(run[0], run[2])
        return restore(place)

    session.restore_point = watched
    train(*run, batches(9), lambda n: seen.update({n: everything(run[0], run[2])}))
    assert equal_states(seen[6], seen[3])
    assert equal_states(seen[9], ends[6])


def test_pairs_across_a_restore_are_dropped_and_abandoned_trials_left_out():
    moves = {3: ("start", None), 6: ("best", "start"), 9: (None, "start"), 12: (None, "best")}
    run = guided(Scripted(moves))
    train(*run, batches(20))
    history = run[2].alpha_history
    assert history.dropped == {"restored": 3}
    assert not {5, 8, 11} & set(history.iterations.tolist())
    # Of three trials the first one, of the iterations 3 to 5, was the best.
    assert history.abandoned == [(6, 8), (9, 11)]
    lasting = [m.iteration for m in history.lasting()]
    assert lasting == [0, 1, 2, 3, 4, *range(12, 19)]
    assert history.windowed(100).count == len(lasting)
    assert len(history) == 19 - 3


def test_iterations_and_progress_never_fall_and_a_schedule_is_stepped_all_along():
    model, loss_fn, base = make()
    optimizer = AlphaGuided(base, model, loss_fn)
    schedule = torch_schedules.LambdaLR(optimizer, lambda n: 1.0 / (1 + n))
    scheduler = AlphaScheduler(optimizer, Scripted({3: ("start", None), 8: (None, "start")}, 12), schedule=schedule)
    rates = []
    train(model, loss_fn, optimizer, scheduler, batches(15), lambda n: rates.append(base.param_groups[0]["lr"]))
    assert optimizer.iteration == 15
    assert schedule.last_epoch == 15
    assert rates[:11] == pytest.approx([0.5 * 1e-2] * 11)  # the peak stands in
    assert rates[11:] == pytest.approx([0.5 * 1e-2 / (1 + n) for n in (12, 13, 14, 15)])


NOAM = 0.5 * 8**-0.5  # at step 8

PEAKS = {
    "lambda": (lambda o: torch_schedules.LambdaLR(o, lambda n: 1.0 / (1 + n)), 1.0),
    "a lambda above 1": (lambda o: torch_schedules.LambdaLR(o, lambda n: 10.0 * (1.0 - n / 100)), 10.0),
    "Noam": (lambda o: torch_schedules.LambdaLR(o, lambda n: 0.5 * min((n + 1e-9) ** -0.5, n * 8**-1.5)), NOAM),
    "cyclic": (lambda o: torch_schedules.CyclicLR(o, 1e-4, 2e-2, step_size_up=10, cycle_momentum=False), 2.0),
    "one cycle": (lambda o: torch_schedules.OneCycleLR(o, max_lr=0.3, total_steps=40, cycle_momentum=False), 30.0),
    "cosine": (lambda o: torch_schedules.CosineAnnealingLR(o, 40), 1.0),
    "raises later": (lambda o: torch_schedules.LambdaLR(o, lambda n: [1.0, 0.5, 0.5, 0.5, 0.5][n]), 1.0),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_a_schedule_stands_in_for_it_during_a_search(name):
    """As a multiple of the rate given, 1e-2; which is all that is known of a function that raises further on."""
    model, loss_fn, base = make()
    optimizer = AlphaGuided(base, model, loss_fn)
    build, peak = PEAKS[name]
    scheduler = AlphaScheduler(optimizer, Scripted({2: ("start", None)}), schedule=build(optimizer))
    rates = []
    train(model, loss_fn, optimizer, scheduler, batches(4), lambda n: rates.append(base.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.5 * 1e-2 * peak] * 4, rel=1e-6)


def test_a_plateau_is_looked_for_when_the_search_is_over():
    """What a metric does in trials that are put back says nothing of progress."""
    model, loss_fn, base = make()
    optimizer = AlphaGuided(base, model, loss_fn)
    plateau = torch_schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    scheduler = AlphaScheduler(optimizer, Scripted({3: ("start", None), 8: (None, "start")}, 12), schedule=plateau)
    rates = []
    for n, (x, y) in enumerate(batches(20)):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        scheduler.step(0.0 if n == 5 else 1.0)  # nothing is ever as good as in the middle of a trial
        rates.append(base.param_groups[0]["lr"] / (0.5 * 1e-2))
    assert rates == pytest.approx([1.0] * 14 + [0.5] * 3 + [0.25] * 3)


def test_hooks_for_accepted_points_sleep_and_run_once_at_the_chosen_point():
    run = guided(Scripted({3: ("start", None), 6: ("best", "start"), 9: (None, "best")}, searching_until=9))
    accepted, seen = {}, {}
    run[2].register_accepted_hook(
        lambda optimizer: accepted.update({optimizer.iteration: everything(run[0], optimizer)})
    )
    train(*run, batches(11), lambda n: seen.update({n: everything(run[0], run[2])}))
    assert list(accepted) == [9, 10]
    assert all(equal_states(accepted[n][1], seen[n][1]) for n in accepted)


@pytest.mark.parametrize("bad", ["nan", "explosion"])
def test_the_guard_ends_a_trial_and_scale_and_count_of_returns_stay(bad):
    exploded = []

    class Listens(Scripted):
        def on_event(self, event):
            exploded.append((event.restored, event.scale_factor))

    run = guided(Listens({1: ("start", None)}))
    train(*run, batches(20))
    model, loss_fn, optimizer, scheduler = run
    helpless = optimizer._session.supervision.guard._risen._helpless
    for x, y in list(batches(2, seed=3)):
        optimizer.zero_grad()
        if bad == "nan":
            loss_fn(model(x * math.nan), y).backward()
        else:
            loss_fn(model(x) * 1e4, y).backward()
        optimizer.step()
        scheduler.step()
    assert [restored for restored, _ in exploded] == [False, True]
    assert {factor for _, factor in exploded} == {1.0}
    assert scheduler.scale == 0.5
    assert optimizer._session.supervision.guard._risen._helpless == helpless


def test_a_point_that_is_gone_ends_the_search_and_changes_nothing():
    class Told(Scripted):
        gave_up = False

        def give_up(self, iteration):
            self.gave_up = True

    policy = Told({3: ("start", None), 8: (None, "start")})
    model, loss_fn, optimizer, scheduler = guided(policy)
    train(model, loss_fn, optimizer, scheduler, batches(5))
    before = model.layers[3]
    model.layers[3] = nn.Linear(16, 2)  # replaced by the user
    optimizer.param_groups[0]["params"] = list(model.parameters())
    for old in before.parameters():
        optimizer.optimizer.state.pop(old)
    with pytest.warns(UserWarning, match="a point of the search for the learning rate is gone"):
        train(model, loss_fn, optimizer, scheduler, batches(4, seed=1))
    assert policy.gave_up


def search_run(kind="momentum", steps=400, **options):
    return guided(CalibrateThenAnneal(steps), kind, every=None, **options)


def ended(scheduler, data, run):
    for n, batch in enumerate(data):
        train(*run, [batch])
        if scheduler.policy.calibrated:
            return n
    raise AssertionError


@pytest.mark.parametrize("guard", [True, False])
def test_a_real_search_ends_with_a_rate_and_no_points(guard):
    run = search_run(guard=guard)
    scheduler, optimizer = run[3], run[2]
    steps = ended(scheduler, batches(400), run)
    assert steps < 0.4 * 400
    assert "the best rate is" in scheduler.policy.story[-1][1]
    assert optimizer._session.search._points == {}
    assert "restored" in optimizer.alpha_history.dropped
    assert optimizer._session.search.trial is False


@pytest.mark.parametrize("order", ["optimizer first", "scheduler first"])
@pytest.mark.parametrize("cut", [2, 20, 45, 60, 85, 120])
def test_a_search_resumes_bit_for_bit_in_any_phase(cut, order, tmp_path):
    data = list(batches(200))
    one = search_run()
    train(*one, data[:cut])
    torch.save([part.state_dict() for part in (one[0], one[2], one[3])], tmp_path / "run.pt")
    two = search_run()
    states = torch.load(tmp_path / "run.pt", weights_only=True)
    two[0].load_state_dict(states[0])
    parts = [(two[2], states[1]), (two[3], states[2])]
    for part, state in parts if order == "optimizer first" else parts[::-1]:
        part.load_state_dict(state)
    rates = []
    for run in (one, two):
        rates.append([])
        train(*run, data[cut:], lambda n, run=run: rates[-1].append(run[2].param_groups[0]["lr"]))
    assert rates[0] == rates[1]
    assert equal_states(one[0].state_dict(), two[0].state_dict())
    assert one[3].policy.story == two[3].policy.story


def test_optimizer_state_loaded_without_the_schedulers_drops_the_points():
    run = search_run()
    train(*run, batches(60))
    assert run[2]._session.search._points
    state = copy.deepcopy(run[2].state_dict())
    other = search_run()
    other[0].load_state_dict(copy.deepcopy(run[0].state_dict()))
    other[2].load_state_dict(state)
    kept = other[2]._session.search._points.get("start")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loaded state brings its own rates
        train(*other, batches(3))
    points = other[2]._session.search._points
    assert points.get("start") is not kept or kept is None
    assert "best" not in points


def test_without_losses_the_rate_given_is_kept_with_one_message(caplog):
    model, _, base = make()
    optimizer = AlphaGuided(base)  # nothing but the optimizer
    scheduler = AlphaScheduler(optimizer, total_steps=300)
    rates = []
    with caplog.at_level("INFO", logger="alpha_optim"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, y in batches(120):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
            rates.append(base.param_groups[0]["lr"])
    assert scheduler.policy.calibrated
    assert rates[-1] == pytest.approx(1e-2)
    (said,) = [record.message for record in caplog.records if "no losses" in record.message]
    assert "optimizer.backward" in said
    assert said.endswith("the rate given is kept")


def test_without_a_guard_a_trial_that_is_not_finite_is_hopeless():
    """Nobody judges steps; the measurements say so."""
    model, loss_fn, base = make("sgd")
    optimizer = AlphaGuided(base, model, loss_fn, every=None)
    policy = CalibrateThenAnneal(400, around=True)
    scheduler = AlphaScheduler(optimizer, policy, guard=False)
    data = list(batches(60))
    train(model, loss_fn, optimizer, scheduler, data[:4])
    with torch.no_grad():
        model.layers[3].weight.fill_(math.nan)
    train(model, loss_fn, optimizer, scheduler, data[4:8])
    assert "hopeless" in policy.story[0][1]
    assert all(torch.isfinite(param).all() for param in model.parameters())


def test_a_search_that_waits_keeps_its_points():
    """One call of the scheduler after several steps: the search waits for it, and goes on."""
    run = search_run()
    model, loss_fn, optimizer, scheduler = run
    data = list(batches(200))
    train(*run, data[:50])
    assert optimizer._session.search._points
    for x, y in data[50:54]:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it waits
        scheduler.step()
    assert optimizer._session.search._points
    ended(scheduler, data[54:], run)
    assert "the best rate is" in scheduler.policy.story[-1][1]


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("bad", [(3, 4), (5, 6), (12, 13), (25, 26)])
def test_two_bad_batches_early_in_a_search_do_not_end_it(bad, guard):
    run = search_run(guard=guard)
    data = [(x * math.nan, y) if n in bad else (x, y) for n, (x, y) in enumerate(batches(200))]
    ended(run[3], data, run)
    assert any(text.startswith("trial of") for _, text in run[3].policy.story)


@pytest.mark.parametrize("where", ["float16", "eps of 0"])
def test_a_first_step_that_breaks_the_parameters_is_no_point_to_search_from(where):
    """Adam divides by the root of a squared gradient that is 0 in float16, and by 0 where a unit is dead."""
    torch.manual_seed(0)
    half = where == "float16"
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh() if half else nn.ReLU(), nn.Linear(5, 1))
    model = model.half() if half else model
    if not half:
        with torch.no_grad():
            model[0].bias[0] = -100.0
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, **({} if half else {"eps": 0.0}))
    optimizer = AlphaGuided(base, model, loss_fn := nn.MSELoss())
    scheduler = AlphaScheduler(optimizer, total_steps=150)
    for _ in range(40):
        x = torch.randn(8, 3).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss_fn(model(x), torch.zeros_like(x[:, :1])).backward()
        optimizer.step()
        scheduler.step()
    scheduler.finish()
    assert optimizer.guard_counts["steps_taken_back"] > 1
    assert all(torch.isfinite(param).all() for param in model.parameters())
    assert any("the rate given is kept" in text for _, text in scheduler.policy.story)


def test_a_point_that_is_not_finite_does_not_replace_the_best():
    model, _, optimizer = make()
    search = Search(model, optimizer)
    assert search.keep("start", 0)
    assert search.keep("best", 10)
    kept = [param.detach().clone() for param in model.parameters()]
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    assert not search.keep("best", 20)
    assert search.restore("best")
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


def test_parameters_of_eight_bits_can_be_looked_at():
    frozen = nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    assert all_finite([frozen, nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.int8), False)])
    assert not all_finite([nn.Parameter(torch.tensor([math.inf]))])


STOPS = [("Jump", 0), ("Climb", 0), ("Trials", 0), ("Trials", 1)]
"""Phases of a search, and how many trials are over."""


def searched_until(phase, over, further=3):
    """A run that is stopped in its search, and what it looked like after every step."""
    run = guided(CalibrateThenAnneal(600, anneal=False))
    model, _, optimizer, scheduler = run
    seen, left = {}, further
    for batch in batches(300):
        train(*run, [batch], lambda n: seen.update({n: everything(model, optimizer)}))
        now = scheduler.policy._phase
        left -= type(now).__name__ == phase and len(getattr(now, "scores", ())) == over
        if left == 0:
            return run, seen
    raise AssertionError("it never came there")


@pytest.mark.parametrize(("phase", "over"), STOPS)
@pytest.mark.parametrize("end", ["cool_down", "finish"])
def test_a_run_that_ends_in_its_search_ends_at_the_best_trial_so_far_or_where_they_begin(phase, over, end):
    run, seen = searched_until(phase, over)
    model, _, optimizer, scheduler = run
    scheduler.cool_down(40) if end == "cool_down" else scheduler.finish()
    assert scheduler.policy.calibrated
    now, told = everything(model, optimizer), scheduler.policy.story[-1][1]
    assert not equal_states(now, seen[optimizer.iteration])
    if over:
        assert "the best rate so far is" in told
        assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.policy.found_lr)
    else:
        assert told.startswith("the search was cut short, and the model put back to where it began")
        if phase == "Trials":
            lowest = re.search(r"the loss was lowest at a rate of ([\d.]+)", scheduler.policy.story[-2][1])
            assert scheduler.policy.found_lr == pytest.approx(float(lowest[1]) / 2.0, rel=0.01)
        else:
            assert told.endswith("the rate given is kept")
            assert scheduler.policy.found_lr == pytest.approx(1e-2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.policy.found_lr)
        assert any(equal_states(now, seen[n]) for n in (1, 2, 3))  # where the search began


@pytest.mark.parametrize(("phase", "over"), STOPS)
def test_a_run_that_is_cooled_down_in_its_search_cools_at_once(phase, over):
    run, _ = searched_until(phase, over)
    optimizer, scheduler = run[2], run[3]
    scheduler.cool_down(40)
    rates = [optimizer.param_groups[0]["lr"]]
    train(*run, batches(45, seed=1), lambda n: rates.append(optimizer.param_groups[0]["lr"]))
    assert rates[:41] == pytest.approx([rates[0] * (1 - n / 40) for n in range(41)])
    assert rates[41:] == [0.0] * 5
    assert not scheduler._session.search._points  # the memory is free


def test_a_run_that_is_cooled_down_before_its_first_step_keeps_the_rate_given():
    run = guided(CalibrateThenAnneal(600, anneal=False))
    before = everything(run[0], run[2])
    run[3].cool_down(40)
    assert run[3].policy.calibrated
    assert equal_states(everything(run[0], run[2]), before)
    assert run[2].param_groups[0]["lr"] == pytest.approx(1e-2)


def test_the_best_trial_so_far_is_put_back_bit_for_bit():
    """Against a copy made when it was kept."""
    run = guided(CalibrateThenAnneal(600, anneal=False))
    model, loss_fn, optimizer, scheduler = run
    search, kept = scheduler._session.search, {}
    keep = search.keep

    def keeps(place, iteration):
        kept[place] = everything(model, optimizer)
        return keep(place, iteration)

    search.keep = keeps
    for x, y in batches(300):
        train(model, loss_fn, optimizer, scheduler, [(x, y)])
        if "best" in kept and search.trial and scheduler.policy._phase.made == 5:
            break
    assert not equal_states(everything(model, optimizer), kept["best"])
    scheduler.finish()
    assert equal_states(everything(model, optimizer), kept["best"])


def test_wrapped_policies_are_cut_short_as_well():
    run = guided(Bounded(WithWarmup(CalibrateThenAnneal(600), 3), 1e-9, 1e9))
    train(*run, batches(30))
    run[3].cool_down(10)
    assert run[3].policy.policy.policy.calibrated


def test_cutting_short_changes_nothing_where_nothing_is_searched():
    run = guided(TargetAlpha(0.1))
    train(*run, batches(10))
    before = everything(run[0], run[2])
    run[3].cool_down(10)
    run[3].finish()
    assert equal_states(everything(run[0], run[2]), before)


def test_which_trials_came_to_nothing_goes_on_from_a_state():
    model, _, optimizer = make()
    searches = [Search(model, optimizer) for _ in range(2)]
    assert searches[0].keep("start", 3)
    assert searches[0].keep("best", 10)
    searches[1].load_state_dict(copy.deepcopy(searches[0].state_dict()))
    assert equal_states(searches[1].state_dict(), searches[0].state_dict())
    assert [search.abandoned("best", 20, [(3, 9)]) for search in searches] == [[(3, 19)]] * 2


@pytest.mark.parametrize("kind", ["loaded", "clamped", "exchanged"])
@pytest.mark.parametrize("at", [3, 30, 90])
def test_weights_that_are_loaded_while_a_rate_is_searched_are_not_lost(kind, at):
    """Weights that are clamped at every step, or exchanged for others and back, begin no search anew."""
    run = search_run()
    model, _, _, scheduler = run
    loaded = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, batch in enumerate(batches(140)):
            if kind == "clamped":
                with torch.no_grad():
                    for param in model.parameters():
                        param.clamp_(-0.9, 0.9)
            elif step == at:
                before = copy.deepcopy(model.state_dict())
                model.load_state_dict(loaded)
                if kind == "exchanged":
                    model.load_state_dict(before)
            train(*run, [batch])
            if kind == "loaded" and step == at:
                assert (model.layers[0].weight - 0.5).abs().max() < 0.01  # a small step from there
    told = [entry for entry in caught if "parameters were changed while" in str(entry.message)]
    anew = [text for _, text in scheduler.policy.story if "somebody has changed the parameters" in text]
    if kind == "clamped":
        assert len(told) <= 1
        assert scheduler.policy.calibrated
    else:
        assert len(told) == len(anew) == (kind == "loaded")


def test_going_back_to_a_checkpoint_during_a_search_is_no_edit():
    data = list(batches(120))
    run = search_run()
    train(*run, data[:30])
    states = copy.deepcopy([part.state_dict() for part in (run[0], run[2], run[3])])
    train(*run, data[30:])
    ends = [copy.deepcopy(run[0].state_dict())]
    for part, state in zip((run[0], run[2], run[3]), states, strict=True):
        part.load_state_dict(state)
    train(*run, data[30:])
    assert equal_states(run[0].state_dict(), ends[0])
    assert not any("somebody has changed" in text for _, text in run[3].policy.story)
