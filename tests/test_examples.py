"""What the README shows and calls."""

import importlib
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
    assert max(ends) - min(ends) < 5.0  # each is uncertain by 1.3 points, on 397 test samples
    assert re.search(r"AlphaScheduler\(.* CalibrateThenAnneal\(600 steps: holds \S+ since step", printed)
    assert re.search(r"iteration \d+: the rate climbed to \S+, the loss was lowest at a rate of \S+", printed)
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


@pytest.fixture
def shown(monkeypatch, tmp_path, capsys):
    """Runs a numbered example in an empty folder and returns what it prints."""
    pytest.importorskip("sklearn", reason="the examples' data come with scikit-learn, which is not installed")

    def run_example(name, *options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *options])
        with torch.random.fork_rng():
            importlib.import_module(f"examples.{name}").main()
        return capsys.readouterr().out

    return run_example


def test_example_1_tells_low_rates_from_a_good_one(shown):
    alphas, verdicts = zip(*re.findall(r"alpha (\S+) ±.*\n +(\w+):", shown("ex1_watch")), strict=True)
    low, middle, good = map(float, alphas)
    assert max(low, middle) < -0.3
    assert good > 0.0
    assert verdicts == ("undershooting", "undershooting", "balanced")


def test_example_2_ends_well_from_any_rate_and_says_how(shown):
    printed = shown("ex2_find_the_rate")
    accuracies = [float(value) for value in re.findall(r"test accuracy (\S+)%", printed)]
    assert len(accuracies) == 3
    assert min(accuracies) > 95.0
    assert len(re.findall(r"the best rate is", printed)) == 3


def test_example_3_finds_a_rate_and_leaves_nothing_behind(shown, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    printed = shown("ex3_range_test")
    assert 0.02 < float(re.search(r"learning rate (\S+):", printed).group(1)) < 3.0
    assert "parameters as before: True; the optimizer's rate is still 0.1" in printed
    assert (tmp_path / "out" / "range_test.png").is_file()


def test_example_4_measures_a_language_model_in_full(shown):
    printed = shown("ex4_language_model", "--steps", "120")
    losses = [float(value) for value in re.findall(r"held-out loss (\S+) \(full, 16 samples a batch\)", printed)]
    assert len(losses) == 3
    assert max(losses) < 3.5  # a bare run from 1e-6 is at 4.6


def test_example_5_resumes_bit_for_bit(shown):
    printed = shown("ex5_resume")
    assert "stopped at step 60: CalibrateThenAnneal(300 steps: searching" in printed
    assert "parameters of both are equal, bit for bit: True" in printed


def test_example_6_makes_a_page(shown, tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    assert "wrote out/run.html" in shown("ex6_report").replace("\\", "/")
    assert "</html>" in (tmp_path / "out" / "run.html").read_text()


def test_example_7_steers_by_policies_of_its_own(shown):
    printed = re.findall(r"(\w+): lr 3 -> (\S+), test accuracy (\S+)%", shown("ex7_own_policy"))
    assert [name for name, _, _ in printed] == ["careful", "Patient"]
    for _, rate, accuracy in printed:
        assert float(rate) < 1.0
        assert float(accuracy) > 90.0


def test_example_8_takes_slopes_from_a_backend_of_its_own(shown):
    """Against gradients of single samples by rules of layers, on the same steps."""
    from alpha_optim.slopes.choose import BACKENDS

    known = dict(BACKENDS)
    try:
        printed = shown("ex8_own_backend")
        assert "backend 'sample gradients', information full" in printed
        data, found = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), {}
        for name in ("sample gradients", "cached"):
            torch.manual_seed(1)
            model = nn.Linear(3, 2).double()
            sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            optimizer = AlphaGuided(sgd, model, backend=name, variance="exact")
            for _ in range(4):
                losses = model(data).pow(2).sum(1)
                optimizer.zero_grad()
                for param in model.parameters():
                    param.grad_sample = torch.stack(
                        [torch.autograd.grad(loss, param, retain_graph=True)[0] for loss in losses]
                    )
                optimizer.backward(losses)
                optimizer.step()
            found[name] = [(m.alpha, m.alpha_std) for m in optimizer.alpha_history]
        assert len(found["cached"]) == 3
        assert found["sample gradients"] == [pytest.approx(pair, rel=1e-9) for pair in found["cached"]]
    finally:
        BACKENDS.clear()
        BACKENDS.update(known)


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


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="one of the two is Muon, which torch has from 2.9 on")
@pytest.mark.parametrize("method", ["alpha", "tuned"])
def test_a_held_out_problem_with_two_optimizers_as_one(method):
    """Nodes of a graph; Muon and AdamW at one rate, which is searched, or decays."""
    from examples.benchmarks.rate_free import Case
    from examples.benchmarks.rate_free import run as study

    row = study(Case("graph, 150 nodes", method, "Muon + AdamW", 1e-6 if method == "alpha" else 3e-3, 1))
    assert row["finite"]
    assert row["test"] > 80.0 > row["before"]


def test_every_constant_whose_sensitivity_is_studied_is_there_and_can_be_changed():
    from examples.benchmarks.sensitivity import CONSTANTS, ROOT, SEARCH, changed

    for file, names in CONSTANTS.items():
        module = importlib.import_module(f"alpha_optim.policies.calibrate.{file}")
        source = (ROOT / SEARCH / f"{file}.py").read_text()
        for name in names:
            scope = {"__name__": f"alpha_optim.policies.calibrate.{file}"}
            exec(compile(changed(source, name, 2.0), file, "exec"), scope)
            assert scope[name] == 2 * getattr(module, name)
    with pytest.raises(ValueError, match="no constant NONSENSE"):
        changed(source, "NONSENSE", 2.0)
