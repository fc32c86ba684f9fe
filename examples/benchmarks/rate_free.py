"""Can a run do without a search for its learning rate? Alpha from absurd rates against tuned and other methods.

For every problem and base optimizer: `AlphaScheduler(total_steps=...)`, with `every=None`, from five initial
rates and three seeds; "tuned", the best of a grid of rates with linear decay (constant for Schedule-Free),
chosen on a validation split and run again on three fresh seeds; "guessed", the middle of that grid; and methods
that set their own rate. Every run is one line in the results, and what is there is not run again: stop it
whenever you like.

    python -m examples.benchmarks.rate_free --quick     # three small problems, under three minutes, not kept
    python -m examples.benchmarks.rate_free --core      # all problems, most bases, a seed per rate; an hour on 2 cores
    python -m examples.benchmarks.rate_free             # everything, over several runs
    python -m examples.benchmarks.rate_free --further   # and tuned rates on 15 seeds instead of three
    python -m examples.benchmarks.rate_free --unseen    # three problems on which hardly anything was tuned
    python -m examples.benchmarks.rate_free --held-out  # five on which nothing was: VAE, ResNet, graph, GPT, ViT
    python -m examples.benchmarks.rate_free --later    # five that people asked about: two GPTs, cosines, ...
    python -m examples.benchmarks.rate_free --short     # runs of 300 and 400 steps; a quarter of an hour on 2 cores
    python -m examples.benchmarks.report                # docs/benchmarks.md from what was kept

The other methods come with ``pip install '.[benchmarks]'``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from tqdm import tqdm

from alpha_optim import AlphaGuided, AlphaScheduler, CalibrateThenAnneal
from examples.benchmarks.held_out import HELD_OUT, LATER
from examples.benchmarks.peers import PEERS, Setting, package
from examples.benchmarks.problems import PROBLEMS, SHORT, UNSEEN, Problem

RESULTS = Path(__file__).parent / "results" / "rates.jsonl"
STUDIED = {**PROBLEMS, **UNSEEN}
"""Problems that are run with an open end and timed as well."""
ALL = {**STUDIED, **HELD_OUT, **LATER, **SHORT}
INITIAL = (1e-6, 1e-4, 1e-2, 1.0, 100.0)
SEEDS, FRESH, GRID_SEED = (0, 1, 2), (20, 21, 22), 10
FURTHER = tuple(range(23, 35))
"""Seeds that give tuned as many runs as there are of ours."""
OTHERS = 1000
"""Added to the seed of a run: the mini-batches that a method may look at beside those of the run."""
OPEN, SHORTEST_WANTED, COOLS = "alpha, open end", 400, 0.2
"""Alpha where the horizon is not known: the search is that of a run of so many steps, and the last share cools down."""
IN_TURN = 20
"""Steps with and without alpha take turns, so many at a time, where time is measured."""
ROOT_TEN = math.sqrt(10.0)


class Base(NamedTuple):
    """A base optimizer, and the middle of its grid of rates."""

    build: Callable[[nn.Module, float], torch.optim.Optimizer | list[torch.optim.Optimizer]]
    middle: float
    constant: bool = False

    def grid(self) -> list[float]:
        """Nine rates, a factor of the root of ten apart."""
        return [float(f"{self.middle * ROOT_TEN**power:.2g}") for power in range(-4, 5)]


def muon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices between the first and the last layer, at AdamW's scale; AdamW for the rest."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = {layer.weight for layer in layers[:-1]}
    rest = [param for param in model.parameters() if param not in matrices]
    of_matrices = torch.optim.Muon(
        [param for param in model.parameters() if param in matrices], lr=lr, adjust_lr_fn="match_rms_adamw"
    )
    return [of_matrices, torch.optim.AdamW(rest, lr=lr)]


def free(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """A Schedule-Free optimizer."""
    optimizer: torch.optim.Optimizer = package("schedulefree", name)(model.parameters(), lr=lr)
    return optimizer


BASES = {
    "SGD": Base(lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr), 0.1),
    "momentum": Base(lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9), 0.03),
    "Adam": Base(lambda m, lr: torch.optim.Adam(m.parameters(), lr=lr), 1e-3),
    "AdamW": Base(lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr), 1e-3),
    "Muon + AdamW": Base(muon, 1e-3),
    "Schedule-Free SGD": Base(lambda m, lr: free("SGDScheduleFree", m, lr), 1.0, True),
    "Schedule-Free AdamW": Base(lambda m, lr: free("AdamWScheduleFree", m, lr), 3e-3, True),
}
STANDARD = [name for name in BASES if name != "Muon + AdamW"]
"""Bases that are tried where a problem does not say which."""


class Case(NamedTuple):
    """One run: ``method`` is "alpha", `OPEN`, "grid", "tuned", "tuned further", "guessed", "time" or a peer's name."""

    problem: str
    method: str
    base: str
    lr: float
    seed: int


