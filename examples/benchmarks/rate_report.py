"""Tables and a picture of the study of learning rates, from its raw results."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from examples.benchmarks.held_out import FEW_PEERS, HELD_OUT, LATER
from examples.benchmarks.peers import PEERS
from examples.benchmarks.problems import PROBLEMS, SHORT, UNSEEN
from examples.benchmarks.rate_free import ALL, BASES, FRESH, OPEN
from examples.benchmarks.tables import table

Row = dict[str, Any]


def select(rows: list[Row], **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def figures(rows: list[Row]) -> list[float]:
    """Test figures, the worst last; what is not a number is worst of all."""
    if not rows:
        return []
    accuracy = ALL[rows[0]["problem"]].accuracy
    nan = -math.inf if accuracy else math.inf
    return sorted((row["test"] if math.isfinite(row["test"]) else nan for row in rows), reverse=accuracy)


def written(value: float, accuracy: bool) -> str:
    """A figure as text."""
    return "–" if math.isnan(value) else f"{value:.1f}" if accuracy else f"{value:.4f}"


def diverged(row: Row) -> bool:
    """Whether a run ended with numbers that are not finite, or no better than it began."""
    worse = row["test"] <= row["before"] if ALL[row["problem"]].accuracy else row["test"] >= row["before"]
    return not row["finite"] or not math.isfinite(row["test"]) or worse


def verdict(ours: list[float], tuned: list[float], accuracy: bool) -> tuple[bool, bool]:
    """Whether our worst and our median are as near to the tuned runs as they should be.

    The worst within 0.5 points (3 % of the loss) of tuned's own worst, the median within 0.2 points (1 %) of
    tuned's mean.
    """
    worst, median, mean = ours[-1], statistics.median(ours), statistics.fmean(tuned)
    if accuracy:
        return worst >= tuned[-1] - 0.5, median >= mean - 0.2
    return worst <= 1.03 * tuned[-1], median <= 1.01 * mean


HEADER = [
    "problem, base",
    "tuned: mean, worst (rate)",
    "worst of 15",
    "guessed",
    "alpha: median, worst",
    "two climbs (15)",
    "runs",
    "found / tuned rate, 10–90 %",
    "diverged",
    "time",
    "reached",
]


def alpha_line(rows: list[Row], problem: str, base: str) -> list[str] | None:
    """One problem and base: ours from all initial rates against tuned and guessed."""
    own, tuned, more = (
        select(rows, problem=problem, base=base, method=method) for method in ("alpha", "tuned", "tuned further")
    )
    if not own or not tuned:
        return None
    accuracy = ALL[problem].accuracy
    best = tuned[0]["lr"]
    guessed = figures(select(rows, problem=problem, base=base, method="guessed"))
    ours, theirs, many = figures(own), figures(tuned), figures(tuned + more)
    before = figures(select(rows, problem=problem, base=base, method="alpha 0.1"))
    ratios = sorted(row["found"] / best for row in own)
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    worst, median = verdict(ours, theirs, accuracy)
    fair = bool(more) and verdict(ours, many, accuracy)[0]
    timed = select(rows, problem=problem, base=base, method="time")
    mean = statistics.fmean(guessed) if guessed else math.nan
    return [
        f"{problem}, {base}",
        f"{written(statistics.fmean(theirs), accuracy)}, {written(theirs[-1], accuracy)} ({best:g})",
        written(many[-1], accuracy) if more else "",
        written(mean, accuracy),
        f"{written(statistics.median(ours), accuracy)}, {written(ours[-1], accuracy)}",
        f"{written(statistics.median(before), accuracy)}, {written(before[-1], accuracy)}" if before else "",
        str(len(own)),
        f"{statistics.median(ratios):.2g} ({low:.2g}–{high:.2g})",
        str(sum(map(diverged, own))),
        f"{timed[0]['ratio']:.2f}" if timed else "",
        ("worst" if worst else "(worst)" if fair else "–") + ", " + ("median" if median else "–"),
    ]


def alpha_table(rows: list[Row], problems: list[str]) -> str:
    """All problems and bases that are complete."""
    lines = [alpha_line(rows, problem, base) for problem in problems for base in BASES]
    return table(HEADER, [line for line in lines if line is not None])


def by_initial_rate(rows: list[Row], problems: list[str]) -> str:
    """Median over seeds from each initial rate."""
    rates = sorted({row["lr"] for row in rows if row["method"] == "alpha"})
    lines = []
    for problem in problems:
        for base in BASES:
            cells = []
            for lr in rates:
                found = figures(select(rows, problem=problem, base=base, method="alpha", lr=lr))
                cells.append(written(statistics.median(found), ALL[problem].accuracy) if found else "")
            if any(cells):
                lines.append([f"{problem}, {base}", *cells])
    return table(["problem, base", *(f"from {lr:g}" for lr in rates)], lines)


def by_method(rows: list[Row], problem: str) -> dict[str, list[Row]]:
    """Runs of ours over each base, and of the other methods."""
    named = {f"alpha, {base}": select(rows, problem=problem, method="alpha", base=base) for base in BASES}
    named |= {peer: select(rows, problem=problem, method=peer) for peer in PEERS}
    return {name: found for name, found in named.items() if found}


def peer_table(rows: list[Row], problems: list[str]) -> str:
    """Median and worst of the other methods, and of ours over each base."""
    lines = []
    for problem in problems:
        accuracy = ALL[problem].accuracy
        for name, found in by_method(rows, problem).items():
            values = figures(found)
            middle = written(statistics.median(values), accuracy)
            broken = sum(map(diverged, found))
            lines.append([problem, name, middle, written(values[-1], accuracy), str(broken)])
    return table(["problem", "method", "median", "worst", "diverged"], lines)


def open_end_table(rows: list[Row], problems: list[str]) -> str:
    """AdamW with alpha that knows the horizon and that does not, and Schedule-Free AdamW, which needs none."""
    lines = []
    for problem in problems:
        cells = []
        for method, base in (
            ("tuned", "AdamW"), ("alpha", "AdamW"), (OPEN, "AdamW"), ("alpha", "Schedule-Free AdamW"),
            ("Schedule-Free AdamW, default", ""), ("GeN", ""),
        ):  # fmt: skip
            values = figures(select(rows, problem=problem, method=method, base=base))
            both = (statistics.median(values), values[-1]) if values else ()
            cells.append(", ".join(written(value, ALL[problem].accuracy) for value in both))
        if cells[2]:
            lines.append([problem, *cells])
    return table(
        [
            "median, worst",
            "tuned AdamW",
            "alpha, horizon known",
            "not known",
            "alpha, Schedule-Free",
            "Schedule-Free",
            "GeN",
        ],
        lines,
    )


def rank_table(rows: list[Row], problems: list[str]) -> str:
    """Mean rank by the median, among the methods that ran on every problem."""
    by_problem = {
        problem: {name: statistics.median(figures(runs)) for name, runs in by_method(rows, problem).items()}
        for problem in problems
    }
    names = sorted(set.intersection(*(set(found) for found in by_problem.values())))  # methods that tie keep an order
    ranks: dict[str, list[int]] = {name: [] for name in names}
    for problem, found in by_problem.items():
        order = sorted(names, key=found.__getitem__, reverse=ALL[problem].accuracy)
        for rank, name in enumerate(order, start=1):
            ranks[name].append(rank)
    means = sorted((statistics.fmean(places), name, places) for name, places in ranks.items())
    lines = [[name, f"{mean:.1f}", *map(str, places)] for mean, name, places in means]
    return table(["method", "mean rank", *problems], lines)


def summary(rows: list[Row]) -> str:
    """What there is, for the screen."""
    problems = [name for name in ALL if select(rows, problem=name)]
    return "\n".join([alpha_table(rows, problems), by_initial_rate(rows, problems), peer_table(rows, problems)])


POINT = 0.06
"""A share of the loss that counts as a point, as 3 % count as half of one."""


def shortfalls(rows: list[Row], problems: list[str], method: str) -> list[list[float]]:
    """By how many points the runs of each pair fall short of tuned's mean, 0 where they do not."""
    pairs = []
    for problem in problems:
        for base in BASES:
            own, tuned = (select(rows, problem=problem, base=base, method=name) for name in (method, "tuned"))
            if own and tuned:
                mean, accuracy = statistics.fmean(figures(tuned)), ALL[problem].accuracy
                short = [mean - value if accuracy else (value / mean - 1.0) / POINT for value in figures(own)]
                pairs.append([max(0.0, value) for value in short])
    return pairs


