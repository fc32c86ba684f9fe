"""One backward pass per sample through one forward pass of the batch: for models whose samples cannot run alone."""

from __future__ import annotations

import itertools

import torch


def observe(losses_of_samples, optimizer, batches, step=None):
    """Train in the plain loop; one row of the nine observed quantities per pair of iterations.

    ``losses_of_samples(batch)`` returns losses ``[N]`` with their graph, whose mean is the loss.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    seen = []
    for batch in batches:
        losses = losses_of_samples(batch)
        rows = []
        for loss in losses:
            grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            flat = [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params, strict=True)]
            rows.append(torch.cat(flat))
        before = torch.cat([p.detach().flatten() for p in params]).double()
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in params]).double()
        seen.append((losses.detach().double(), torch.stack(rows).double(), after - before))
    pairs = []
    for (losses0, rows0, d), (losses1, rows1, _) in itertools.pairwise(seen):
        t = float(d.norm())
        row = {"step_length": t}
        for point, losses, rows in (("start", losses0, rows0), ("end", losses1, rows1)):
            slopes = rows @ d / t
            row[f"loss_{point}"], row[f"slope_{point}"] = float(losses.mean()), float(slopes.mean())
            row[f"loss_variance_{point}"] = float(losses.var())
            row[f"slope_variance_{point}"] = float(slopes.var())
        pairs.append(row)
    return pairs