def run(case: Case) -> dict[str, Any]:
    """Train once.

    Returns:
        The case, test and validation figures (accuracy in % or loss), the test figure before training, the
        highest rate after the calibration (where there is one), steps taken back, whether all is finite.
        For "time" the case and a ratio, see `timed`.
    """
    torch.set_num_threads(1)
    problem = ALL[case.problem]
    if case.method == "time":
        return {**case._asdict(), "ratio": timed(case)}
    model, optimizer, steps = training(case)
    before = figure(problem, model, problem.data().test)
    found = 0.0
    for settled in steps:
        found = max(found, float(optimizer.param_groups[0]["lr"])) if settled else 0.0
    _mode(optimizer, "eval")
    finite = all(bool(torch.isfinite(value.to_dense()).all()) for value in model.state_dict().values())
    return {
        **case._asdict(),
        "test": figure(problem, model, problem.data().test),
        "validation": figure(problem, model, problem.data().validation),
        "before": before,
        "found": found,
        "taken_back": len(optimizer.guard_events) if isinstance(optimizer, AlphaGuided) else 0,
        "finite": finite,
    }


def timed(case: Case) -> float:
    """Time of a whole run of ours as a multiple of one at the tuned rate, a few steps of each in turn."""
    runs = training(case._replace(method="tuned")), training(case._replace(method="alpha", lr=INITIAL[0]))
    plain = ours = 0.0
    for _ in range(0, ALL[case.problem].steps, IN_TURN):
        plain += _seconds(runs[0][2])
        ours += _seconds(runs[1][2])
    return ours / plain


def _seconds(steps: Iterator[bool]) -> float:
    """Time of the next few steps."""
    begin = time.perf_counter()
    for _ in itertools.islice(steps, IN_TURN):
        pass
    return time.perf_counter() - begin


def training(case: Case) -> tuple[nn.Module, torch.optim.Optimizer, Iterator[bool]]:
    """Model, optimizer, and the steps of a run; each says whether its rate is found."""
    problem = ALL[case.problem]
    torch.manual_seed(case.seed)
    model, loss_fn = problem.build(), problem.loss_fn()
    optimizer, after_step, settled = prepare(case, problem, model, loss_fn)

    def steps() -> Iterator[bool]:
        _mode(optimizer, "train")
        for step, (x, y) in enumerate(batches(problem, case.seed)):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y) if problem.loss is None else problem.loss(model, x, y)
            if loss.dim() and isinstance(optimizer, AlphaGuided):
                optimizer.backward(loss)
            else:
                loss.mean().backward()
            if problem.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), problem.clip)
            optimizer.step(**({"loss": loss.detach()} if case.method == "MoMo" else {}))
            after_step(step)
            yield settled()

    return model, optimizer, steps()


