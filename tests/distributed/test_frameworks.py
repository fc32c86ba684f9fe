"""Frameworks that start two processes: the loop stays as it is, and every rank has the same rates."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from tests.distributed.setups import needs_fsdp

ROOT = pathlib.Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
# On CPUs accelerate launches several processes with MPI only, or like this.
ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
)
ACCELERATE += ("--dynamo_backend=no", "--main_process_port=0")
CASES = {
    "lightning": (TORCHRUN, "lightning", 16),
    "accelerate": (ACCELERATE, "accelerate", 32),
    "trainer": (TORCHRUN, "transformers", 16),
}


def launched(command, folder, environment):
    """Run a launcher; again where gloo's threads have aborted the exit.

    On a busy machine they do so one time in ten, after everything is done, those of a script of bare torch as well.
    """
    for _ in range(4):
        result = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        if "terminate called without an active exception" not in result.stderr:
            break
    return result


@pytest.mark.compatibility("Process", "Lightning (ddp), accelerate launch, Trainer under torchrun: two processes")
@pytest.mark.parametrize("name", CASES)
def test_two_processes(name, tmp_path):
    launcher, package, samples = CASES[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    script = str(ROOT / "tests" / "distributed" / "framework_runs.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = launched([*launcher, script, name, str(tmp_path)], tmp_path, environment)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["rates"] == second["rates"]
    assert first["last"] == second["last"]
    assert first["alphas"] == second["alphas"]
    assert all(map(torch.equal, first["params"], second["params"]))
    assert first["iteration"] >= 110  # a batch may have been left out while the rate was searched
    assert len({rate for (rate, *_) in first["rates"]}) > 5
    assert first["information"] == ["full"]
    assert first["samples"] == [samples]
    assert not first["said"]
    assert not second["said"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("with_ddp", "information: full"),
        pytest.param("with_fsdp", "38 measured over both halves", marks=needs_fsdp),
    ],
)
def test_the_examples(name, said):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = launched([*TORCHRUN, "-m", f"examples.{name}", "--steps", "40"], ROOT, environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert said in result.stdout
    assert result.stdout.count("the same on all ranks: True") == 2