def shortfall_table(rows: list[Row], problems: list[str]) -> str:
    """How far ours and the search of version 0.1 fall short of tuned."""
    lines = []
    for name, method in (("trials", "alpha"), ("two climbs (15 runs a pair)", "alpha 0.1")):
        pairs = shortfalls(rows, problems, method)
        every = [value for pair in pairs for value in pair]
        if every:
            means = (
                statistics.fmean(every),
                statistics.fmean(map(statistics.median, pairs)),
                statistics.fmean(map(max, pairs)),
            )
            far = sum(value > 1.0 for value in every) / len(every)
            lines.append([name, str(len(pairs)), *(f"{value:.2f}" for value in means), f"{100.0 * far:.0f} %"])
    return table(["", "pairs", "mean", "mean of medians", "mean of worst", "runs more than a point short"], lines)


TEXT = """
## Training without a search for the rate

`python -m examples.benchmarks.rate_free --core` and `--unseen` (raw results in
`examples/benchmarks/results/rates.jsonl`). Test accuracy in % or test loss. **alpha** is
`AlphaScheduler(total_steps=...)` from initial rates of 1e-6, 1e-4, 1e-2, 1 and 100, one seed each; **two climbs** is
the search of version 0.1, which had no trials, from the same rates with three seeds each. **tuned** is the best of nine
rates with linear decay (constant for Schedule-Free), chosen on a validation split and run again on three fresh
seeds; **guessed** the middle of that grid on the same seeds. *found* is the highest rate after the search. *time* is
that of a whole run as a multiple of a tuned one, the search for its rate not counted, 20 steps of each in turn;
where a step takes a millisecond or two (the MLPs, regression, quadratic) it is Python that costs. *reached*: worst
within 0.5 points (3 % of the loss) of tuned's worst seed of three, or, in brackets, only of its worst of 15
(`--further`); median within 0.2 points (1 %) of tuned's mean.

"""