def prepare(
    case: Case, problem: Problem, model: nn.Module, loss_fn: nn.Module
) -> tuple[torch.optim.Optimizer, Callable[[int], object], Callable[[], bool]]:
    """The optimizer of a case, what is done after every step, and whether its rate is found."""
    if case.method in PEERS:
        peer = PEERS[case.method]
        others = batches(problem, case.seed + OTHERS)
        optimizer = peer.build(Setting(model, loss_fn, problem.steps, others))
        if case.method == "ReduceLROnPlateau":
            return optimizer, watch_plateau(problem, model, loss_fn, optimizer), always
        schedule = None if peer.schedule is None else peer.schedule(optimizer, problem.steps)
        return optimizer, lambda step: schedule.step() if schedule is not None else None, always
    base = BASES[case.base]
    optimizer: Any = base.build(model, case.lr)
    if case.method in ("alpha", OPEN):
        known = case.method == "alpha"
        guided = AlphaGuided(optimizer, model, loss_fn if problem.loss is None else None, every=None)
        policy = CalibrateThenAnneal(problem.steps if known else SHORTEST_WANTED, anneal=known and not base.constant)
        steered, cooling = AlphaScheduler(guided, policy), 0 if known else round(COOLS * problem.steps)

        def after_step(step: int) -> None:
            steered.step()
            if cooling and step + 1 == problem.steps - cooling:
                steered.cool_down(cooling)

        return guided, after_step, lambda: policy.calibrated
    share = (lambda n: 1.0) if base.constant else (lambda n: max(0.0, 1.0 - n / problem.steps))
    if isinstance(optimizer, list):
        optimizer = AlphaGuided(optimizer, model)  # several as one
        optimizer.detach()
    decay = LambdaLR(optimizer, share)
    return optimizer, lambda step: decay.step(), always


def always() -> bool:
    return True


