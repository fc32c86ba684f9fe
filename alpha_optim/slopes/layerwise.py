"""Any optimizer, any model, no individual gradients.

With ``variance="sampled"`` the model as a whole is differentiated along the step (`forward_mode`), now and then and
without a hook on any layer. With ``"exact"`` layers are contracted with the step while the passes run
(`layer_rules`), where every layer has a rule; elsewhere the model as a whole, with all samples. A model whose
forward is never called (``model.evaluate(x)``) cannot be run again as a whole; there, too, layers are contracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from alpha_optim.observe.backward_passes import BackwardPasses
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.model_calls import innermost
from alpha_optim.observe.step_direction import Direction
from alpha_optim.slopes.base import ALL, DERIVATIVES, SAMPLES, Expected, Names, SampleSlopes, Unaccounted, in_pass_cost
from alpha_optim.slopes.derivative import Line
from alpha_optim.slopes.forward_mode import ForwardMode
from alpha_optim.slopes.layer_rules import LayerRules, without_rule
from alpha_optim.slopes.verification import Verification

FORWARD_COST, FIXED_COST = 2.0, 0.3
"""Forward mode along one direction, in training steps: of the whole batch, and of the parameters whatever the batch.
Measured from 1.0 (ResNet) to 2.3 (a GPT whose output is wider than all else), and up to 0.5 where parameters are many
and the batch is small (an MLP)."""


class LayerwiseBackend:
    """Slopes of samples from the model as a whole, or from its layers."""

    name = "layerwise"

    def __init__(self, model: nn.Module, names: Names, sample_dim: int, sampled: bool) -> None:
        """Prepare.

        Args:
            model: The model that the loop calls.
            names: Names of the parameters of the optimizer.
            sample_dim: Dimension along which samples lie in its inputs.
            sampled: Whether a bounded number of samples is enough.
        """
        self._model, self._names, self._sampled = model, names, sampled
        self._forward = ForwardMode(model, sample_dim, exact=not sampled)
        self._rules = LayerRules(model, names, sampled)
        self._check = Verification(model, sample_dim)
        self._rules_fit = sample_dim == 0 and innermost(model) is model and model._compiled_call_impl is None
        self._by_rules = not sampled and self._rules_fit and self._layers_have_rules(set(names))
        self._rules_wanted = False
        self._passes: BackwardPasses | None = None
        self._params: Sequence[Tensor] = ()
        self.unaccounted = Unaccounted()

    def _layers_have_rules(self, wanted: set[int]) -> bool:
        return not without_rule(self._model, wanted, self._names)

    @property
    def records(self) -> bool:
        """Whether calls of the model are to be kept for a repetition."""
        return not self._by_rules or self._check.due()

    def check_due(self) -> bool:
        """Whether losses are to be followed back to the model's outputs in the coming iteration."""
        return self._check.due() if self._by_rules else self._forward.check_due()

    def cost(self, samples: int) -> float:
        """See `Backend`."""
        if self._by_rules:
            return in_pass_cost(samples, self._sampled)
        share = 1.0 if self._forward.takes_whole_batch else min(1.0, SAMPLES / max(samples, 1))
        return 2.0 * (FORWARD_COST * share + FIXED_COST)

    def begin(self, passes: BackwardPasses, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Hook the layers, if they are what is contracted."""
        self._passes, self._params = passes, params
        self._by_rules, self._rules_wanted = self._by_rules or self._rules_wanted, False
        if self._by_rules:
            self._rules.begin(passes, end_of, start, params)

    def accumulated(self, param: Tensor) -> None:
        """Note that the pass reached a parameter."""
        if self._by_rules:
            self._rules.accumulated(param)

    def discard(self) -> None:
        """Forget the passes so far."""
        self._rules.discard()

    def end_slopes(self, direction: Direction, point: Sequence[Tensor]) -> SampleSlopes | None:
        """Slopes along the previous step."""
        self._leave_rules_for_losses()
        if self._by_rules:
            return self._from_rules(self._rules.end_slopes())
        return self._from_model(point, direction, None)

    def start_slopes(self, direction: Direction, gradients: LossGradients, expected: Expected) -> SampleSlopes | None:
        """Slopes along the step just made."""
        self._leave_rules_for_losses()
        if self._by_rules:
            slopes = self._from_rules(self._rules.start_slopes(direction.change()))
            assert self._passes is not None
            slopes = self._check.checked(self._passes, self._params, direction, expected, slopes)
            if self._check.objection is None:
                return slopes
            self._by_rules = False  # the model as a whole may do better
            self._rules.close()
        return self._from_model(direction.start(), direction, expected)

    def doubted(self, reason: str) -> None:
        """Say so of all parameters, and check the next time."""
        self.unaccounted.add(ALL, reason)
        self._forward.check_anew()

    def _leave_rules_for_losses(self) -> None:
        """Losses of samples inside a model that returns their mean are seen when the model as a whole is run again."""
        assert self._passes is not None
        if self._by_rules and self._passes.losses_inside:
            self._by_rules = False
            self._rules.close()

    def _from_rules(self, slopes: SampleSlopes | None) -> SampleSlopes | None:
        """What the layers gave; where they could not, the model as a whole is tried from the next iteration on."""
        if self._rules.unaccounted.reasons:
            self._by_rules = False
            self._rules.close()
        return slopes

    def _from_model(
        self, point: Sequence[Tensor], direction: Direction, expected: Expected | None
    ) -> SampleSlopes | None:
        assert self._passes is not None
        passes = self._passes.reached
        if self._passes.differentiated_twice:
            self.unaccounted.add(ALL, DERIVATIVES)
            return None
        if not self._passes.forwards and passes:
            self._without_model_calls()
            return None
        change = direction.change(point if expected is None else None)
        line = Line.along(self._forward.names, self._params, point, change.tensors())
        if not line.point:
            return None
        slopes, reason = self._forward.slopes(passes, line, expected)
        if reason is not None:
            self.unaccounted.add(ALL, reason)
        return slopes

    def _without_model_calls(self) -> None:
        """The model was not called in this iteration: contract its layers from now on, if they have rules."""
        wanted = set(map(id, self._params))
        tried = bool(self._rules.unaccounted.reasons)
        if not tried and self._rules_fit and self._layers_have_rules(wanted):
            self._rules_wanted = True  # in this iteration nothing was seen of the layers
        else:
            self.unaccounted.add(
                ALL,
                "no call of the model was seen; give AlphaGuided the very module that the loop calls (the compiled "
                "one, if it is compiled)",
            )

    def mute(self) -> None:
        """Remove every hook; what was collected stays."""
        self._rules.mute()

    def close(self) -> None:
        """Remove every hook and free what was collected."""
        self._rules.close()
        self._passes = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned about the model."""
        return {
            "by_rules": self._by_rules or self._rules_wanted,
            "forward": self._forward.state_dict(),
            "check": self._check.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what was learned about the model."""
        self._by_rules = bool(state["by_rules"])
        self._forward.load_state_dict(state["forward"])
        self._check.load_state_dict(state["check"])
