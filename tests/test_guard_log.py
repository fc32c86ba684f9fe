"""What a guard did is told without growing, whatever the length of the run."""

import json
import math

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler, GuardEvent, Hold
from alpha_optim.alpha import guard_log
from alpha_optim.alpha.guard_log import GuardLog
from alpha_optim.alpha.records import GuardReason
from alpha_optim.integrations import loggers


def event(n, skipped=True, restored=False):
    return GuardEvent(n, "loss_not_finite", 1.0, math.nan, restored=restored, skipped=skipped)


def test_the_newest_are_kept_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(guard_log, "KEPT", 5)
    log = GuardLog()
    for n in range(12):
        log.append(event(n, skipped=n % 2 == 0, restored=n % 3 == 0))
    assert [entry.iteration for entry in log] == [7, 8, 9, 10, 11]
    assert (log.skipped, log.restored) == (6, 4)
    again = GuardLog()
    again.append(event(99))
    again.load_state_dict(log.state_dict())
    assert repr(list(again)) == repr(list(log))
    assert (again.count, again.skipped, again.restored) == (12, 6, 4)


def test_a_list_of_an_older_run_is_taken_over():
    log, older = GuardLog(), GuardLog()
    for n in range(3):
        older.append(event(n, restored=True))
    log.load_state_dict(older.state_dict()["newest"])
    assert repr(list(log)) == repr(list(older))
    assert (log.skipped, log.restored) == (3, 3)


def test_a_run_with_more_bad_batches_than_are_kept(monkeypatch, tmp_path):
    """Every event is written to the file and counted, also where those before it are no longer kept."""
    monkeypatch.setattr(guard_log, "KEPT", 3)
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(4, 1), nn.MSELoss()
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.01), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, Hold())
    stop = loggers.record(optimizer, tmp_path / "run.jsonl", scheduler)
    bad = range(2, 40, 4)
    for n in range(40):
        optimizer.zero_grad()
        x = torch.full((8, 4), math.nan) if n in bad else torch.randn(8, 4)
        loss_fn(model(x), torch.zeros(8, 1)).backward()
        optimizer.step()
        scheduler.step()
    stop()
    assert len(optimizer.guard_events) == 3
    assert optimizer.guard_counts == {"events": len(bad), "batches_skipped": len(bad), "steps_taken_back": 0}
    assert loggers.events_of(optimizer)["batches_skipped"] == len(bad)
    rows = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert len([row for row in rows if "event" in row]) == len(bad)


@pytest.mark.parametrize(
    ("reason", "before", "after", "said"),
    [
        ("gradient_not_finite", math.nan, math.nan, "loss not known"),
        ("loss_not_finite", math.nan, math.nan, "loss nan"),
        ("loss_not_finite", 1.5, math.nan, "loss 1.5 -> nan"),
        ("loss_rose", math.nan, 9.0, "loss 9"),
        ("loss_rose", 1.5, 9.0, "loss 1.5 -> 9"),
    ],
)
def test_an_event_tells_of_losses_that_were_seen(reason, before, after, said):
    assert f", {said}, " in str(GuardEvent(3, GuardReason(reason), before, after, restored=False))


def test_an_event_tells_what_was_done():
    def told(reason, **done):
        return str(GuardEvent(3, GuardReason(reason), 1.0, 9.0, **{"restored": False, **done}))

    assert told("loss_rose", restored=True).endswith(", the step was taken back")
    assert told("loss_not_finite", restored=True).endswith(", again, so the step before was taken back")
    assert told("loss_not_finite", skipped=True).endswith(", batch skipped")
    assert told("no_effect", skipped=False).endswith(", the batch is used")
