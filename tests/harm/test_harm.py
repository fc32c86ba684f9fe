"""First, do no harm: the short form of `make harm`."""

import warnings

import pytest

from tests.harm import setups
from tests.harm.judge import SITUATIONS, Situation, judge, run

pytestmark = pytest.mark.filterwarnings("ignore")  # situations warn, and what they say is tested elsewhere
TOTAL = [
    Situation(setups.Mask),
    Situation(setups.NanOften, "adam"),
    Situation(setups.NanInput, "momentum"),
    Situation(setups.PerEpoch, "adam"),
    Situation(setups.Permuted, "adam"),
    Situation(setups.SmallerBatches, "momentum"),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_with_hold_a_run_is_never_worse(situation):
    row = judge(situation, seeds=1, steps=situation.setup.shortest, total=False)
    assert not row.harmed("hold"), row


@pytest.mark.parametrize("situation", TOTAL, ids=lambda situation: situation.name)
def test_with_a_horizon_a_run_from_a_good_rate_is_as_good_as_that_rate(situation):
    row = judge(situation)  # as in the table: with fewer seeds chance decides
    assert not row.harmed("total"), row


@pytest.mark.parametrize("kind", setups.RATES)
@pytest.mark.parametrize("setup", [setups.Setup, setups.BatchNormed, setups.LabelNoise, setups.MixedBatches])
def test_healthy_runs_are_left_alone(setup, kind):
    """Bit for bit the bare run: the guard decides by itself, and nothing made it act."""
    bare, guarded = (run(Situation(setup, kind), mode, seed=3, steps=200) for mode in ("bare", "hold"))
    if guarded.events == 0:
        assert guarded.loss == bare.loss
    assert guarded.events <= 1


def test_the_judge_sees_harm():
    """A guard that takes healthy steps back would be found out."""

    class Broken(setups.Setup):
        def step(self, n, run):
            super().step(n, run)
            if run.guided is not None and n > 20:
                run.guided.param_groups[0]["lr"] = 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert judge(Situation(Broken), seeds=1, steps=200, total=False).harmed("hold")
