"""A loss that rose beyond its noise: was the batch hard, the step bad, or has the task changed?

One batch alone does not tell. A second one at the same point says whether the first was hard; if it was not, the step
is taken back, and a third one, at the point before, says whether that helped.
"""

from __future__ import annotations

import math

from alpha_optim.alpha.loss_level import LossScatter
from alpha_optim.alpha.records import Code
from alpha_optim.alpha.states import Remembers
from alpha_optim.steer.readings import Reading

PATIENCE = 3
"""What was done so many times in a row without effect is not done any more."""


class _Stage(Code):
    """Where the question stands."""

    CALM = "calm"
    DOUBTED = "doubted"  # one batch at this point looked like an explosion
    TAKEN_BACK = "taken_back"  # the next batch tells whether that helped


class RisenLoss(Remembers):
    """What consecutive losses usually differ by, and where the question stands whether a step was an explosion."""

    _scatter: LossScatter
    _stage: _Stage
    _doubted_rise: float  # that of the batch that raised the question
    _helpless: int  # returns in a row that did not help

    def __init__(self) -> None:
        """Nothing is in doubt."""
        self._scatter, self._stage = LossScatter(), _Stage.CALM
        self._doubted_rise, self._helpless = 0.0, 0

    @property
    def gave_up(self) -> bool:
        """Whether rises are no longer judged, since going back did not help so often."""
        return self._helpless >= PATIENCE

    def seen(self, now: Reading, before: Reading, stepped: bool) -> bool:
        """Whether the loss rose beyond its noise.

        Args:
            now: What was read of this batch.
            before: What was read of the batch before.
            stepped: Whether a step was made between the two.
        """
        judged = stepped or self._stage is not _Stage.CALM
        if now.loss is None or before.loss is None or not judged or self.gave_up:
            return False
        # The scatter over samples at the point before: at one that exploded it is as large as the loss.
        scatter = now.variance if before.variance is None else before.variance
        samples = (before.samples, now.samples)
        known = scatter is not None and min(samples) > 0
        noise = math.sqrt(scatter / samples[0] + scatter / samples[1]) if known and scatter is not None else math.nan
        freedom = samples[0] + samples[1] - 2
        return now.loss - before.loss > self._scatter.limit(before.loss, noise, freedom)

    def first_seen(self, rise: float) -> bool:
        """Take note of a rise; whether it is the first one, so that another batch has to be looked at."""
        if self._stage is not _Stage.CALM:
            return False
        self._stage, self._doubted_rise = _Stage.DOUBTED, rise
        return True

    @property
    def confirmed(self) -> bool:
        """Whether a rise that is seen now is the second one at this point: the step is to be taken back."""
        return self._stage is _Stage.DOUBTED

    def step_taken_back(self, restored: bool) -> None:
        """The step was taken back for it, if it could be."""
        self._stage = _Stage.TAKEN_BACK if restored else _Stage.CALM

    def settled(self, rose: bool) -> bool:
        """A batch is used, which answers the question; whether the answer is that taking a step back did not help.

        Args:
            rose: Whether its loss lies as high as the one in doubt.
        """
        stage, self._stage = self._stage, _Stage.CALM
        if stage is _Stage.DOUBTED:
            self._scatter.note_harmless(self._doubted_rise)
        if stage is not _Stage.TAKEN_BACK:
            return False
        self._helpless = self._helpless + 1 if rose else 0
        return rose

    def used(self, loss: float) -> None:
        """Take note of the loss of a batch that is used."""
        self._scatter.note(loss)

    def forget(self) -> None:
        """The points are gone: nothing is in doubt any more."""
        self._stage = _Stage.CALM

    def moved(self) -> None:
        """The next loss is one of another point, on purpose."""
        self.forget()
        self._scatter.moved()

    def level_unknown(self) -> None:
        """The parameters are others than the last step left."""
        self._scatter.level_unknown()

    def came_from_data(self, rise: float) -> None:
        """A rise that was confirmed turned out to be the data's: do not look at the next such."""
        self._scatter.note_harmless(rise)