HELD_OUT_TEXT = """
### Held out

`--held-out`: problems that were written down when the policy stood as it does, and run once. No constant was chosen on
them. A variational autoencoder whose losses are handed over with `optimizer.backward`; a ResNet with BatchNorm over
five epochs; nodes of a graph, 150 of which have a class; a ViT of Transformers that is fine-tuned and returns its loss,
gradients clipped; a GPT with dropout, flattened functional loss and clipping, over 400 steps. *Muon + AdamW* is two
optimizers wrapped as one.

"""

LATER_TEXT = """
### Asked about later

`--later`: what people asked about when the problems above had been looked at. A GPT over 2,000 steps and an LSTM on
text, gradients clipped; a table of 20,000 rows with numbers and categories, BatchNorm and dropout; and a GPT whose
positions begin fifty times larger than its tokens: it rests for hundreds of steps where it knows how often letters
are. The last one was found by a user, and the rise of rates on a [plateau](policy.md#held-and-corrected) was made for
it; so were cosines, where every run had been lost at rates up to 1e9, and how trials
[go down to the knee](policy.md#calibratethenannealtotal_steps); nothing was chosen on the others.

"""

SHORT_TEXT = """
### Short runs

`--short`: problems from above over 300 and 400 steps. Of such runs the search is a fifth to a third.

"""