def watch_plateau(
    problem: Problem, model: nn.Module, loss_fn: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[int], object]:
    """Ten times a run the validation loss goes to ReduceLROnPlateau."""
    plateau = ReduceLROnPlateau(optimizer, factor=0.3, patience=1)
    x, y = problem.data().validation

    def after_step(step: int) -> None:
        if (step + 1) % max(1, problem.steps // 10) == 0:
            with torch.no_grad():
                plateau.step(float(loss_fn(model(x[:2000]), y[:2000])))

    return after_step


def batches(problem: Problem, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """As many shuffled mini-batches as the run has steps, epoch after epoch."""
    x, y = problem.data().train
    generator = torch.Generator().manual_seed(seed)
    left = problem.steps
    while left > 0:
        order = torch.randperm(len(y), generator=generator)
        for begin in range(0, len(order) - problem.batch + 1, problem.batch):
            if left == 0:
                return
            left -= 1
            index = order[begin : begin + problem.batch]
            yield x[index], y[index]


@torch.no_grad()
def figure(problem: Problem, model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Accuracy in %, or mean loss, in evaluation mode."""
    x, y = part
    model.eval()
    total = 0.0
    for begin in range(0, len(y), 1000):
        part, target = x[begin : begin + 1000], y[begin : begin + 1000]
        if problem.loss is not None and not problem.accuracy:
            total += float(problem.loss(model, part, target).mean()) * len(target)
            continue
        output = model(part)
        if problem.accuracy:
            total += float((getattr(output, "logits", output).argmax(1) == target).sum())
        else:
            total += float(problem.loss_fn()(output, target)) * len(target)
    model.train()
    return (100.0 if problem.accuracy else 1.0) * total / len(y)


def _mode(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Schedule-Free has one mode for training and one for evaluation."""
    switch = getattr(optimizer, name, None)
    if switch is not None:
        switch()


# ---------------------------------------------------------------- which runs


def first_cases(
    problems: Iterable[str],
    bases: Iterable[str],
    initial: Iterable[float],
    seeds: Iterable[int],
    peers: bool,
    one_seed: bool = False,
) -> list[Case]:
    """Ours, with every seed from every initial rate or with one of them in turn, the grids, the peers."""
    cases = []
    for problem, base in itertools.product(problems, bases):
        if base not in (ALL[problem].bases or STANDARD):
            continue
        cases += [Case(problem, "grid", base, lr, GRID_SEED) for lr in BASES[base].grid()]
        each = zip(initial, itertools.cycle(seeds), strict=False) if one_seed else itertools.product(initial, seeds)
        each = list(each)
        cases += [Case(problem, "alpha", base, lr, seed) for lr, seed in each]
        if base == "AdamW" and problem in STUDIED:
            cases += [Case(problem, OPEN, base, lr, seed) for lr, seed in each]
    if peers:
        each_peer = [(problem, peer) for problem in problems for peer in ALL[problem].peers or PEERS]
        cases += [Case(problem, peer, "", 0.0, seed) for problem, peer in each_peer for seed in SEEDS]
    return cases


def second_cases(
    problems: Iterable[str], bases: Iterable[str], rows: list[dict[str, Any]], further: bool
) -> list[Case]:
    """The best rate of each grid, also on further seeds if wanted, its middle, and the time."""
    cases = []
    for problem, base in itertools.product(problems, bases):
        best = best_of_grid(problem, base, rows)
        if best is not None:
            cases += [Case(problem, "tuned", base, best, seed) for seed in FRESH]
            if problem not in SHORT:
                cases += [Case(problem, "guessed", base, BASES[base].middle, seed) for seed in FRESH]
            if problem in STUDIED:
                cases += [Case(problem, "time", base, best, FRESH[0])]
            cases += [Case(problem, "tuned further", base, best, seed) for seed in FURTHER if further]
    return cases


def best_of_grid(problem: str, base: str, rows: list[dict[str, Any]]) -> float | None:
    """The rate with the best validation figure."""
    grid = [row for row in rows if (row["problem"], row["base"], row["method"]) == (problem, base, "grid")]
    grid = [row for row in grid if row["finite"] and math.isfinite(row["validation"])]
    if not grid:
        return None
    sign = -1.0 if ALL[problem].accuracy else 1.0
    return float(min(grid, key=lambda row: sign * row["validation"])["lr"])


def kept() -> list[dict[str, Any]]:
    """Results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def work(cases: list[Case], jobs: int, keep: bool, rows: list[dict[str, Any]]) -> None:
    """Run what is not there yet; every result is kept as soon as it is known."""
    done = {tuple(row[name] for name in Case._fields) for row in rows}
    waiting = [case for case in cases if tuple(case) not in done]
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, initializer=warnings.simplefilter, initargs=("ignore",)) as pool:
        found = pool.imap_unordered(run, waiting)
        for row in tqdm(found, total=len(waiting), desc="runs", disable=None):
            rows.append(row)
            if keep:
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three small problems; nothing is kept")
    size.add_argument("--core", action="store_true", help="all problems, most bases, one seed for each initial rate")
    size.add_argument("--unseen", action="store_true", help="three problems on which hardly anything was tuned")
    size.add_argument("--held-out", action="store_true", help="five problems on which nothing was tuned")
    size.add_argument("--later", action="store_true", help="five problems that people asked about")
    size.add_argument("--short", action="store_true", help="runs of 300 and 400 steps, without other methods")
    parser.add_argument("--problems", nargs="+", choices=list(ALL), help="only these")
    parser.add_argument("--bases", nargs="+", choices=list(BASES), help="only these")
    parser.add_argument("--further", action="store_true", help="tuned rates on as many seeds as ours have runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    problems, bases, initial, seeds = list(PROBLEMS), list(BASES), INITIAL, SEEDS
    if args.unseen or args.held_out:
        problems = list(UNSEEN if args.unseen else HELD_OUT)
    if args.later or args.short:
        problems = list(LATER if args.later else SHORT)
    if args.quick:
        problems, bases = ["digits MLP", "regression", "noisy quadratic"], ["SGD", "momentum", "Adam"]
        initial, seeds = (1e-6, 1e-2, 100.0), (0,)
    if args.core:
        bases = ["SGD", "momentum", "AdamW", "Schedule-Free AdamW"]
    problems, bases = args.problems or problems, args.bases or bases
    rows = [] if args.quick else kept()
    one_seed = args.core or args.unseen or args.held_out or args.later or args.short
    peers = not (args.quick or args.short)
    work(first_cases(problems, bases, initial, seeds, peers, one_seed), args.jobs, not args.quick, rows)
    work(second_cases(problems, bases, rows, args.further), args.jobs, not args.quick, rows)
    from examples.benchmarks.rate_report import summary

    print(summary(rows))


if __name__ == "__main__":
    main()
