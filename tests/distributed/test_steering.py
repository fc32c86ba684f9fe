"""Ranks decide together: the same rates bit for bit, and what the guard does it does on all."""

import math
import pathlib

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alpha_optim import AlphaGuided, AlphaScheduler, find_lr
from alpha_optim.policies import Hold
from tests.distributed import setups

STEPS = 150


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 3))


def state_of(model):
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def search(rank, size, optimizer, lr, given=True, guard=True, **kwargs):
    """A whole run with a search for the rate."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    net = DistributedDataParallel(model)
    bare = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](model.parameters(), lr=lr)
    guided = AlphaGuided(bare, net if given else None, loss_fn if given else None, **kwargs)
    scheduler = AlphaScheduler(guided, total_steps=STEPS, guard=guard) if given else AlphaScheduler(guided)
    rates = []
    for step in range(STEPS):
        x, y = setups.of_rank(step, rank, size, dtype=torch.float32, total=64)
        guided.zero_grad()
        loss_fn(net(x), y).backward()
        guided.step()
        scheduler.step()
        rates.append(guided.param_groups[0]["lr"])
    scheduler.finish()
    with torch.no_grad():
        loss = float(loss_fn(net.eval()(setups.batch(999, torch.float32)[0]), setups.batch(999)[1]))
    return {
        "rates": rates,
        "params": list(map(torch.clone, model.parameters())),
        "loss": loss,
        "events": guided.guard_events,
    }


SEARCHES = {
    "from far below": ("adamw", 1e-6),
    "from far above": ("adamw", 100.0),
    "plain SGD": ("sgd", 1e-4),
    "without a guard": ("adamw", 1e-6, True, False),
    "policy asked": ("adamw", 1e-6, True, True),
    "optimizer alone": ("adamw", 1e-3, False),
}


def mishap(rank, size, name):
    """With a rate held; something happens, mostly on the last rank only."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    net, last = DistributedDataParallel(model), rank == size - 1
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), net, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=name == "scaler")
    broken = {"one batch": (20,), "scaler": (20,), "two batches": (20, 21), "four batches": (20, 21, 22, 23)}.get(
        name, ()
    )
    seen, rates = [], []
    for step in range(40):
        x, y = setups.of_rank(step, rank, size, dtype=torch.float32, total=64)
        guided.zero_grad()
        scaler.scale(loss_fn(net(x * math.nan if last and step in broken else x), y)).backward()
        if name == "explosion" and step == 30:
            with torch.no_grad():
                for param in model.parameters():
                    param.grad.mul_(1e6)
        scaler.step(guided)
        scaler.update()
        scheduler.step()
        seen.append(state_of(model))
        rates.append(guided.param_groups[0]["lr"])
    events = [(e.iteration, str(e.reason), e.restored, e.skipped, e.scale_factor) for e in guided.guard_events]
    return {"seen": seen, "events": events, "iteration": guided.iteration, "rates": rates}


MISHAPS = ("nothing", "one batch", "scaler", "two batches", "four batches", "explosion")


def bare_without(rank, size, left_out):
    """The bare loop that leaves a batch out."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    net = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(40):
        if step != left_out:
            x, y = setups.of_rank(step, rank, size, dtype=torch.float32, total=64)
            optimizer.zero_grad()
            loss_fn(net(x), y).backward()
            optimizer.step()
    return state_of(model)


def error_of(function, *args):
    try:
        function(*args)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def drifts(rank, size):
    """One rank writes another rate."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    net = DistributedDataParallel(model)
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), net, loss_fn)
    AlphaScheduler(guided, Hold())
    for step in range(4):
        x, y = setups.of_rank(step, rank, size, dtype=torch.float32)
        guided.zero_grad()
        loss_fn(net(x), y).backward()
        if step == 2 and rank == 1:
            guided.param_groups[0]["lr"] = 0.2
        guided.step()


def edits(rank, size):
    """One rank swaps its weights for others and back, as for an evaluation, two steps before an explosion."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    net = DistributedDataParallel(model)
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), net, loss_fn)
    scheduler = AlphaScheduler(guided, Hold())
    for step in range(30):
        x, y = setups.of_rank(step, rank, size, dtype=torch.float32, total=64)
        guided.zero_grad()
        loss_fn(net(x), y).backward()
        if step == 21:
            for param in model.parameters():
                param.grad.mul_(1e6)
        guided.step()
        scheduler.step()
        if step == 20 and rank == 0:
            with torch.no_grad():
                for param in model.parameters():
                    kept = param.clone()
                    param.mul_(0.9)
                    param.copy_(kept)
    events = [(e.iteration, str(e.reason), e.restored) for e in guided.guard_events]
    return [param.detach().clone() for param in model.parameters()], guided.iteration, events


def steers_alone(rank, size):
    """A scheduler on the first rank only."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    net = DistributedDataParallel(model)
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), net, loss_fn)
    if rank == 0:
        AlphaScheduler(guided, Hold())
    x, y = setups.of_rank(0, rank, size, dtype=torch.float32)
    loss_fn(net(x), y).backward()
    guided.step()


