"""Runs situations with and without steering, and says which runs steering has made worse.

python -m tests.harm                    # every situation, three seeds: the table of docs/reliability.md
python -m tests.harm --only Permuted    # some of them
"""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alpha_optim import AlphaGuided, AlphaScheduler, Hold
from tests.harm import setups

STEPS, SEEDS = 400, 3
WORSE = 0.05
"""Harmed is a run that lost so much of the progress of the bare one, beyond what the bare ones differ by."""


class Situation(NamedTuple):
    """One row of the table.

    Attributes:
        setup: A class of `setups`.
        kind: Optimizer, by name of `setups.RATES`.
        cases: What it is about.
        total: Whether a search makes sense (not where the loop owns the rate, say).
    """

    setup: type[setups.Setup]
    kind: str = "adam"
    total: bool = True

    @property
    def name(self) -> str:
        return f"{self.setup.__name__}, {self.kind}"

    @property
    def about(self) -> str:
        return (self.setup.__doc__ or self.setup.__name__).split("\n")[0]


_BOTH = ("adam", "momentum")
SITUATIONS = [
    *(Situation(setups.Setup, kind) for kind in ("adam", "momentum", "sgd")),
    *(Situation(setup, kind) for setup in (setups.BatchNormed, setups.Normalised) for kind in _BOTH),
    *(Situation(mask) for mask in (setups.Mask, setups.MaskLowest, setups.MaskLarge, setups.MaskHalf)),
    *(
        Situation(setup, kind)
        for setup in (
            setups.NanLoss, setups.NanOften, setups.NanAtBorders, setups.NanRandom, setups.NanRandomly, setups.NanInput,
            setups.EmptyBatch, setups.InfGradient,
        )
        for kind in _BOTH
    ),
    *(
        Situation(setup, kind)
        for setup in (setups.KlWeight, setups.KlJump, setups.Permuted, setups.PermutedOften)
        for kind in _BOTH
    ),
    *(
        Situation(setup, kind)
        for setup in (
            setups.SmallerBatches, setups.MixedBatches, setups.GrowingBatches, setups.EasyAndHard, setups.RareHard,
            setups.HardPairs, setups.HardTriples,
            setups.Curriculum, setups.LabelNoise, setups.TinyBatches,
        )
        for kind in _BOTH
    ),
    *(
        Situation(setup, "adam")
        for setup in (
            setups.Regression, setups.TinyLoss, setups.HugeLoss, setups.NegativeLoss, setups.HeavyTails,
            setups.Hinge,
        )
    ),
    *(
        Situation(setup, kind)
        for setup in (setups.Returns, setups.ReturnsSlow, setups.Shifting, setups.NoisyTargets)
        for kind in _BOTH
    ),
    *(Situation(setups.WritesRate, kind, total=False) for kind in _BOTH),
    *(Situation(setup, kind) for setup in (setups.PerEpoch, setups.NeverAgain) for kind in _BOTH),
    *(Situation(setup, kind) for setup in (setups.Grows, setups.Replaced, setups.Frozen) for kind in _BOTH),
    *(Situation(setup) for setup in (setups.GrowingCache, setups.GrowingCacheOwn, setups.Sparse)),
    *(
        Situation(setup, kind, total=False)
        for setup in (
            setups.Spike, setups.SpikeAveraged, setups.GrowsAndSpike, setups.ReplacedAndSpike,
            setups.CacheAndSpike, setups.MaskAndSpike,
        )
        for kind in _BOTH
    ),
    *(
        Situation(setup, "adam", total=False)
        for setup in (
            setups.WithOwnWeights, setups.LookaheadSpike, setups.ProdigySpike, setups.DAdaptSpike,
            setups.TwoOptimizersSpike, setups.ProdigyNan,
        )
    ),
    Situation(setups.OwnWeightsCalm),
    Situation(setups.TwoOptimizers),
    Situation(setups.VirtualSteps, "sgd"),
    Situation(setups.TokensThatCount),
    Situation(setups.SeenInPart),
    Situation(setups.NothingSeen),
    Situation(setups.Scaled),
    Situation(setups.Sharpness, "momentum"),
    Situation(setups.Attention),
    Situation(setups.AttentionScheduled),
    *(Situation(setups.Scheduled, kind) for kind in _BOTH),
    Situation(setups.Adversarial, total=False),
]  # fmt: skip


