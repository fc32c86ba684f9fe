"""Writes docs/benchmarks.md and its picture from the raw results in examples/benchmarks/results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.benchmarks import range_test, rate_free, rate_report
from examples.benchmarks.tables import load, table

REFERENCES = ("cached", "Cockpit", "vmap")
DOCS = Path(__file__).parents[2] / "docs"
COLUMNS = ("gradients", "default", "first 100", "every=10", "steered", "guard", "exact", "layerwise", *REFERENCES)
COLOURS = {"default": "tab:blue", "exact": "tab:orange", "cached": "tab:gray", "Cockpit": "tab:red"}

HEAD = """# What alpha costs, and what it gives

Written by `python -m examples.benchmarks.report` from the raw results in `examples/benchmarks/results/` (torch
{torch}, {cpu}, one thread). `python -m examples.benchmarks.cost --all` measures every case of cost and memory and
writes this page; `--models`, `--optimizers`, `--batch`, `--references` pick some for the screen. A GPU has a table of
its own, below.

Time of a training step as a multiple of the plain step; every kind of step (measured, with variances anew, not
measured) is timed beside plain ones in one process, and the medians are put together by how often each kind comes.
**default** is `AlphaGuided(optimizer, model, loss_fn)`: alpha of every step, variances of slopes from 16 samples
now and then, in a long run; **first 100** the same over the first 100 steps, in which variances are measured more
often. **exact** takes all samples at every step. **gradients** has slopes only. *steered* has an `AlphaScheduler`
past its calibration, with its guard, and `every=None`; *guard* is a step of that kind that is not measured: the
guard's work alone. In brackets the floor: counted multiplications beyond those
of the plain step, and the bytes of the passes over parameters at the memory bandwidth of the machine. *layerwise*
is that backend where the default is `backpack` (plain SGD); *cached* our own reference backend with all samples,
*Cockpit* the original implementation, *vmap* the plain step beside gradients of single samples by
`torch.func.vmap`. Steps of 0.4 s and more are timed with the default and with all samples only. The machine is
shared: figures scatter by about 0.05.

"""
WHY = """
## Where the floor is out of reach

A step of an MLP is three matrix products; beside it everything counts. Under plain SGD the default adds the inner
product with the previous gradient and the norm of this one, which is the floor; any other optimizer adds a copy of
the parameters, a difference and three products with it. On top come some sixty small operations and the Python
around them: half a millisecond to one, the same whatever the model. That is all there is to the figures of steps of
half a millisecond, and half of what steps of 13 ms (the CNN at batch 32) pay; from 100 ms on it is 1 %. `every=10`
pays a quarter of it: a pair takes two steps of ten, and what it needs has left the caches meanwhile.

Steered, nine steps of ten are not measured, but the guard looks at every one: a copy of the parameters to go back
to, and the norms of parameters and gradients, which tell whether everything is finite.

With all samples (`exact`) a convolution or a linear layer pays for two more forward passes, one for each end of a
step, so that the floor itself is 1.6 to 1.9 where layers have rules. Elsewhere the whole model is differentiated
forward with all samples at both ends, which costs more than a plain step each. The C library's allocator takes its
share: it hands memory back to the system and gets it again page by page, the more often the more tensors are alive;
`MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000` in the environment stops that.

"""


def cost_table(rows: list[dict[str, Any]]) -> str:
    """Ratios with floors in brackets."""
    cells = []
    for row in rows:
        line = [f"{row['model']}, {row['optimizer']}, {row['batch']}", f"{row['plain_ms']:.3g} ms"]
        for name in COLUMNS:
            ratio, floor = row["ratio"].get(name), row["floor"].get(name)
            text = "" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
            line.append(text + (f" ({floor:.2f})" if floor is not None and ratio is not None else ""))
        cells.append(line)
    return table(["model, optimizer, batch", "plain", *COLUMNS], cells)


def sampled_table(rows: list[dict[str, Any]]) -> str:
    """Differences between alpha from sampled and from all samples."""
    cells = []
    for row in rows:
        ratio = " / ".join(f"{value:.2f}" for value in row["error_ratio"])
        cells.append(
            [
                f"{row['model']}, {row['base']}, {row['batch']}",
                f"{row['median_alpha']:+.2f} ± {row['median_error']:.2f}",
                f"{row['difference_median']:.3f}",
                f"{row['difference_90']:.3f}",
                f"{row['in_errors_90']:.2f}",
                ratio,
            ]
        )
    header = [
        "model, optimizer, batch",
        "median alpha ± its error",
        "median difference",
        "90 %",
        "in errors, 90 %",
        "ratio of errors, 10 / 50 / 90 %",
    ]
    return table(header, cells)


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Extra memory in multiples of the parameters."""
    header = ["model, optimizer, batch", "variant", "extra memory / parameters"]
    cells = [
        [f"{row['model']}, {row['optimizer']}, {row['batch']}", row["variant"], f"{row['extra']:.2f}"] for row in rows
    ]
    return table(header, cells)


