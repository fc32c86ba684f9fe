"""A resumed run continues bit for bit; bare and wrapped state dicts load into each other."""

import copy
import warnings

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from tests.test_transparency import equal_states

LOSS = nn.CrossEntropyLoss()
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def build(kind, backend="auto", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    loss_fn = nn.CrossEntropyLoss()
    guided = AlphaGuided(OPTIMIZERS[kind](model.parameters()), model, loss_fn, backend=backend, **options)
    return model, loss_fn, guided, AlphaScheduler(guided, total_steps=30)


def data(count):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)) for _ in range(count)
    ]


def train(model, loss_fn, guided, scheduler, batches, clip=False):
    for x, y in batches:
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        guided.step()
        scheduler.step()


CASES = [
    ("sgd", "backpack"),
    ("sgd", "layerwise"),
    ("sgd", "cached"),
    ("momentum", "cached"),
    ("momentum", "gradients"),
    ("adamw", "cached"),
    ("adamw", "gradients"),
    ("adamw", "layerwise"),
    ("momentum", "layerwise"),
]


@pytest.mark.compatibility("Resume", "state_dict and load_state_dict, weights_only=True")
@pytest.mark.parametrize(("kind", "backend"), CASES)
@pytest.mark.parametrize("cut", [0, 1, 2, 9, 17])
@pytest.mark.parametrize("clip", [False, True])
def test_a_resumed_run_continues_bit_for_bit(kind, backend, cut, clip, tmp_path):
    for every in (1, 3):
        batches = data(22)
        run = build(kind, backend, every=every)
        train(*run, batches[:cut], clip)
        state = {
            "model": run[0].state_dict(),
            "optimizer": run[2].state_dict(),
            "scheduler": run[3].state_dict(),
        }
        torch.save(state, tmp_path / "run.pt")
        train(*run, batches[cut:], clip)

        other = build(kind, backend, every=every)
        loaded = torch.load(tmp_path / "run.pt", weights_only=True)
        other[0].load_state_dict(loaded["model"])
        other[2].load_state_dict(loaded["optimizer"])
        other[3].load_state_dict(loaded["scheduler"])
        train(*other, batches[cut:], clip)

        assert equal_states(run[0].state_dict(), other[0].state_dict())
        assert repr(list(run[2].alpha_history)) == repr(list(other[2].alpha_history))
        assert run[2].alpha_history.dropped == other[2].alpha_history.dropped
        assert run[3].get_last_lr() == other[3].get_last_lr()
        assert run[2].iteration == other[2].iteration