def section(rows: list[Row], picture_path: Path) -> str:
    """The part of docs/benchmarks.md."""
    seen = list(PROBLEMS)
    picture(rows, picture_path)
    parts = [TEXT, alpha_table(rows, seen)]
    parts.append(
        "\nPoints of accuracy by which runs fall short of tuned's mean, 0 if they do not; of losses 6 % count as a "
        "point:\n\n" + shortfall_table(rows, [*PROBLEMS, *UNSEEN])
    )
    parts.append(f"\n![test figures against initial rates]({picture_path.name})\n")
    parts.append("\nMedian over seeds by initial rate:\n\n" + by_initial_rate(rows, seen))
    parts.append(
        "\nOther methods (three seeds): those that set their own rate (Prodigy and D-Adaptation with a cosine, GeN "
        "every fourth step with a linear decay, the others at the constant rate of their authors), ReduceLROnPlateau "
        "on SGD with momentum 0.9 from 0.1, and what people take without tuning, AdamW with a cosine or OneCycle; and "
        "alpha over all its initial rates and seeds:\n\n" + peer_table(rows, seen)
    )
    parts.append("\nRanks by the median, among the methods that ran on every problem:\n\n" + rank_table(rows, seen))
    if select(rows, method=OPEN):
        parts.append(
            "\nRuns whose length is not known (`CalibrateThenAnneal(400, anneal=False)`, held with corrections, and "
            "`cool_down` over the last fifth), beside runs that know it and methods that need none:\n\n"
            + open_end_table(rows, [*PROBLEMS, *UNSEEN])
        )
    if select(rows, problem=next(iter(UNSEEN)), method="alpha"):
        parts.append(
            "\nThree more problems (`--unseen`). Nothing was chosen on the first and the last; the share "
            "of a trial in which its rate grows was, on the digits transformer among others:\n\n"
            + alpha_table(rows, list(UNSEEN))
            + "\n"
            + peer_table(rows, list(UNSEEN))
        )
    held_out = [name for name in HELD_OUT if select(rows, problem=name, method="tuned")]
    if held_out:
        parts.append(HELD_OUT_TEXT + alpha_table(rows, held_out) + "\nShortfalls as above:\n\n")
        parts.append(shortfall_table(rows, held_out) + "\n" + peer_table(rows, held_out))
        ranked = [name for name in held_out if HELD_OUT[name].peers == FEW_PEERS]
        parts.append("\nRanks, where more than two other methods were run:\n\n" + rank_table(rows, ranked))
    later = [name for name in LATER if select(rows, problem=name, method="tuned")]
    if later:
        parts.append(LATER_TEXT + alpha_table(rows, later) + "\nShortfalls as above:\n\n")
        parts.append(shortfall_table(rows, later) + "\n" + peer_table(rows, later))
        parts.append("\nRanks:\n\n" + rank_table(rows, later))
    short = [name for name in SHORT if select(rows, problem=name, method="tuned")]
    if short:
        parts.append(
            SHORT_TEXT + alpha_table(rows, short) + "\nShortfalls as above:\n\n" + shortfall_table(rows, short)
        )
    return "".join(parts)


def picture(rows: list[Row], path: Path) -> None:
    """Every run of ours over its initial rate, and the tuned runs as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    problems = [name for name in PROBLEMS if select(rows, problem=name, method="alpha")]
    columns = 4
    figure, grid = plt.subplots(-(-len(problems) // columns), columns, figsize=(12, 5.5), squeeze=False)
    for axes in grid.flat[len(problems) :]:
        axes.set_axis_off()
    for axes, problem in zip(grid.flat, problems, strict=False):
        for index, base in enumerate(BASES):
            own = select(rows, problem=problem, base=base, method="alpha")
            tuned = select(rows, problem=problem, base=base, method="tuned")
            if own and len(tuned) == len(FRESH):
                axes.plot([r["lr"] for r in own], [r["test"] for r in own], ".", color=f"C{index}", label=base)
                axes.axhline(statistics.fmean(figures(tuned)), color=f"C{index}", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(problem, fontsize=9)
        axes.tick_params(labelsize=7)
    handles = [plt.Line2D([], [], marker=".", linestyle="-", color=f"C{k}", label=b) for k, b in enumerate(BASES)]
    figure.legend(handles=handles, loc="lower right", fontsize=8)
    figure.supxlabel("initial learning rate", fontsize=9)
    figure.supylabel("test accuracy in % or test loss; lines: tuned", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
