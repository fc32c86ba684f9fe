"""What an installed package has to do, in an environment of its own; run by `make dist` from another folder.

python installed.py FOLDER      # FOLDER: where the sources are, which must not be what is imported
"""

import importlib.metadata
import importlib.resources
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import alpha_optim
from alpha_optim import AlphaGuided, AlphaScheduler


def main(sources):
    where = Path(alpha_optim.__file__).resolve()
    assert Path(sources).resolve() not in where.parents, f"{where} is not installed"
    assert importlib.metadata.version("alpha-optim") == alpha_optim.__version__
    assert importlib.resources.files("alpha_optim").joinpath("py.typed").is_file()
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), nn.CrossEntropyLoss()
    optimizer = AlphaGuided(torch.optim.SGD(model.parameters(), lr=1e-6), model, loss_fn)  # BackPACK's fast path
    scheduler = AlphaScheduler(optimizer, total_steps=200)
    first = last = 0.0
    for n in range(200):
        x = torch.randn(32, 6)
        loss = loss_fn(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        first, last = (loss.item(), last) if n == 0 else (first, loss.item())
    assert last < 0.7 * first, (first, last)
    assert {m.information for m in optimizer.alpha_history} == {"full"}
    optimizer.alpha_history.save("run.jsonl")
    script = Path(sys.executable).with_name("alpha-optim")
    said = subprocess.run([script, "diagnose", "run.jsonl"], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    optional = ("matplotlib", "pandas", "plotly", "rich", "lightning", "transformers", "sklearn")
    assert not [name for name in optional if name in sys.modules]
    print(f"alpha-optim {alpha_optim.__version__} with torch {torch.__version__}, installed in {where.parent}: works")


if __name__ == "__main__":
    main(sys.argv[1])
