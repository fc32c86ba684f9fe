"""One backward pass per sample through one forward pass of the batch: for models whose samples cannot run alone."""

from __future__ import annotations

import torch

from tests.reference.per_sample_loop import rows_of_pairs


def observe(losses_of_samples, optimizer, batches):
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
    return rows_of_pairs(seen)
