"""What ranks add up, against numpy on the samples of all of them together; no process is started."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alpha_optim.distributed import Sum
from alpha_optim.measure.across_ranks import RANKS, SAMPLES, Centres, Report, Scatter, Together

CPU = torch.device("cpu")
CENTRES = Centres(0.04, -0.02, 0.05)
COUNTS = {"one rank": (5,), "equal": (4, 4), "unequal": (3, 8, 1), "one without data": (6, 0, 5)}


class World:
    """Losses, slopes and factors of a few ranks, and what they report."""

    def __init__(self, counts, seed=0, offset=0.0):
        noise = np.random.default_rng(seed)
        self.counts = counts
        self.gammas = [float(noise.uniform(0.5, 2.0)) if n else 0.0 for n in counts]
        self.losses, self.ends, self.starts = ([offset + noise.normal(0.4, 0.3, n) for n in counts] for _ in range(3))

    def reports(self, seen=None, **more):
        """One report each; of slopes and losses only the first ``seen`` samples are looked at."""
        for n, gamma, losses, ends, starts in zip(
            self.counts, self.gammas, self.losses, self.ends, self.starts, strict=True
        ):
            share = gamma / max(1, n)
            scatters = [
                Scatter.of(torch.tensor(values[:seen]), share, centre, n)
                for values, centre in zip((losses, ends, starts), CENTRES, strict=True)
            ]
            yield Report(
                samples=float(n),
                gamma=gamma,
                loss=gamma * float(losses.mean()) if n else 0.0,
                losses=scatters[0],
                end=scatters[1],
                start=scatters[2],
                **more,
            )

    def together(self, batches=1, **options):
        return added_up(list(self.reports(**options)), batches)

    def weighted(self, values):
        """Values of all samples, each times what it weighs in the mean that is trained on."""
        total, n = sum(self.gammas), sum(self.counts)
        return np.concatenate(
            [v * gamma * n / (max(1, len(v)) * total) for v, gamma in zip(values, self.gammas, strict=True)]
        )


def added_up(reports, batches=1):
    ranks = SimpleNamespace(size=len(reports), batches=batches)
    return Together(Sum(torch.stack([report.packed(CPU) for report in reports]).sum(0), None, ranks), ranks, CENTRES)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_loss_and_variances_are_those_of_all_samples_together(counts, offset):
    world = World(counts, offset=offset)
    together = world.together()
    assert together.samples == sum(counts)
    assert together.gamma == pytest.approx(sum(world.gammas) / len(counts))
    losses = world.weighted(world.losses)
    assert together.loss == pytest.approx(losses.mean(), rel=1e-12)
    tolerance = 1e-9 if offset == 0.0 else 1e-6  # the centre is that of the last step, a thousand away
    assert together.loss_variance(None) == pytest.approx(losses.var(ddof=1), rel=tolerance)
    for role, values in (("end", world.ends), ("start", world.starts)):
        expected = world.weighted(values).var(ddof=1)
        assert together.slope_variance(role, together, None) == pytest.approx(expected, rel=tolerance)


def test_variances_of_some_samples_are_those_of_all_but_for_chance():
    """Whichever four of each rank's are looked at, in the mean; of losses the mean of all samples is known."""
    world, noise = World((8, 24)), np.random.default_rng(1)
    world.gammas = [1.0, 1.0]  # so that a sample of the first weighs three times as much
    losses, slopes = world.weighted(world.losses).var(), world.weighted(world.ends).var(ddof=1)
    found = []
    for _ in range(600):
        for values in (*world.losses, *world.ends):
            noise.shuffle(values)
        together = world.together(seen=4)
        found.append((together.loss_variance(None), together.slope_variance("end", together, None)))
    errors = np.std(found, axis=0) / 600**0.5
    # Four of eight and four of twenty-four, each of which stands for two or six; the 8 / 7 for the mean of eight is
    # that of eight that weigh the same.
    assert np.mean(found, axis=0) == pytest.approx([losses, slopes], abs=float(4 * errors.max()) + 0.1 * slopes)
    assert min(found)[0] >= 0.0


