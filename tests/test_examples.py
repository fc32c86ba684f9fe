"""What the README shows and calls."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

ROOT = pathlib.Path(__file__).parent.parent


def run(*command):
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, check=False
    )


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


@pytest.mark.parametrize("path", [*ROOT.glob("docs/*.md"), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_in_the_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target
