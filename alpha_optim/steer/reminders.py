"""What is easily forgotten, said once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from alpha_optim.user_warning import Once

UNSCHEDULED = 10
"""After so many steps without the scheduler's the user is reminded."""
IDLE = 50
"""And after so many of the scheduler's without the optimizer's; a gradient scaler skips some, too."""


def text_of_two_schedulers(names: Sequence[str]) -> str:
    """What is wrong with schedulers of two optimizers of one model, whose types have these names."""
    return (
        f"another optimizer of this model ({names[0]}) already has an AlphaScheduler, and two of them would "
        f"take back different steps; wrap both as one: AlphaGuided([{names[0].lower()}, {names[1].lower()}], "
        "model, loss_fn), or detach() the other one if it is done"
    )


class Reminders:
    """Watches for a scheduler that is not stepped and a loss function that is not called."""

    def __init__(self, loss_fn: nn.Module | None) -> None:
        """Start with nothing said.

        Args:
            loss_fn: The loss function that was given, if any.
        """
        self._loss_fn = loss_fn
        self._idle = 0  # scheduler steps since the optimizer's last
        self._once = Once()

    def scheduler_stepped(self) -> None:
        """The scheduler was built or stepped."""
        self._idle += 1
        if self._idle > IDLE:
            self._once.say(
                f"{IDLE} scheduler steps in which the optimizer made none: call step() of AlphaGuided, not "
                "of the optimizer it wraps; if you do, every step is skipped (optimizer.guard_events says why)"
            )

    def resumed(self) -> None:
        """The run goes on at another iteration."""
        self._idle = 0

    def after_step(self, alone: int, measured: bool, saw_loss: bool) -> None:
        """Look at a step that was made.

        Args:
            alone: How many were made since the scheduler's last.
            measured: Whether the step starts a pair.
            saw_loss: Whether its loss was seen.
        """
        self._idle = 0
        if alone > UNSCHEDULED:
            self._once.say(
                f"{UNSCHEDULED} optimizer steps without scheduler.step(): AlphaScheduler is stepped once per "
                "optimizer step, not once per epoch; until then it changes no rate, and its guard rests"
            )
        if self._loss_fn is not None and measured and not saw_loss:
            self._once.say(
                f"loss_fn ({type(self._loss_fn).__name__}) was given, but none of its calls was seen in the "
                "backward pass, so losses are not used; call this very instance, or hand the losses over with "
                "optimizer.backward(losses)"
            )

    def not_cleared(self) -> None:
        """Gradients were added to those of the step before."""
        self._once.say(
            "gradients were added to those that the step before has used already: optimizer.zero_grad() was not called "
            "between the two. Such steps are made and not measured."
        )

    def captured(self) -> None:
        """A step is recorded into a CUDA graph."""
        self._once.say(
            "this step is recorded into a CUDA graph, whose replays run no Python: their steps are neither measured "
            "nor judged, and no rate is searched. Capture the model alone (torch.cuda.make_graphed_callables), or let "
            "torch.compile(mode='reduce-overhead') make the graphs."
        )

    def two_schedulers(self, names: Sequence[str]) -> None:
        """Two optimizers of one model are steered, and both make steps."""
        self._once.say(text_of_two_schedulers(names))

    def ranks_leave(self) -> None:
        """Processes may leave the loop one after the other."""
        self._once.say(
            "with model.join() processes may leave the training loop one after the other, so they cannot be asked what "
            "they see: from here on steps are neither measured nor judged, and no rate is searched. As many batches on "
            "every rank (DistributedSampler with drop_last=True) need no join()."
        )