def resumes_from_the_first_rank(rank, size, folder):
    """Rank 0 writes a plain checkpoint for all, in the middle of a refresh of variances."""

    def build():
        model = setups.mlp()
        net = DistributedDataParallel(model)
        guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-3), net, nn.CrossEntropyLoss())
        return model, net, guided, AlphaScheduler(guided)

    found = []
    for saved in range(2, 7):
        model, net, guided, scheduler = build()
        for step in range(saved + 12):
            if step == saved:
                path = pathlib.Path(folder, f"{saved}.pt")
                if rank == 0:
                    torch.save([model.state_dict(), guided.state_dict(), scheduler.state_dict()], path)
                torch.distributed.barrier()
                states = torch.load(path, weights_only=True)
                model, net, guided, scheduler = build()
                for part, state in zip((model, guided, scheduler), states, strict=True):
                    part.load_state_dict(state)
            x, y = setups.of_rank(step, rank, size, total=64)
            guided.zero_grad()
            guided._session.plan.loss_fn(net(x), y).backward()
            guided.step()
            scheduler.step()
        found.append((guided.param_groups[0]["lr"], len(guided.alpha_history), list(guided.alpha_history.alphas[-3:])))
    return found


def trains_another_model(rank, size, steered, seeds_differ=True):
    """Every process trains a model of its own."""
    torch.manual_seed(rank if seeds_differ else 0)
    model, loss_fn = nn.Linear(5, 3), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_fn)
    if steered:
        AlphaScheduler(guided, Hold())
    for step in range(5):
        x, y = setups.of_rank(step, rank, size, dtype=torch.float32)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    return guided.alpha_history.alphas.tolist()


def leaves_early(rank, size, given):
    """`model.join()`: the first rank has fewer batches."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    net = DistributedDataParallel(model)
    there = {"outer": (net, loss_fn), "inner": (model, loss_fn), "nothing": ()}[given]
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), *there)
    scheduler = AlphaScheduler(guided, total_steps=100)  # whose search has begun far below the rate given
    with net.join():
        for step in range(5 + 3 * rank):
            x, y = setups.of_rank(step, rank, size, dtype=torch.float32)
            guided.zero_grad()
            loss_fn(net(x), y).backward()
            guided.step()
            scheduler.step()
    for step in range(5):
        x, y = setups.of_rank(step, rank, size, dtype=torch.float32)
        guided.zero_grad()
        loss_fn(net(x), y).backward()
        guided.step()
        scheduler.step()
    return state_of(model), len(guided.alpha_history), guided.param_groups[0]["lr"]


def range_test(rank, size):
    """The loss of one rank rises earlier than that of the other."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    net = DistributedDataParallel(model)
    before = state_of(model)
    loader = [setups.of_rank(step, rank, size, dtype=torch.float32, total=64) for step in range(20)]
    loader = [(x * (1.0 + 3.0 * rank), y) for x, y in loader]
    finding = find_lr(net, torch.optim.AdamW(model.parameters(), lr=1e-3), loader, loss_fn)
    return finding.lr, len(finding.history), equal(before, state_of(model))


def samples_of_sync_batch_norm(rank, size):
    model = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4))
    backend = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.1), model).backend
    return backend, error_of(lambda: AlphaGuided(torch.optim.SGD(model.parameters()), model, backend="layerwise"))


def on_ranks(rank, size, folder):
    found = {"search": {}}
    found["sync"] = samples_of_sync_batch_norm(rank, size)
    for name in SEARCHES if size == 2 else ("from far below",):
        kwargs = {"every": None} if name == "policy asked" else {}
        found["search"][name] = search(rank, size, *SEARCHES[name], **kwargs)
    found["mishap"] = {name: setups.said(mishap, rank, size, name) for name in MISHAPS}
    found["bare"] = {left_out: bare_without(rank, size, left_out) for left_out in (None, 20)}
    found["drifts"] = error_of(drifts, rank, size)
    found["another model"] = error_of(trains_another_model, rank, size, True)
    found["watched apart"] = setups.said(trains_another_model, rank, size, False)
    found["watched apart, alike"] = setups.said(trains_another_model, rank, size, False, False)
    found["leaves early"] = [setups.said(leaves_early, rank, size, given) for given in ("outer", "inner", "nothing")]
    found["edits"] = edits(rank, size)
    found["range test"] = range_test(rank, size)
    if size == 2:
        found["resumed"] = resumes_from_the_first_rank(rank, size, folder)
        found["steers alone"] = error_of(steers_alone, rank, size)  # the others find nobody there afterwards
    return found


def equal(first, second):
    return all(map(torch.equal, first, second)) and len(first) == len(second)


@pytest.mark.compatibility("Process", "AlphaScheduler on several ranks: the same rates on all, bit for bit")
@pytest.mark.parametrize("name", SEARCHES)
def test_all_ranks_find_the_same_rate(two, name):
    first, second = (rank["search"][name] for rank in two)
    assert first["rates"] == second["rates"]
    assert equal(first["params"], second["params"])
    assert repr(first["events"]) == repr(second["events"])
    assert len(set(first["rates"])) > 5
    assert first["loss"] < (0.3 if name != "optimizer alone" else 0.9)


