"""What the README shows and calls."""

import math
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler

ROOT = pathlib.Path(__file__).parent.parent


def run(*command):
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_readmes_code_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(256, 6), torch.randint(0, 3, (256,)))
    names = {
        "make_model": lambda: nn.Linear(6, 3),
        "loader": torch.utils.data.DataLoader(data, batch_size=32),
        "epochs": 2,
    }
    exec(code, names)
    assert len(names["optimizer"].alpha_history) == 15
    assert "over 15 steps" in capsys.readouterr().out


def test_the_readmes_language_model_runs():
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    torch.manual_seed(0)
    x = torch.randint(0, 32, (12, 8))
    names = {
        "torch": torch,
        "transformers": transformers,
        "config": transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
        "AlphaGuided": AlphaGuided,
        "AlphaScheduler": AlphaScheduler,
        "loader": [{"input_ids": x, "labels": x}] * 20,
        "epochs": 2,
    }
    exec(code, names)
    assert {m.information for m in names["optimizer"].alpha_history} == {"full"}


def test_the_tutorial_runs_as_it_stands(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec("\n".join(code), {})
    printed = capsys.readouterr().out
    low, middle, good = (float(value) for value in re.findall(r"lr .*: alpha (\S+) ±", printed))
    assert low < -0.2
    assert middle < -0.2
    assert 0.0 < good < 1.0
    ends = [float(value) for value in re.findall(r"from .*: accuracy (\S+) %", printed)]
    assert len(ends) == 3
    assert min(ends) > 88.0
    assert max(ends) - min(ends) < 3.0
    assert re.search(r"AlphaScheduler\(.* CalibrateThenAnneal\(600 steps: holds \S+ since step", printed)
    assert re.search(r"iteration \d+: the rate climbed to \S+, the loss was lowest at \S+", printed)
    assert len(re.findall(r"iteration \d+: trial of \d+ steps at", printed)) >= 2
    assert "resumed at step 300 with 299 measurements" in printed
    assert (tmp_path / "run.png").is_file()


def test_the_demo_trains_and_saves_a_picture(tmp_path):
    done = run("examples.demo", "--steps", "60", "--out", str(tmp_path / "demo.png"))
    assert done.returncode == 0, done.stderr
    assert "initial rate     bare  with alpha" in done.stdout
    assert (tmp_path / "demo.png").is_file()


def test_the_demo_refuses_a_folder_that_is_not_there():
    done = run("examples.demo", "--data", "/no/such/folder")
    assert done.returncode != 0
    assert "--data /no/such/folder: no such folder" in done.stderr


def test_the_cost_benchmark_starts():
    done = run("examples.benchmarks.cost", "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("example", "options", "package"),
    [
        ("with_lightning", ["--epochs", "2"], "lightning"),
        ("with_accelerate", ["--epochs", "2", "--accumulate", "2"], "accelerate"),
        ("with_trainer", ["--steps", "12"], "transformers"),
    ],
)
def test_the_examples_of_frameworks_run(example, options, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    done = run(f"examples.{example}", *options)
    assert done.returncode == 0, done.stderr
    assert "alpha = " in done.stdout


def test_a_run_of_the_study_from_an_absurd_rate_ends_where_a_good_one_does():
    from examples.benchmarks.rate_free import Case
    from examples.benchmarks.rate_free import run as study

    found = study(Case("digits MLP", "alpha", "momentum", 1e-6, 0))
    tuned = study(Case("digits MLP", "tuned", "momentum", 0.2, 0))
    assert found["finite"]
    assert found["test"] > tuned["test"] - 1.5
    assert found["lr"] < 1e-4 * found["found"]


def test_the_study_times_whole_runs_in_turn():
    from examples.benchmarks.rate_free import Case
    from examples.benchmarks.rate_free import run as study

    row = study(Case("regression", "time", "SGD", 0.1, 0))
    assert row["ratio"] > 0.0
    assert row["method"] == "time"


def test_the_study_takes_the_best_rate_on_the_validation_split_and_tells_what_diverged():
    from examples.benchmarks.rate_free import best_of_grid
    from examples.benchmarks.rate_report import alpha_table, diverged

    def row(method, lr, validation, test, seed=0, finite=True):
        names = {"problem": "digits MLP", "base": "SGD", "method": method, "lr": lr, "seed": seed}
        return {
            **names,
            "validation": validation,
            "test": test,
            "before": 10.0,
            "finite": finite,
            "found": lr,
        }

    grid = [
        row("grid", 0.1, 95.0, 99.0),
        row("grid", 0.3, 96.0, 90.0),
        row("grid", 1.0, math.nan, 10.0, finite=False),
    ]
    assert best_of_grid("digits MLP", "SGD", grid) == 0.3
    assert [diverged(one) for one in grid] == [False, False, True]
    runs = [row("tuned", 0.3, 0.0, 95.0, seed) for seed in range(3)]
    runs += [row("time", 0.3, 0.0, 0.0) | {"ratio": 1.25}]
    runs += [row("alpha", rate, 0.0, 94.6, seed) for rate in (1e-6, 1.0) for seed in range(3)]
    table = alpha_table([*grid, *runs], ["digits MLP"])
    assert "| digits MLP, SGD | 95.0, 95.0 (0.3) |  | – | 94.6, 94.6 |  | 6 |" in table
    assert table.rstrip().endswith("| 0 | 1.25 | worst, – |")
    runs += [row("alpha", 1.0, 0.0, 94.0, seed=3), row("tuned further", 0.3, 0.0, 94.2, seed=3)]
    table = alpha_table([*grid, *runs], ["digits MLP"])
    assert "| digits MLP, SGD | 95.0, 95.0 (0.3) | 94.2 | – | 94.6, 94.0 |  | 7 |" in table
    assert table.rstrip().endswith("| 0 | 1.25 | (worst), – |")