def test_a_batch_that_two_ranks_are_fed_counts_once():
    world = World((6,))
    twice = added_up([report for report in world.reports() for _ in range(2)], batches=2)
    once = world.together()
    assert twice.samples == once.samples == 6
    assert twice.loss == pytest.approx(once.loss)
    # The unit of a sample is that of both together, half as large each.
    assert twice.slope_variance("end", twice, None) == pytest.approx(once.slope_variance("end", once, None))


@pytest.mark.parametrize("role", ["end", "start"])
def test_slopes_of_samples_have_to_give_the_slope_of_the_gradients(role):
    world, length = World((5, 7)), 0.5
    values = world.ends if role == "end" else world.starts
    # Along d / |d|: the mean over ranks of what each sends backward.
    slope = sum(gamma * v.mean() for gamma, v in zip(world.gammas, values, strict=True)) / 2
    for factor, fits in ((1.0, True), (1.0 + 1e-6, True), (1.02, False), (-1.0, False), (math.nan, True)):
        reports = list(world.reports(**{f"{role}_product": factor * slope * length / 2}))
        together = added_up(reports)
        assert together.adds_up(role, together, length, 1e-4) == fits, factor
    together = world.together(seen=3, **{f"{role}_product": 9.0})
    assert together.adds_up(role, together, length, 1e-4) is None  # of some samples nothing is known
    assert world.together(**{f"{role}_product": 9.0}).adds_up(role, world.together(), 0.0, 1e-4) is None


def test_samples_repeated_with_other_random_numbers_give_the_slope_but_for_chance():
    """Ranks leave one out each to say that they are such; at the start of a step they give no slope at all."""
    counts, length = (64, 32), 0.5
    weights = [1.0 / n for n in counts]

    def together(role, values, slope):
        reports = [
            Report(
                samples=float(n),
                gamma=1.0,
                **{
                    role: Scatter.of(torch.tensor(v[1:]), weight, getattr(CENTRES, role), n),
                    f"{role}_product": slope * length / 2,
                },
            )
            for n, v, weight in zip(counts, values, weights, strict=True)
        ]
        return added_up(reports)

    noise, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        of_pass, repeated = ([noise.normal(0.3, 1.0, n) for n in counts] for _ in range(2))
        slope = sum(v.mean() for v in of_pass) / 2
        found = together("end", repeated, slope)
        wrong += not found.adds_up("end", found, length, 1e-4)
        far = together("end", repeated, slope + 2.0)
        assert not far.adds_up("end", far, length, 1e-4)
        at_start = together("start", repeated, slope + 2.0)
        assert at_start.adds_up("start", at_start, length, 1e-4) is None
    assert wrong == 0


def test_what_one_rank_could_not_see_nobody_has():
    world = World((5, 7))
    for name in ("loss_unseen", "losses_unseen", "slopes_unseen"):
        first, second = world.reports()
        together = added_up([Report(**{**vars(first), name: True}), second])
        assert (together.loss is None) == (name == "loss_unseen")
        assert (together.loss_variance(3.0) is None) == (name != "slopes_unseen")
        assert (together.slope_variance("end", together, 3.0) is None) == (name == "slopes_unseen")


def test_what_was_not_measured_now_is_as_it_was_known():
    together = added_up([Report(samples=4.0, gamma=1.0, loss=0.5), Report(samples=4.0, gamma=1.0, loss=0.7)])
    assert together.loss == pytest.approx(0.6)
    assert together.loss_variance(3.0) == 3.0
    assert together.slope_variance("start", together, 2.0) == 2.0
    assert together.slope_variance("start", together, None) is None
    nothing = added_up([Report(loss_unseen=True), Report(loss_unseen=True)])
    assert (nothing.loss, nothing.gamma, nothing.samples) == (None, 1.0, 0)


