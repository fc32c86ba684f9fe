"""One backward pass per sample, in a plain loop; the slow version that explains what is measured."""

from __future__ import annotations

import itertools
import math

import torch


def gradients_of_samples(model, loss_of_one, x, y, params):
    """Losses [N] and gradients [N, P] of single samples, in float64."""
    losses, rows = [], []
    for i in range(len(x)):
        loss = loss_of_one(model(x[i : i + 1]), y[i : i + 1], i)
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params, strict=True)])
        )
        losses.append(loss.detach())
    return torch.stack(losses).double(), torch.stack(rows).double()


def observe_run(model, loss_of_one, mean_loss, optimizer, batches):
    """Train in the plain loop; one row of the nine observed quantities per pair of iterations."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    seen = []
    for x, y in batches:
        losses, rows = gradients_of_samples(model, loss_of_one, x, y, params)
        before = torch.cat([p.detach().flatten() for p in params]).double()
        optimizer.zero_grad()
        mean_loss(model(x), y).backward()
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in params]).double()
        seen.append((losses, rows, after - before))
    return rows_of_pairs(seen)


def rows_of_pairs(seen):
    """The nine observed quantities per pair of iterations, from losses [N], gradients [N, P] and step [P] of each."""
    pairs = []
    for (losses0, rows0, d), (losses1, rows1, _) in itertools.pairwise(seen):
        t = float(d.norm())
        row = {"step_length": t}
        for point, losses, rows in (("start", losses0, rows0), ("end", losses1, rows1)):
            slopes = rows @ d / t
            row[f"loss_{point}"], row[f"slope_{point}"] = float(losses.mean()), float(slopes.mean())
            one = len(losses) < 2
            row[f"loss_variance_{point}"] = math.nan if one else float(losses.var())
            row[f"slope_variance_{point}"] = math.nan if one else float(slopes.var())
        pairs.append(row)
    return pairs
