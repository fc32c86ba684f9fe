"""How far range tests lie from the tuned rate: `find_lr`, pytorch-lr-finder and Lightning's `Tuner.lr_find`.

Each gets the same untrained network, loader and hundred steps, and says a rate, by the defaults of its authors. The
tuned rates are those of the study (`examples.benchmarks.rate_free`): the best of nine with linear decay.

    python -m examples.benchmarks.range_test           # a table on the screen
    python -m examples.benchmarks.range_test --save    # kept, for docs/benchmarks.md

The other two come with ``pip install '.[benchmarks,integrations,plots]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from alpha_optim import find_lr
from examples.benchmarks.problems import PROBLEMS
from examples.benchmarks.rate_free import BASES, Base, best_of_grid, kept
from examples.benchmarks.tables import RESULTS, load, table

STEPS, SEEDS = 100, (0, 1, 2)
NEAR = math.sqrt(10.0)
"""A rate is near the tuned one if it is no further than a step of the grid that was searched."""
Told = tuple[float | None, int]
"""The rate, None if it cannot be told, and the steps that were made."""


def ours(model: nn.Module, base: Base, loader: DataLoader[Any], loss_fn: nn.Module) -> Told:
    """`alpha_optim.find_lr`."""
    finding = find_lr(model, base.build(model, 1e-3), loader, loss_fn, steps=STEPS)
    return finding.lr, len(finding.history) + 1


def lr_finder(model: nn.Module, base: Base, loader: DataLoader[Any], loss_fn: nn.Module) -> Told:
    """`torch_lr_finder`, with the bounds of its README's first example."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from torch_lr_finder import LRFinder

    finder = LRFinder(model, base.build(model, 1e-7), loss_fn, device="cpu")
    finder.range_test(loader, end_lr=100, num_iter=STEPS)
    figure, axes = plt.subplots()
    try:
        found = finder.plot(ax=axes, suggest_lr=True)
    finally:
        plt.close(figure)
    return (float(found[1]) if isinstance(found, tuple) else None), len(finder.history["lr"])


def lightning(model: nn.Module, base: Base, loader: DataLoader[Any], loss_fn: nn.Module) -> Told:
    """Lightning's `Tuner.lr_find`, with its own bounds."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.tuner import Tuner

    class Wrapped(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.lr = model, 1e-3

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss: Tensor = loss_fn(self.net(batch[0]), batch[1])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return base.build(self, self.lr)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=1000, default_root_dir=folder,
        )  # fmt: skip
        found = Tuner(trainer).lr_find(Wrapped(), train_dataloaders=loader, num_training=STEPS)
        assert found is not None
        return found.suggestion(), len(found.results["lr"])


TOOLS: dict[str, Callable[[nn.Module, Base, DataLoader[Any], nn.Module], Told]] = {
    "find_lr": ours,
    "pytorch-lr-finder": lr_finder,
    "Lightning lr_find": lightning,
}


def measure(problem: str, base: str, tuned: float) -> list[dict[str, Any]]:
    """What each tool says, for every seed."""
    task = PROBLEMS[problem]
    rows = []
    for tool, ask in TOOLS.items():
        for seed in SEEDS:
            torch.manual_seed(seed)
            model, data = task.build(), TensorDataset(*task.data().train)
            generator = torch.Generator().manual_seed(seed)
            loader = DataLoader(data, batch_size=task.batch, shuffle=True, drop_last=True, generator=generator)
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                lr, steps = ask(model, BASES[base], loader, task.loss_fn())
            rows.append(
                {
                    "model": problem,
                    "base": base,
                    "variant": tool,
                    "data": seed,
                    "tuned": tuned,
                    "lr": lr,
                    "steps": steps,
                }
            )
    return rows


def ratio_table(rows: list[dict[str, Any]]) -> str:
    """Rates told as multiples of the tuned one, and how many of them are near it."""
    lines = []
    for problem, base in dict.fromkeys((row["model"], row["base"]) for row in rows):
        cells = []
        for tool in TOOLS:
            found = [r for r in rows if (r["model"], r["base"], r["variant"]) == (problem, base, tool)]
            told = sorted(row["lr"] / row["tuned"] for row in found if row["lr"] is not None)
            cells.append(", ".join([f"{ratio:.2g}" for ratio in told] + ["–"] * (len(found) - len(told))))
        tuned = next(row["tuned"] for row in rows if (row["model"], row["base"]) == (problem, base))
        lines.append([f"{problem}, {base}", f"{tuned:g}", *cells])
    last = []
    for tool in TOOLS:
        found = [row for row in rows if row["variant"] == tool]
        off = [abs(math.log10(row["lr"] / row["tuned"])) for row in found if row["lr"] is not None]
        near = sum(value <= math.log10(NEAR) * 1.001 for value in off)
        steps = statistics.median(row["steps"] for row in found)
        last.append(
            f"near {near} of {len(found)}, not told {len(found) - len(off)}; "
            f"a factor of {10 ** statistics.median(off):.2g} off in the median; {steps:.0f} steps"
        )
    return table(["problem, base", "tuned", *TOOLS], [*lines, ["all", "", *last]])


def section() -> str:
    """The part of docs/benchmarks.md; empty if nothing is kept."""
    rows = load("range_test.jsonl")
    if not rows:
        return ""
    return (
        "\n## Range tests\n\nThe rate that a range test tells before training, as a multiple of the tuned one: three "
        "seeds each, untrained networks, at most 100 steps, everything by default "
        "(`python -m examples.benchmarks.range_test --save`). *near*: within a factor of "
        f"{NEAR:.2g}, one step of the grid on which the tuned rate was looked for; –: it says that it cannot tell.\n\n"
        + ratio_table(rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), help="only these")
    parser.add_argument("--save", action="store_true", help="keep the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, study = [], kept()
    for problem in tqdm(args.problems, disable=None):
        for base in ("SGD", "momentum", "AdamW"):
            tuned = best_of_grid(problem, base, study)
            if tuned is not None:
                rows += measure(problem, base, tuned)
    print(ratio_table(rows))
    if args.save:
        with (RESULTS / "range_test.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