def test_centres_are_the_means_of_this_step_and_stay_where_there_are_none():
    world = World((5, 7))
    before = Centres(1.0, 2.0, 3.0)
    shares = [gamma / n for gamma, n in zip(world.gammas, world.counts, strict=True)]
    found = world.together().next_centres(before)
    for centre, values in zip(found, (world.losses, world.ends, world.starts), strict=True):
        assert centre == pytest.approx(np.concatenate([v * s for v, s in zip(values, shares, strict=True)]).mean())
    assert added_up([Report(samples=3.0, loss_unseen=True)]).next_centres(before) == before
    broken = added_up([Report(samples=3.0, gamma=1.0, loss=math.nan)])
    assert broken.next_centres(before) == before


FLAGS = (
    "params_broke", "buffers_broke", "gradient_broke", "unpaired", "no_return", "pass_broke", "loss_unseen",
    "losses_unseen", "slopes_unseen",
)  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_flag_travels_by_itself_and_is_counted(flag, as_tensor):
    raised = Report(**{flag: torch.tensor(True) if as_tensor else True})
    sums = added_up([raised, Report(), raised]).sums
    assert {name: getattr(sums, name) for name in FLAGS} == {name: 2.0 if name == flag else 0.0 for name in FLAGS}


def test_every_number_of_a_report_arrives_where_it_was_sent():
    numbers = iter(range(2, 60))

    def scatter():
        return Scatter(float(next(numbers)), float(next(numbers)), float(next(numbers)))

    fields = {
        field.name: scatter() if field.name in ("losses", "end", "start") else float(next(numbers))
        for field in dataclasses.fields(Report)
    }
    sent = Report(**fields)
    arrived = Report.unpacked(sent.packed(CPU).tolist())
    assert arrived == dataclasses.replace(sent, losses=dataclasses.replace(sent.losses, total=0.0))


def test_two_samples_have_a_variance_and_one_has_not():
    two = World((1, 1)).together()
    world = World((1, 1))
    assert two.slope_variance("end", two, None) == pytest.approx(np.var(world.weighted(world.ends), ddof=1))
    one = World((1,)).together()
    assert one.slope_variance("end", one, 0.7) == 0.7


def test_counts_of_the_largest_worlds_fit():
    most, many = float(RANKS - 1), float(SAMPLES - 1)
    report = Report(
        **dict.fromkeys(FLAGS, most),
        samples=many,
        losses=Scatter(many),
        end=Scatter(many),
        start=Scatter(many),
        rates=12345.0,
    )
    found = Report.unpacked(report.packed(CPU).tolist())
    assert [getattr(found, name) for name in FLAGS] == [most] * len(FLAGS)
    assert (found.samples, found.losses.count, found.end.count, found.start.count) == (many,) * 4
    assert found.rates == 12345.0
    assert report.packed(CPU).numel() * 8 == 128


def test_scatter_is_centred_before_it_is_squared():
    values = 1e8 + np.random.default_rng(0).normal(0, 1e-3, 50)
    scatter = Scatter.of(torch.tensor(values), 1.0, 1e8, 50)
    assert scatter.variance() == pytest.approx(values.var(ddof=1), rel=1e-6)
    assert scatter.mean(1e8) == pytest.approx(values.mean(), rel=1e-15)
    assert math.isnan(Scatter.of(torch.tensor([3.0]), 1.0, 0.0, 1).variance())
    assert math.isnan(Scatter.of(None, 1.0, 0.0, 0).mean(0.0))
    assert Scatter.of(torch.tensor([2.0, 2.0]), 1.5, 0.1, 2).variance() == 0.0
    assert Scatter.of(torch.tensor([1.0, 3.0]), torch.tensor(2.0), 0.0, 2).variance() == pytest.approx(8.0)
