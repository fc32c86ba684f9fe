"""What grows over a long run: measurements up to their bound, and nothing else."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaHistory, AlphaScheduler, Observation, measure_alpha

BOUNDED = {"AlphaMeasurement"}
"""Kept in the history, which is bounded."""


def alive(guided):
    """How many objects there are, of ours and of the kinds that hooks and graphs are made of."""
    assert len(guided.alpha_history) > 0  # reads what was not read yet, of which 4,096 measurements are kept
    gc.collect()
    kinds = (type(thing) for thing in gc.get_objects())
    watched = ("Tensor", "Parameter", "function", "method", "cell", "RemovableHandle", "WeakMethod", "ReferenceType")
    return Counter(k.__name__ for k in kinds if str(k.__module__).startswith("alpha_optim") or k.__name__ in watched)


def grown(steps, optimizer="AdamW", steered=True):
    """Train for so many steps; by kind, what grew in the second third and again in the last, the history left out."""
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)), nn.CrossEntropyLoss()
    guided = AlphaGuided(getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3), model, loss_fn)
    scheduler = AlphaScheduler(guided, total_steps=steps) if steered else None
    counts = []
    for n in range(1, steps + 1):
        x = torch.randn(16, 6)
        guided.zero_grad()
        loss_fn(model(x), x[:, :3].argmax(1)).backward()
        guided.step()
        if scheduler is not None:
            scheduler.step()
        if n in (steps // 3, 2 * steps // 3, steps):
            counts.append(alive(guided) + Counter(hooks=count_of_hooks(model, loss_fn)))
    # Caches, of torch and of Python itself, fill once; what grows with the steps does so in either third.
    first, second, last = counts
    more = {kind: min(second[kind] - first[kind], last[kind] - second[kind]) for kind in last}
    return {kind: count for kind, count in more.items() if count > steps // 100 and kind not in BOUNDED}


def nothing_grows(steps, optimizer, steered):
    """Raise if anything does."""
    more = grown(steps, optimizer, steered)
    assert more == {}, more


def memory():
    """What this process holds, in bytes (Linux)."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def a_history_is_bounded(count, maxlen=100_000):
    """So many measurements: memory stays as it was once the bound was reached, and what was dropped is counted."""
    history, ends = AlphaHistory(maxlen), (Observation(8, -1.0, 0.1, 2.0, 0.5), Observation(8, 0.2, 0.1, 1.9, 0.5))
    before = 0
    for iteration in range(count):
        history.append(measure_alpha(iteration, 0.1, *ends, (0.1,)))
        if iteration == 2 * maxlen:
            assert len(history) == maxlen  # reads what waits to be read
            before = memory()
    assert len(history) == maxlen
    assert history.dropped == {"evicted": count - maxlen}
    assert history[-1].iteration == count - 1
    assert memory() - before < 0.1 * before, (before, memory())


def count_of_hooks(model, loss_fn):
    """Hooks on modules and parameters."""
    modules = [*model.modules(), loss_fn]
    own = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    return own + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
