"""An own way to get slopes of samples: from gradients of single samples that the loop has anyway.

Differentially private training, for example, computes the gradient of every sample to clip it. A backend that reads
those costs one inner product, and BACKENDS takes it under a name of its own.

    python -m examples.ex8_own_backend
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alpha_optim import AlphaGuided
from alpha_optim.observe.backward_passes import BackwardPasses
from alpha_optim.observe.gradients import LossGradients
from alpha_optim.observe.step_direction import Direction
from alpha_optim.slopes.base import Expected, SampleSlopes, Silent, Unaccounted
from alpha_optim.slopes.choose import BACKENDS
from examples.data import digits, shuffled_batches

STEPS, BATCH, CLIP = 200, 64, 1.0


class SampleGradients(Silent):
    """Reads ``param.grad_sample`` ``[N, *param.shape]``, the name that Opacus gave to gradients of single samples."""

    name = "sample gradients"

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.unaccounted = Unaccounted()
        self._params: Sequence[Tensor] = ()

    def cost(self, samples: int) -> float:
        """Hardly anything, in training steps: so variances are measured at every step."""
        return 0.001

    def begin(self, passes: BackwardPasses, end_of: Direction | None, start: bool, params: Sequence[Tensor]) -> None:
        """Remember the parameters."""
        self._params = params

    def end_slopes(self, direction: Direction, point: Sequence[Tensor]) -> SampleSlopes | None:
        """Slopes along the step that ends here."""
        return self._along(direction)

    def start_slopes(self, direction: Direction, gradients: LossGradients, expected: Expected) -> SampleSlopes | None:
        """Slopes along the step that was made from here."""
        return self._along(direction)

    def _along(self, direction: Direction) -> SampleSlopes | None:
        changes = direction.change().tensors()
        pairs = [
            (param.grad_sample, change)  # type: ignore[attr-defined] # - set by the loop
            for param, change in zip(self._params, changes, strict=True)
            if change is not None
        ]
        slopes = sum(each.flatten(1).double() @ change.flatten().double() for each, change in pairs)
        return SampleSlopes(slopes, complete=True) if isinstance(slopes, Tensor) else None


def main() -> None:
    BACKENDS["sample gradients"] = lambda model, names, sample_dim, sampled: SampleGradients()
    torch.manual_seed(0)
    data = digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.5), model, backend="sample gradients")

    def loss_of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, values, (x[None],)), y[None])

    gradient_of_each = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
    for index in shuffled_batches(data, BATCH, STEPS, seed=0):
        x, y = data.x_train[index], data.y_train[index]
        values = {name: param.detach() for name, param in model.named_parameters()}
        each = gradient_of_each(values, x, y)
        for name, param in model.named_parameters():
            param.grad_sample = each[name]  # type: ignore[attr-defined] # - see `SampleGradients`
        optimizer.zero_grad()
        optimizer.backward(nn.functional.cross_entropy(model(x), y, reduction="none"))
        # Clip every sample's gradient, as private training does (and leave out its noise).
        norms = sum(values.flatten(1).square().sum(1) for values in each.values()) ** 0.5  # type: ignore[operator]
        weights = (CLIP / norms).clamp_max(1.0) / len(y)
        for name, param in model.named_parameters():
            param.grad = torch.einsum("n,n...->...", weights, each[name])
        optimizer.step()

    window = optimizer.alpha_history.windowed(100)
    last = optimizer.alpha_history[-1]
    print(f"backend {optimizer.backend!r}, information {last.information}")
    print(f"alpha over the last 100 steps: {window.alpha:+.2f} ± {window.alpha_std:.2f}, last loss {last.loss_end:.3f}")


if __name__ == "__main__":
    main()
