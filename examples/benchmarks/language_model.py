"""A language model of ten million parameters on a GPU: from rates nobody would choose, beside AdamW at chosen ones.

    python -m examples.benchmarks.language_model --runs       # every run, a few at a time, and a table
    python -m examples.benchmarks.language_model --lr 1e-6 --steered

The text is the source of Python's standard library, a character per token: 256 tokens, 6 layers of width 384, batches
of 64 in bf16. Chosen rates are warmed up over a twentieth of the run and decayed along a cosine.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from alpha_optim import AlphaGuided, AlphaScheduler
from examples.benchmarks.models import GPT
from examples.benchmarks.tables import RESULTS, load, table

VOCABULARY, LENGTH, BATCH = 128, 256, 64
MOST = 8_000_000
"""Characters that are read."""
CHOSEN = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
STEERED = (1e-6, 1e-3, 10.0)
KEYS = ("lr", "steered", "steps", "seed", "device")


def text() -> Tensor:
    """Characters ``[n]``, of files in the order of their names."""
    files = sorted(Path(json.__file__).parents[1].glob("*.py")) + sorted(Path(json.__file__).parents[1].glob("*/*.py"))
    source = b"".join(file.read_bytes() for file in files if "site-packages" not in str(file))[:MOST]
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).long().clamp_max(VOCABULARY - 1)


def batch(data: Tensor, generator: torch.Generator, device: str, size: int = BATCH) -> tuple[Tensor, Tensor]:
    places = torch.randint(0, len(data) - LENGTH - 1, (size, 1), generator=generator)
    both = data[places + torch.arange(LENGTH + 1)].to(device)
    return both[:, :-1], both[:, 1:]


def train(lr: float, steered: bool, steps: int, device: str, seed: int = 0) -> dict[str, Any]:
    """One run; its loss on text that was kept apart."""
    data = text()
    kept = len(data) // 20
    torch.manual_seed(seed)
    model = GPT(VOCABULARY, LENGTH, 384, 6, 6).to(device)
    loss_fn = nn.CrossEntropyLoss()
    base: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=device != "cpu", weight_decay=0.1)
    scheduler: Any
    if steered:
        base = AlphaGuided(base, model, loss_fn, every=None)
        scheduler = AlphaScheduler(base, total_steps=steps)
    else:
        warm = steps / 20
        scheduler = LambdaLR(base, lambda n: min(1.0, (n + 1) / warm) * 0.5 * (1 + math.cos(math.pi * n / steps)))
    generator, begin = torch.Generator().manual_seed(seed), time.perf_counter()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss: Tensor = loss_fn(model(x).flatten(0, 1), y.flatten())
        return loss

    for _ in range(steps):
        x, y = batch(data[:-kept], generator, device)
        base.zero_grad()
        loss_of(x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        base.step()
        scheduler.step()
    test = torch.Generator().manual_seed(1)
    with torch.no_grad():
        losses = [loss_of(*batch(data[-kept:], test, device, 32)) for _ in range(40)]
    result = {"lr": lr, "steered": steered, "steps": steps, "seed": seed, "loss": float(torch.stack(losses).mean())}
    result["seconds"] = time.perf_counter() - begin
    result["device"] = torch.cuda.get_device_name() if device == "cuda" else device
    if steered:
        result["story"] = [list(entry) for entry in scheduler.policy.story]
    return result


def compared(rows: list[dict[str, Any]]) -> str:
    """A table of the runs."""
    cells = [
        [f"from {row['lr']:g}, no rate chosen" if row["steered"] else f"AdamW {row['lr']:g}, warm-up and cosine",
         f"{row['loss']:.3f}", f"{row['seconds']:.0f} s"]
        for row in sorted(rows, key=lambda row: (row["steered"], row["lr"]))
    ]  # fmt: skip
    return table(["run", "loss on text kept apart", "time, several runs at once"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", action="store_true", help="all of them, each in a process of its own")
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the GPU")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steered", action="store_true")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "language_model.jsonl")
    args = parser.parse_args()
    if not args.runs:
        print(json.dumps(train(args.lr, args.steered, args.steps, args.device, args.seed)))
        return
    wanted = [(lr, False) for lr in CHOSEN] + [(lr, True) for lr in STEERED]

    def run(case: tuple[float, bool]) -> str:
        command = [sys.executable, "-m", "examples.benchmarks.language_model", "--lr", str(case[0])]
        command += ["--steps", str(args.steps), "--seed", str(args.seed), "--device", args.device]
        done = subprocess.run(command + ["--steered"] * case[1], capture_output=True, text=True, check=False)
        return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr[-2000:]

    with ThreadPoolExecutor(args.at_once) as pool:
        for line in pool.map(run, wanted):
            print(line, flush=True)
            if line.startswith("{"):
                with args.out.open("a") as file:
                    file.write(line + "\n")
    print(compared(load(args.out.name, KEYS) if args.out.parent == RESULTS else []))


if __name__ == "__main__":
    main()
