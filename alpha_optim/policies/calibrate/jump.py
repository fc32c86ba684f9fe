"""First phase: from a tiny rate to one at which a step promises a small decrease of the loss.

A few steps at a rate far too high damage a network for good, so the first step is made at `START` times the rate given.
Start slope times step length is the decrease that a step promises, and proportional to the rate: that says where to go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from alpha_optim.alpha.loss_level import level_of
from alpha_optim.alpha.measurement import AlphaMeasurement
from alpha_optim.alpha.window import rises_of
from alpha_optim.policies.calibrate.climb import Climb
from alpha_optim.policies.calibrate.phase import After
from alpha_optim.policies.calibrate.settings import Settings

START = math.log(1e-8)
"""Log of the fraction of the given rate at which the first steps are made."""
PROMISE = 1e-3
"""The climb begins where a step promises this decrease, relative to the loss: far below any rate worth having."""
LONGEST_JUMP = math.log(1e3)
"""Largest jump; the slope is measured again before the next."""
BLIND_JUMP = math.log(30.0)
"""Jump where a step was too short to move the parameters."""
BLIND = 3
"""After so many measurements without a loss none is waited for."""
NEAR = 1.0
"""The jump has arrived when the next one would be shorter than this."""


NO_LOSSES = (
    "no losses were seen that can be used (a warning says why, if there was one; else give AlphaGuided the loss_fn, or "
    "optimizer.backward the losses of the samples, [N], or optimizer.record_losses the loss)"
)


@dataclass(frozen=True)
class Jump:
    """Jumps until a step promises a small decrease.

    Attributes:
        settings: Of the search.
        position: Log rate of the coming step.
        steps: Steps made.
        losses: Losses so far.
        blind: Measurements without a loss, before there was any.
    """

    settings: Settings
    position: float = START
    steps: int = 0
    losses: tuple[float, ...] = ()
    blind: int = 0
    factor = 1.0

    def measured(self, measurement: AlphaMeasurement, here: float) -> After:
        """Jump by what the start slope promises."""
        losses = self.losses
        loss = measurement.loss_start
        if not self.settings.by_steps and math.isfinite(loss):
            losses = (*losses, loss)
        if not losses:
            if self.blind >= BLIND:
                return self._given_kept(NO_LOSSES)
            return After(replace(self, blind=self.blind + 1))
        rises = rises_of(measurement)
        if rises is None or rises[0] == 0.0:
            return After(replace(self, losses=losses, position=max(self.position, here + BLIND_JUMP)))
        level = level_of(losses)
        noise = level.deviation if level.count > 1 else 0.0
        size = max(abs(level.mean), noise)
        change = min(LONGEST_JUMP, math.log(PROMISE * size / abs(rises[0]))) if size > 0.0 else 0.0
        position = max(self.position, here + change) if change > 0.0 else here + change
        if change < NEAR or position >= self.settings.highest:
            return After(Climb(self.settings, min(position, self.settings.highest), self.steps, losses))
        return After(replace(self, losses=losses, position=position))

    def stepped(self, loss: float) -> After:
        """Take note of a loss; do not wait for measurements for ever."""
        losses = (*self.losses, loss) if math.isfinite(loss) else self.losses
        settings = self.settings if not math.isfinite(loss) else replace(self.settings, by_steps=True)
        if self.steps >= settings.longest_climb:
            return self._given_kept("too few steps were measured" if losses else NO_LOSSES)
        return After(replace(self, settings=settings, losses=losses, steps=self.steps + 1))

    def _given_kept(self, why: str) -> After:
        return After(None, restore="start", corrected=False, text=why)

    def exploded(self) -> After:
        """Try again from below: the last jump went too far, or two batches were bad, whatever the rate."""
        return After(replace(self, position=max(START, self.position - LONGEST_JUMP)), restore="start")