@pytest.mark.parametrize(
    ("kind", "backend"), [("sgd", "backpack"), ("sgd", "layerwise"), ("momentum", "auto"), ("adamw", "auto")]
)
@pytest.mark.parametrize("variance", ["sampled", "exact"])
@pytest.mark.parametrize("cut", [1, 2, 7, 30])
def test_variances_and_what_was_learned_go_on_where_they_were(kind, backend, variance, cut, tmp_path):
    """More samples than are sampled, and with exact variances rules of layers."""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 3))
        optimizer, loss_fn = OPTIMIZERS[kind](model.parameters()), nn.CrossEntropyLoss()
        return model, AlphaGuided(optimizer, model, loss_fn, variance=variance, backend=backend)

    def go(model, guided, batches):
        for x, y in batches:
            guided.zero_grad()
            guided._session.plan.loss_fn(model(x), y).backward()
            guided.step()

    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(20, 60, generator=generator), torch.randint(0, 3, (20,), generator=generator)) for _ in range(40)
    ]
    model, guided = make()
    go(model, guided, batches[:cut])
    torch.save([model.state_dict(), guided.state_dict()], tmp_path / "run.pt")
    go(model, guided, batches[cut:])
    other_model, other = make()
    for part, state in zip((other_model, other), torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    go(other_model, other, batches[cut:])
    assert repr(list(guided.alpha_history)) == repr(list(other.alpha_history))
    assert guided.alpha_history[-1].information == "full"


def test_a_resumed_guard_can_still_take_the_last_step_back(tmp_path):
    batches = data(12)
    results = []
    for resumed in (False, True):
        run = build("momentum")
        train(*run, batches[:8])
        if resumed:
            torch.save([run[0].state_dict(), run[2].state_dict(), run[3].state_dict()], tmp_path / "run.pt")
            run = build("momentum")
            for part, state in zip(
                (run[0], run[2], run[3]), torch.load(tmp_path / "run.pt", weights_only=True), strict=True
            ):
                part.load_state_dict(state)
        x, y = batches[8]
        train(*run, [(x * float("nan"), y)] * 2 + batches[9:])
        assert [event.restored for event in run[2].guard_events if event.reason != "policy_returned"] == [False, True]
        results.append(run[0].state_dict())
    assert equal_states(*results)


@pytest.mark.parametrize("cut", [2, 5])  # at 1 nothing has been learned yet, and the next pair is lost instead
def test_a_loop_that_writes_into_the_gradients_after_a_step_loses_no_more_pairs_when_resumed(cut):
    """The first of them teaches to keep the direction of plain SGD; it may be the one that is pending when saved."""

    def fresh():
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
        return model, loss_fn, AlphaGuided(OPTIMIZERS["sgd"](model.parameters()), model, loss_fn)

    def run(model, loss_fn, guided, batches):
        for x, y in batches:
            loss_fn(model(x), y).backward()
            guided.step()
            for param in model.parameters():
                param.grad.zero_()
            guided.zero_grad()

    batches = data(12)
    whole, first, second = fresh(), fresh(), fresh()
    run(*whole, batches)
    run(*first, batches[:cut])
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(copy.deepcopy(first[2].state_dict()))
    run(*second, batches[cut:])
    assert whole[2].alpha_history.dropped == {"direction_overwritten": 1}
    assert second[2].alpha_history.state_dict() == whole[2].alpha_history.state_dict()


@pytest.mark.compatibility("Resume", "state dicts of bare and wrapped optimizers load into each other")
def test_bare_and_wrapped_state_dicts_load_into_each_other():
    model, loss_fn, guided, scheduler = build("adamw")
    train(model, loss_fn, guided, scheduler, data(5))
    bare = torch.optim.AdamW(model.parameters())
    bare.load_state_dict(guided.state_dict())
    assert equal_states(bare.state_dict()["state"], guided.optimizer.state_dict()["state"])

    _, _, other, _ = build("adamw")
    other.load_state_dict(bare.state_dict())
    assert other.iteration == 0
    assert len(other.alpha_history) == 0
    assert equal_states(other.optimizer.state_dict(), bare.state_dict())


def test_loading_ones_own_fresh_state_changes_nothing():
    """What Accelerate does to every optimizer it prepares."""
    model, loss_fn, guided, scheduler = build("momentum")
    before = guided.state_dict()
    guided.load_state_dict(state_dict=before)
    assert equal_states(before, guided.state_dict())
    train(model, loss_fn, guided, scheduler, data(4))
    assert len(guided.alpha_history) == 3


def test_pending_state_holds_no_individual_gradients():
    model, loss_fn, guided, scheduler = build("adamw")
    train(model, loss_fn, guided, scheduler, data(5))
    parameters = sum(p.numel() for p in model.parameters())

    def numbers(value):
        if isinstance(value, torch.Tensor):
            return value.numel()
        if isinstance(value, dict):
            return sum(map(numbers, value.values()))
        return sum(map(numbers, value)) if isinstance(value, (list, tuple)) else 0

    # The direction, the two points the guard goes back to (parameters and BatchNorm's buffers), and a
    # fingerprint of 33 numbers for each of the six parameters.
    assert numbers(guided.state_dict()["alpha_guided"]) <= 3 * parameters + 2 * 16 + 6 * 33 + 60


def test_everything_of_ours_sits_under_one_key():
    _, _, guided, _ = build("adamw")
    assert set(guided.state_dict()) == {"state", "param_groups", "alpha_guided"}
    assert all(isinstance(key, int) for key in guided.state_dict()["state"])


def skipped_run(every=1, guarded=True):
    """A few steps, and one that a gradient scaler would have skipped."""
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(6, 3), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn, every=every)
    scheduler = AlphaScheduler(guided, Hold()) if guarded else None
    for x, y in data(5):
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        if scheduler is not None:
            scheduler.step()
    guided.zero_grad()
    (loss_fn(model(x), y) * float("inf")).backward()
    return model, loss_fn, guided


def test_what_a_skipped_step_left_is_that_iterations_only():
    """Saved where a guard watches, resumed without one: a pair that begins later is measured."""
    model, _, guided = skipped_run(every=10)
    state = copy.deepcopy(guided.state_dict())
    assert state["alpha_guided"]["pairing"]["unused"]["skipped"]
    model2 = nn.Linear(6, 3)
    loss_fn = nn.CrossEntropyLoss()
    resumed = AlphaGuided(torch.optim.SGD(model2.parameters(), lr=0.1), model2, loss_fn, every=10)
    model2.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    for x, y in data(20):
        resumed.zero_grad()
        loss_fn(model2(x), y).backward()
        resumed.step()
    assert resumed.alpha_history.iterations.tolist() == [0, 10, 20]
    assert resumed.alpha_history.dropped == {}