ON_A_GPU = """
## On a GPU

`python -m examples.benchmarks.accelerator` measures what a training loop sees that reads nothing: blocks of steps of
every variant in turn, each timed from one synchronisation to the next. {device}, torch {torch}, one process on a
virtual machine whose processor takes 10 microseconds and more to start a kernel; so even the step of the largest
model here waits for the processor more than for the GPU. In brackets how often a step waits for the device: never
between two refreshes of the variances, once where the guard judges. The rows marked * are older than the last
savings; all are older than the dozen kernels by which gradients are compared with what the backward pass left.

Kernels and Python together take about two milliseconds of every step on this machine for a small model, five for
the 148 tensors of the large one. A step of a millisecond or two therefore doubles with alpha of every step;
`every=10` is for those, and for training that waits for the processor. What the guard costs is that the processor
cannot run ahead of the GPU: the step is made once its gradients are known to be finite.

"""


def gpu_table(rows: list[dict[str, Any]]) -> str:
    """Ratios and waits on an accelerator, and memory."""
    names = ("default", "gradients", "every=10", "steered", "guard", "exact")
    cells = []
    for row in rows:
        ratios = [
            f"{row['ratio'][name]:.2f} ({row['waits'][name]:.1f})" if name in row["ratio"] else "" for name in names
        ]
        held = " / ".join(f"{row['memory'][name][0]:.2f}" for name in ("default", "guard") if name in row["memory"])
        mark = " *" if row.get("earlier") else ""
        cells.append([row["case"] + mark, f"{row['plain_ms']:.3g} ms", *ratios, held])
    return table(["", "plain", *names, "memory kept, default / guard"], cells)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Overheads on a log scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["batch"] == 128]
    figure, axes = plt.subplots(figsize=(8, 4))
    for shift, (name, colour) in enumerate(COLOURS.items()):
        points = [
            (place + 0.18 * (shift - 1.5), 100 * max(1e-3, row["ratio"][name] - 1.0))
            for place, row in enumerate(rows)
            if name in row["ratio"]
        ]
        axes.bar(*zip(*points, strict=True), width=0.17, color=colour, label=name)
    axes.set_yscale("log")
    axes.set_ylabel("overhead, % of a plain step")
    axes.set_xticks(range(len(rows)), [f"{row['model']}\n{row['optimizer']}" for row in rows], fontsize=6)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write() -> None:
    """Write the document and the picture."""
    import platform

    import torch

    costs, sampled, memory = load("cost.jsonl"), load("sampled.jsonl"), load("memory.jsonl")
    picture(costs, DOCS / "cost.png")
    processor = f"{platform.machine()} CPU"
    parts = [HEAD.format(torch=torch.__version__, cpu=processor), cost_table(costs)]
    parts.append("\n![overhead in per cent of a plain step, on a log scale](cost.png)\n" + WHY)
    parts.append(
        "## What sampling the variances changes\n\nThe same runs measured twice, with sampled and with exact "
        "variances (`python -m examples.benchmarks.sampled --save`), step by step. Means of slopes and losses "
        "always come from all samples, so only weights and error bars differ.\n\n" + sampled_table(sampled)
    )
    parts.append(
        "\n## Memory\n\nPeak memory of the process beyond that of the plain run, in multiples of parameters "
        "(7 MB the MLP, 13 MB the transformer), each case in a process of its own, batch 32 "
        "(`python -m examples.benchmarks.cost --all`). The peak is reached in the first steps, when the checks "
        "run all samples at once, forward and backward, beside the step; later an optimizer holds the direction "
        "(one), and as much again while variances are measured. Included are what the C library does not "
        "give back and, under SGD, 12 MB of imported BackPACK.\n\n" + memory_table(memory)
    )
    gpu = load("accelerator.jsonl", ("case", "device"))
    if gpu:
        text = ON_A_GPU.format(device=gpu[-1]["device"], torch=gpu[-1]["torch"].split("+")[0])
        note = "\nMemory that is kept between steps, beyond the plain run's, in multiples of the parameters.\n"
        parts.append(text + gpu_table(gpu) + note)
    rates = rate_free.kept()
    if rates:
        parts.append(rate_report.section(rates, DOCS / "rates.png"))
    parts.append(range_test.section())
    (DOCS / "benchmarks.md").write_text("".join(parts))


if __name__ == "__main__":
    write()