def test_four_ranks_find_the_same_rate(four):
    found = [rank["search"]["from far below"] for rank in four]
    assert all(rank["rates"] == found[0]["rates"] and equal(rank["params"], found[0]["params"]) for rank in found)
    assert found[0]["loss"] < 0.3


def test_nothing_is_changed_where_nothing_happens(two):
    for rank in two:
        found, said = rank["mishap"]["nothing"]
        assert not said
        assert equal(found["seen"][-1], rank["bare"][None])


@pytest.mark.compatibility("Process", "guard on several ranks: a batch that is not finite on one is skipped on all")
@pytest.mark.parametrize("name", ["one batch", "scaler"])
def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_on_all(two, name):
    for rank in two:
        found, _ = rank["mishap"][name]
        assert found["iteration"] == 39
        assert equal(found["seen"][-1][:2], rank["bare"][20][:2])
        assert [event[1] for event in found["events"]] == ["loss_not_finite"]


@pytest.mark.parametrize("name", ["two batches", "four batches", "explosion"])
def test_a_step_is_taken_back_on_all_ranks(two, four, name):
    for ranks in (two, four):
        found = [rank["mishap"][name][0] for rank in ranks]
        assert any(event[2] for event in found[0]["events"])
        for other in found[1:]:
            assert repr(other["events"]) == repr(found[0]["events"])
            assert other["rates"] == found[0]["rates"]
            # Buffers of BatchNorm are those of the rank's own batches.
            params = [[t for t in state if t.dim() == 2] for state in (found[0]["seen"][-1], other["seen"][-1])]
            assert equal(*params)
        place = 30 if name == "explosion" else 20
        assert found[0]["events"][0][0] in (place, place + 1)
        assert len(found[0]["events"]) <= 5


def test_other_rates_on_one_rank_are_an_error_on_all(two, four):
    for ranks in (two, four):
        for rank in ranks:
            assert rank["drifts"].startswith("RuntimeError: ranks have different learning rates")
            assert "rank " in rank["drifts"]
            assert "[0.2]" in rank["drifts"]
            assert len(rank["drifts"]) < 500


def test_models_of_their_own_are_refused_by_a_scheduler(two):
    assert all(rank["another model"].startswith("ValueError: rank ") for rank in two)
    assert all("hold different parameters" in rank["another model"] for rank in two)


def test_models_of_their_own_are_watched_one_by_one(two):
    histories = [rank["watched apart"][0] for rank in two]
    assert all(len(history) == 4 for history in histories)
    assert histories[0] != histories[1]
    assert all(len(rank["watched apart"][1]) == 1 for rank in two)


@pytest.mark.compatibility("Process", "DDP's join() with uneven inputs: neither measured nor judged inside")
def test_ranks_that_leave_early_hang_nobody(two):
    for given in range(3):
        states = [rank["leaves early"][given][0][0] for rank in two]
        assert equal([t for t in states[0] if t.dim() == 2], [t for t in states[1] if t.dim() == 2])
        for rank in two:
            (_, measured, lr), said = rank["leaves early"][given]
            assert measured == 0
            assert lr > 0.05
            joined = [text for text in said if "model.join()" in text]
            assert len(joined) == 1
            assert len(joined[0]) < 500


def test_models_that_begin_alike_are_told_apart_after_a_step(two):
    histories = [rank["watched apart, alike"][0] for rank in two]
    assert all(len(history) == 3 for history in histories)  # the first step was made together
    assert histories[0] != histories[1]


def test_an_edit_on_one_rank_is_forgotten_on_all(two, four):
    for ranks in (two, four):
        params, iteration, events = ranks[0]["edits"]
        assert events
        for rank in ranks[1:]:
            assert rank["edits"][1:] == (iteration, events)
            assert equal(rank["edits"][0], params)


def test_a_scheduler_on_one_rank_only_is_an_error(two):
    assert two[0]["steers alone"].startswith("RuntimeError: 1 of 2 ranks have an AlphaScheduler, rank 0 has one")


def test_a_checkpoint_of_the_first_rank_serves_all(two):
    assert two[0]["resumed"] == two[1]["resumed"]
    for saved, (_, measured, _) in zip(range(2, 7), two[0]["resumed"], strict=True):
        assert measured == saved + 12 - 2  # the pair that was on its way is lost


def test_a_model_that_talks_in_its_forward_pass_is_not_repeated(two):
    for rank in two:
        backend, error = rank["sync"]
        assert backend == "gradients"
        assert "SyncBatchNorm talks to other processes" in error


def test_a_range_test_stops_on_all_ranks_at_the_same_step(two, four):
    for ranks in (two, four):
        lr, steps, restored = ranks[0]["range test"]
        assert 1e-4 < lr < 1.0
        assert all(rank["range test"] == (lr, steps, restored) for rank in ranks)
        assert restored