class Run:
    """One run of a situation: bare, bare with the rate annealed, with `Hold`, or with ``total_steps``."""

    def __init__(self, setup: setups.Setup, mode: str) -> None:
        self.setup, self.mode, self.base = setup, mode, setup.base
        self.guided: AlphaGuided | None = None
        self.scheduler: AlphaScheduler | None = None
        self.calls = 0
        self.stops_scheduler = False
        self.bare = setup.base if isinstance(setup.base, list) else [setup.base]
        self.rates = [[float(group["lr"]) for group in base.param_groups] for base in self.bare]
        if mode in ("hold", "total"):
            loss_fn = setup.loss_fn if setup.wrap_loss else None
            self.guided = AlphaGuided(setup.base, setup.model, loss_fn)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.guided, setup.steps) if setup.cosine else None
            self.scheduler = (
                AlphaScheduler(self.guided, Hold(), schedule=schedule)
                if mode == "hold"
                else AlphaScheduler(self.guided, total_steps=setup.steps, schedule=schedule)
            )
        if isinstance(setup.base, list):
            self.base = self.guided if self.guided is not None else _All(self.bare)
        self.optimizer: Any = self.base if self.guided is None else self.guided
        self.per_epoch = isinstance(setup, setups.PerEpoch)

    def step(self, loss: Tensor) -> None:
        self.step_with(loss, None)

    def step_with(self, loss: Tensor, closure: Any) -> None:
        arguments = () if closure is None else (closure,)
        if self.guided is not None or self._finite(loss):
            self.optimizer.step(*arguments)
        else:
            self._put_back_statistics()
        self.scheduler_step()

    def scheduler_step(self) -> None:
        """What the loop does at the end of a call: the scheduler's step, or the bare loop's annealing."""
        self.calls += 1
        self._statistics = self._running()
        if self.scheduler is not None and not self.per_epoch and not self.stops_scheduler:
            self.scheduler.step()
        if self.mode == "annealed" or (self.mode == "bare" and self.setup.cosine):
            self._anneal()

    def end_epoch(self) -> None:
        if self.scheduler is not None:
            self.scheduler.step()

    def _anneal(self) -> None:
        share = self.calls / self.setup.steps
        left = 0.5 * (1 + math.cos(math.pi * share)) if self.setup.cosine else min(1.0, 2.0 * (1.0 - share))
        for base, rates in zip(self.bare, self.rates, strict=True):
            for group, rate in zip(base.param_groups, rates, strict=False):
                group["lr"] = rate * max(left, 0.0)

    def _finite(self, loss: Tensor) -> bool:
        gradients = [p.grad for base in self.bare for g in base.param_groups for p in g["params"] if p.grad is not None]
        both = [loss, *(g.coalesce().values() if g.is_sparse else g for g in gradients)]
        return all(bool(torch.isfinite(value).all()) for value in both)

    def _running(self) -> list[tuple[Tensor, Tensor]]:
        modules = [m for m in self.setup.model.modules() if isinstance(m, nn.BatchNorm1d)]
        return [(b, b.clone()) for m in modules for b in m.buffers()]

    def _put_back_statistics(self) -> None:
        """The most careful bare loop: a batch that is not used leaves no trace in the statistics either."""
        for buffer, kept in getattr(self, "_statistics", []):
            buffer.copy_(kept)


