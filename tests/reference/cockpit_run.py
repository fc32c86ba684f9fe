"""Cockpit itself (cockpit-for-pytorch 1.0.2), run live on one problem."""

from __future__ import annotations

import warnings

import torch
from backpack import extend
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cockpit import Cockpit
    from cockpit.quantities import Alpha
    from cockpit.utils import schedules


class RecordingAlpha(Alpha):
    """Cockpit's alpha, with the quantities that enter its fit written down before they are freed."""

    def __init__(self, track_schedule):
        super().__init__(track_schedule)
        self.rows = {}

    def _compute_alpha(self, end_step):
        start = end_step - self.SAVE_SHIFT
        row = {"step_length": self.load_from_cache(start, "update_size_start")}
        for step, point in ((start, "start"), (end_step, "end")):
            row[f"loss_{point}"] = self.load_from_cache(step, f"f_{point}")
            row[f"loss_variance_{point}"] = self.load_from_cache(step, f"var_f_{point}")
            row[f"slope_{point}"] = self.load_from_cache(step, f"df_{point}")
            row[f"slope_variance_{point}"] = self.load_from_cache(step, f"var_df_{point}")
        alpha = super()._compute_alpha(end_step)
        row["alpha"] = alpha
        self.rows[start] = {key: None if value is None else float(value) for key, value in row.items()}
        return alpha


def run_cockpit(model, loss_fn, optimizer, batches, every):
    """Train with Cockpit watching; iteration -> the nine observed quantities and alpha."""
    extend(model)
    extend(loss_fn)
    individual = type(loss_fn)(reduction="none")
    quantity = RecordingAlpha(schedules.linear(every))
    cockpit = Cockpit(model.parameters(), quantities=[quantity])
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        output = model(x)
        loss = loss_fn(output, y)
        with torch.no_grad():
            losses = individual(output, y)
        losses = losses.reshape(len(x), -1).mean(1)
        info = {"batch_size": len(x), "individual_losses": losses, "loss": loss, "optimizer": optimizer}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with cockpit(step, info=info):
                loss.backward()
        optimizer.step()
    for module in [*model.modules(), *loss_fn.modules(), nn.Identity()]:
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    return quantity.rows
