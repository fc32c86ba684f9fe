"""Which iterations are measured, and by which backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from alpha_optim.alpha.states import from_plain, to_plain
from alpha_optim.observe.backward_passes import BackwardPasses
from alpha_optim.observe.checks import named_parameters
from alpha_optim.observe.step_direction import is_plain_sgd
from alpha_optim.slopes.base import SUBSET, Backend
from alpha_optim.slopes.choose import BACKENDS, Choice, choose_backend, summarised
from alpha_optim.user_warning import warn_user

Every = int | Callable[[int], bool] | None


class Plan:
    """Answers both questions anew for every iteration; remembers what it has answered."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None,
        loss_fn: nn.Module | None,
        every: Every,
        backend: str,
        variance: str,
        sample_dim: int = 0,
    ) -> None:
        """Choose a backend; arguments as in `AlphaGuided`."""
        self.optimizer, self.model, self.loss_fn = optimizer, model, loss_fn
        self.every, self.wanted, self.variance, self.sample_dim = every, backend, variance, sample_dim
        self.choice = choose_backend(backend, optimizer, model, sample_dim)
        self._policy_wants: Callable[[int], bool] | None = None
        self._asked: tuple[int, bool] | None = None
        self._built: dict[str, Backend] = {}
        self._warned: set[str] = set()
        self._learned: dict[str, Any] = {}  # of the model, by a backend of an earlier run
        self._unaccounted: dict[str, dict[str, str]] = {}  # why one of an earlier run had no slopes of samples

    def wants(self, iteration: int) -> bool:
        """Whether the pair that starts in this iteration is measured; functions are asked once."""
        if isinstance(self.every, int):
            return iteration % self.every == 0
        if self._asked is None or self._asked[0] != iteration:
            question = self.every if self.every is not None else self._policy_wants
            if question is None:
                return True  # until there is a policy to ask
            self._asked = (iteration, bool(question(iteration)))
        return self._asked[1]

    def ask_policy(self, wants: Callable[[int], bool] | None) -> None:
        """From now on a policy decides, if ``every`` is None."""
        self._policy_wants = wants

    def backend(self) -> Backend:
        """Return the backend of the coming iteration."""
        if self.wanted == "auto" and self.choice.name == "backpack" and not is_plain_sgd(self.optimizer):
            self.choice = Choice("layerwise", "the steps are no longer those of plain SGD")
        name = self.choice.name
        if name not in self._built:
            names = named_parameters(self.model, self.loss_fn)
            model = self.model if self.model is not None else nn.Module()
            self._built[name] = BACKENDS[name](model, names, self.sample_dim, self.variance == "sampled")
            if name in self._learned:
                self._built[name].load_state_dict(self._learned[name])
            self._built[name].unaccounted.reasons.update(self._unaccounted.get(name, {}))
        return self._built[name]

    def forget_backends(self) -> None:
        """Build backends anew."""
        self._built = {}

    def saw_step(self, passes: BackwardPasses, turned: bool) -> None:
        """Leave the fast path of SGD where it cannot give all.

        Args:
            passes: Backward passes of the step; it needs one, and losses that are seen outside the model.
            turned: Whether steps are no multiples of the gradient (clipping by value).
        """
        if self.wanted != "auto" or self.choice.name != "backpack":
            return
        built = self._built.get("backpack")
        if len(passes.reached) > 1:
            self.choice = Choice("layerwise", "several backward passes per step")
        elif turned:
            self.choice = Choice("layerwise", "steps are no multiples of the gradient")
        elif passes.losses_inside:
            self.choice = Choice(
                "layerwise", "the model returns its loss, and losses of samples are seen inside it only"
            )
        elif built is not None and built.unaccounted.reasons:
            names = summarised(sorted(built.unaccounted.reasons))
            self.choice = Choice("layerwise", f"backpack could not account for {names}")

    def warn_unaccounted(self, subset_told: bool) -> None:
        """Say once which parameters have no slopes of single samples, and why.

        Args:
            subset_told: Whether the user knows already that the loss is one of some samples only.
        """
        if self.choice.name not in self._built:  # just left for one that can
            return
        reasons = self._built[self.choice.name].unaccounted.reasons
        fresh = {name: why for name, why in reasons.items() if name not in self._warned}
        fresh = {name: why for name, why in fresh.items() if not (subset_told and why == SUBSET)}
        if fresh:
            self._warned |= set(fresh)
            by_reason: dict[str, list[str]] = {}
            for name, why in sorted(fresh.items()):
                by_reason.setdefault(why, []).append(name)
            said = "; ".join(f"{summarised(named)}: {why}" for why, named in list(by_reason.items())[:2])
            warn_user(
                f"no slopes of single samples (backend={self.choice.name!r}) for {said[:300]}. "
                "Alpha keeps the slopes of the gradients (information='slopes')."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must not decide anew."""
        return {
            "choice": to_plain(self.choice),
            "asked": to_plain(self._asked),
            "learned": self._learned | {name: backend.state_dict() for name, backend in self._built.items()},
            "unaccounted": self._unaccounted | {name: dict(b.unaccounted.reasons) for name, b in self._built.items()},
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over earlier decisions; None forgets them."""
        self._asked, self._learned, self._unaccounted = None, {}, {}
        if state is None:
            return
        self._learned = dict(state["learned"])
        self._unaccounted = from_plain(dict[str, dict[str, str]], state.get("unaccounted", {}), "unaccounted")
        saved = from_plain(Choice, state["choice"], "choice")
        possible = "gradients" not in (saved.name, self.choice.name)  # that one hangs on what was given, not on the run
        if self.wanted == "auto" and possible:
            self.choice = saved
        self._asked = from_plain(tuple[int, bool] | None, state["asked"], "asked")
