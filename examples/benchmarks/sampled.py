"""How far alpha from sampled variances lies from alpha of all samples, step by step, on real runs.

Measuring changes nothing, so a run made twice is the same run: once with variance="sampled" (16 samples, now
and then), once with variance="exact" (all samples, every step). The models take the images of Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from alpha_optim import AlphaGuided
from examples.benchmarks import problems
from examples.data import Data, load, shuffled_batches

MODELS = {"mlp": problems.mlp, "cnn": problems.cnn}
BASES = {
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "SGD momentum 0.9": lambda model: torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
}
RESULTS = Path(__file__).parent / "results" / "sampled.jsonl"


def history(data: Data, model_name: str, base: str, batch: int, steps: int, variance: str) -> Any:
    """Train at a constant rate and return what was measured."""
    torch.manual_seed(0)
    model, loss_fn = MODELS[model_name](), nn.CrossEntropyLoss()
    optimizer = AlphaGuided(BASES[base](model), model, loss_fn, variance=variance)
    label = f"{model_name}, {base}, batch {batch}, {variance}"
    for index in tqdm(shuffled_batches(data, batch, steps, seed=0), desc=label, leave=False, disable=None):
        optimizer.zero_grad()
        loss_fn(model(data.x_train[index]), data.y_train[index]).backward()
        optimizer.step()
    return optimizer.alpha_history


def compare(data: Data, model_name: str, base: str, batch: int, steps: int) -> dict[str, Any]:
    """Differences of alpha, of its standard error and of window means between the two."""
    sampled, exact = (history(data, model_name, base, batch, steps, kind) for kind in ("sampled", "exact"))
    pairs = [(s, e) for s, e in zip(sampled, exact, strict=True) if s.status == e.status == "measured"]
    away = [abs(s.alpha - e.alpha) for s, e in pairs]
    return {
        "data": data.name,
        "model": model_name,
        "base": base,
        "batch": batch,
        "steps": steps,
        "median_alpha": statistics.median(e.alpha for _, e in pairs),
        "median_error": statistics.median(e.alpha_std for _, e in pairs),
        "difference_median": statistics.median(away),
        "difference_90": float(np.quantile(away, 0.9)),
        "in_errors_90": float(np.quantile([abs(s.alpha - e.alpha) / e.alpha_std for s, e in pairs], 0.9)),
        "error_ratio": [float(q) for q in np.quantile([s.alpha_std / e.alpha_std for s, e in pairs], [0.1, 0.5, 0.9])],
        "correlation": float(
            np.corrcoef(*np.transpose([(np.tanh(s.alpha), np.tanh(e.alpha)) for s, e in pairs]))[0, 1]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder with the Fashion-MNIST files, if not where Debian puts them")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save", action="store_true", help="write results/sampled.jsonl for the report")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = load(args.data), []
    if data.name != "Fashion-MNIST":
        raise SystemExit("Fashion-MNIST was not found: apt install dataset-fashion-mnist, or --data FOLDER")
    print(f"{data.name}, {args.steps} steps: alpha from sampled variances against alpha from all samples")
    print(f"{'':34} median |difference|, 90 %, in standard errors (90 %), ratio of errors (10, 50, 90 %)")
    for model_name in MODELS:
        for base in BASES:
            for batch in (128, 32):
                row = compare(data, model_name, base, batch, args.steps)
                rows.append(row)
                ratio = "  ".join(f"{value:.2f}" for value in row["error_ratio"])
                print(
                    f"{f'{model_name}, {base}, batch {batch}':34} {row['difference_median']:18.3f} "
                    f"{row['difference_90']:6.3f} {row['in_errors_90']:10.2f} {'':10} {ratio}",
                    flush=True,
                )
    if args.save:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