@pytest.mark.parametrize("unused", [{"skipped": "yes"}, {"losses": "12"}, {"losses": [None]}, {"other": 1}, None])
def test_nonsense_about_skipped_passes_is_refused(unused):
    _, _, guided = skipped_run()
    state = copy.deepcopy(guided.state_dict())
    state["alpha_guided"]["pairing"]["unused"] = unused
    del state["alpha_guided"]["checksum"]
    before = copy.deepcopy(guided.state_dict())
    with pytest.raises(ValueError, match="cannot be taken over"):
        guided.load_state_dict(state)
    assert equal_states(before, guided.state_dict())


def test_a_checkpoint_in_an_accepted_hook_takes_the_current_batch_for_a_good_one():
    """Its gradients were not finite as the backward pass left them, and the loop has put that right."""
    saved = {}

    def run(first=0, states=None, hook=None):
        torch.manual_seed(0)
        model, loss_fn = nn.Linear(6, 3), nn.CrossEntropyLoss()
        guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
        if states is not None:
            model.load_state_dict(states[0])
            guided.load_state_dict(states[1])
        if hook is not None:
            guided.register_accepted_hook(lambda _: hook(model, guided))
        for n, (x, y) in list(enumerate(data(8)))[first:]:
            guided.zero_grad()
            (loss_fn(model(x), y) * (float("inf") if n == 4 else 1.0)).backward()
            for param in model.parameters():
                torch.nan_to_num_(param.grad, 0.0, 0.0, 0.0)
            guided.step()
        return guided.alpha_history

    def keep(model, guided):
        saved.setdefault(guided.iteration, copy.deepcopy([model.state_dict(), guided.state_dict()]))

    whole, resumed = run(hook=keep), run(first=4, states=saved[4])
    assert repr(list(whole)) == repr(list(resumed))
    assert whole.dropped == resumed.dropped


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("cut", [3, 30, 90])
def test_an_optimizer_state_without_the_schedulers_explodes_nothing(kind, cut):
    """The rate in it counts as the one given, and a search begins anew; nothing of before is news to its policy."""

    def fresh():
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), nn.CrossEntropyLoss()
        guided = AlphaGuided(OPTIMIZERS[kind](model.parameters()), model, loss_fn)
        return model, loss_fn, guided, AlphaScheduler(guided, total_steps=300)

    first, second = fresh(), fresh()
    began = second[2].param_groups[0]["lr"]
    batches = data(300)
    train(*first, batches[:cut])
    second[0].load_state_dict(first[0].state_dict())
    second[2].load_state_dict(copy.deepcopy(first[2].state_dict()))
    rates = []
    with pytest.warns(UserWarning, match=r"load scheduler\.state_dict\(\) as well") as caught:
        for batch in batches[cut:]:
            train(*second, [batch])
            rates.append(second[2].param_groups[0]["lr"])
    assert rates[0] == pytest.approx(began)
    assert max(rates) < 100.0
    assert all(torch.isfinite(param).all() for param in second[0].parameters())
    assert len(caught) == 1
    policy = second[3].policy
    assert policy.calibrated
    assert policy.phases[0] == (0, "jump")
    assert policy.phases[1][0] > cut


@pytest.mark.parametrize("forgotten", ["optimizer", "scheduler", None])
def test_a_state_that_was_forgotten_is_missed(forgotten):
    """The scheduler's is of step 20; of the other one of the two nothing was loaded, or what an earlier one says."""
    first = build("adamw")
    train(*first, data(10))
    early = copy.deepcopy([part.state_dict() for part in (first[2], first[3])])
    train(*first, data(20)[10:])
    late = [part.state_dict() for part in (first[2], first[3])]
    second = build("adamw") if forgotten == "optimizer" else first
    if forgotten != "optimizer":
        second[2].load_state_dict(early[0])
    if forgotten != "scheduler":
        second[3].load_state_dict(late[1] if forgotten == "optimizer" else early[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(*second, data(30)[20:])
    said = [str(entry.message) for entry in caught]
    assert sum("load both states" in text for text in said) == (forgotten is not None)
    assert second[2].alpha_history[-1].iteration == second[2].iteration - 2


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_a_step_that_exploded_before_the_checkpoint_is_taken_back_in_whatever_order_states_are_loaded(order):
    def parts():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, LOSS)
        spike = torch.optim.lr_scheduler.LambdaLR(guided, lambda n: 1e4 if n == 29 else 1.0)
        return model, guided, AlphaScheduler(guided, Hold(), schedule=spike)

    def go(model, guided, scheduler, batches):
        train(model, LOSS, guided, scheduler, batches)
        return copy.deepcopy(model.state_dict()), str(guided.guard_events)

    first = parts()
    go(*first, data(30))
    states = copy.deepcopy([part.state_dict() for part in first])
    expected = go(*first, data(40)[30:])
    assert "restored=True" in expected[1]
    second = parts()
    for place in order:
        second[place].load_state_dict(states[place])
    weights, events = go(*second, data(40)[30:])
    assert events == expected[1]
    assert equal_states(weights, expected[0])