class _All:
    """Several bare optimizers, stepped one after the other."""

    def __init__(self, optimizers: list[Any]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[Any]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class Outcome(NamedTuple):
    """What came out of a run: the final loss (inf: crashed or not finite), events, messages."""

    loss: float
    events: int
    messages: tuple[str, ...]
    error: str = ""


def run(situation: Situation, mode: str, seed: int, steps: int) -> Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        setup = situation.setup(seed, steps, situation.kind)
        steered = None
        try:
            steered = Run(setup, mode)
            for n in range(steps):
                setup.before(n, steered)
                setup.step(n, steered)
                setup.after(n, steered)
            if steered.scheduler is not None and hasattr(steered.scheduler, "finish"):
                steered.scheduler.finish()
            loss, error = setup.evaluate(), ""
        except Exception as raised:  # a crash is what the table is for
            loss, error = math.inf, f"{type(raised).__name__}: {raised}"[:120]
    guided = None if steered is None else steered.guided
    events = 0 if guided is None else len(guided.guard_events)
    said = tuple(str(warning.message) for warning in caught if "alpha_optim" in str(warning.message) or guided)
    return Outcome(loss if math.isfinite(loss) else math.inf, events, said, error)


class Row(NamedTuple):
    """A situation: median final losses, and whether steering made it worse."""

    situation: Situation
    start: float
    losses: dict[str, float]
    spread: dict[str, float]
    events: dict[str, int]
    errors: dict[str, str]

    def lost(self, mode: str) -> float:
        """Share of the bare run's progress that is lost, beyond what bare runs differ by; below 0: gained."""
        reference = "bare" if mode == "hold" else "annealed"
        ours, bare = self.losses[mode], self.losses[reference]
        if not math.isfinite(ours):
            return 0.0 if not math.isfinite(bare) else math.inf
        if not math.isfinite(bare):
            return -math.inf
        progress = max(self.start - bare, self.spread[reference], 1e-3 * abs(bare), 1e-300)
        return (ours - bare - self.spread[reference]) / progress

    def harmed(self, mode: str) -> bool:
        return self.lost(mode) > WORSE


def judge(situation: Situation, seeds: int = SEEDS, steps: int = STEPS, total: bool = True) -> Row:
    modes = ["bare", "hold", *(["annealed", "total"] if total and situation.total else [])]
    outcomes = {mode: [run(situation, mode, seed, steps) for seed in range(seeds)] for mode in modes}
    starts = [situation.setup(seed, steps, situation.kind).evaluate() for seed in range(seeds)]
    losses = {mode: [outcome.loss for outcome in found] for mode, found in outcomes.items()}
    return Row(
        situation,
        statistics.median(starts),
        {mode: statistics.median(found) for mode, found in losses.items()},
        {mode: _spread(found) for mode, found in losses.items()},
        {mode: max(outcome.events for outcome in found) for mode, found in outcomes.items()},
        {mode: next((o.error for o in found if o.error), "") for mode, found in outcomes.items()},
    )


def _spread(losses: list[float]) -> float:
    """How far bare runs lie apart."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return max(finite) - min(finite) if len(finite) > 1 else 0.0


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown, and how many were harmed."""
    head = (
        "| situation | optimizer | bare | `Hold()` | events | annealed | `total_steps` | harmed |\n"
        + "| --- " * 8
        + "|\n"
    )
    lines = []
    for row in rows:
        harmed = [mode for mode in ("hold", "total") if mode in row.losses and row.harmed(mode)]
        said = ", ".join(f"{mode}: {row.lost(mode):.0%} {row.errors[mode]}".strip() for mode in harmed)
        losses = [
            f"{row.losses[mode]:.3g}" if mode in row.losses else "" for mode in ("bare", "hold", "annealed", "total")
        ]
        cells = [
            row.situation.about.rstrip("."),
            row.situation.kind,
            *losses[:2],
            row.events["hold"],
            *losses[2:],
            said,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    count = sum(any(row.harmed(m) for m in ("hold", "total") if m in row.losses) for row in rows)
    return head + "\n".join(lines) + f"\n\nsituations: {len(rows)}, harmed: {count}\n"
