"""The documentation: its code runs, its links lead somewhere, the site builds without a warning."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import alpha_optim
from alpha_optim import AlphaGuided, AlphaScheduler
from alpha_optim.alpha.records import DropReason
from tests import today
from tests.browser import in_a_browser, photograph

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"


def parts(path):
    """Pairs of a section's title and the code in it, joined."""
    sections = re.split(r"^## ", (DOCS / path).read_text(), flags=re.MULTILINE)
    found = [(text.partition("\n")[0], re.findall(r"```python\n(.*?)```", text, re.DOTALL)) for text in sections]
    return [(title, "\n".join(code)) for title, code in found if code]


PAGES = sorted(path.name for path in DOCS.glob("*.md") if parts(path.name) and path.name != "tutorial.md")
"""All with code; the tutorial has a test of its own."""


def make_model():
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))


def surroundings(folder):
    """What a reader of the pages has: a model, data, a loop."""
    x = torch.randn(320, 10)
    y = (x @ torch.randn(10, 3)).argmax(1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)
    loss_fn = nn.CrossEntropyLoss()

    def train(model, optimizer, scheduler, steps):
        made = 0
        while made < steps:
            for inputs, targets in loader:
                if made == steps:
                    return
                made += 1
                optimizer.zero_grad()
                loss_fn(model(inputs), targets).backward()
                optimizer.step()
                scheduler.step()

    sequences = torch.randint(0, today.V, (40, 8, today.T + 1))
    return {
        "torch": torch, "nn": nn, "F": nn.functional, "AlphaGuided": AlphaGuided, "AlphaScheduler": AlphaScheduler,
        "make_model": make_model, "model": make_model(), "loss_fn": loss_fn, "loader": loader, "batch_size": 16,
        "epochs": 6, "train": train, "device": "cpu", "folder": str(folder),
        "gpt": today.GPT(dropout=0.1), "tokens": [(batch[:, :-1], batch[:, 1:]) for batch in sequences],
        "vae": today.VAE(), "generator": nn.Linear(4, 10), "critic": nn.Linear(10, 1),
        "ones": torch.ones(16, 1), "zeros": torch.zeros(16, 1), "steps": 100,
        "DistributedDataParallel": lambda model: model,  # a process alone
    }  # fmt: skip


def bert_and_sentences():
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    x = torch.randint(0, 32, (64, 8))
    sentences = [{"input_ids": row, "labels": int(row[0]) % 3} for row in x]
    return {"bert": transformers.BertForSequenceClassification(config), "sentences": sentences}


@pytest.mark.parametrize(
    ("page", "title"),
    [pytest.param(page, title, id=f"{page}-{title}") for page in PAGES for title, _ in parts(page)],
)
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # the Trainer's, on a machine without a GPU
@pytest.mark.filterwarnings("error::UserWarning")
def test_the_code_on_a_page_runs_without_a_warning(page, title, tmp_path, monkeypatch, capsys):
    code = dict(parts(page))[title]
    for package in ("transformers", "schedulefree", "lightning"):
        if package in code:
            pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = surroundings(tmp_path)
        if page == "reliability.md":
            names["optimizer"] = AlphaGuided(torch.optim.SGD(names["model"].parameters(), lr=0.1), names["model"])
            names["average"] = torch.optim.swa_utils.AveragedModel(names["model"])
        if "bert" in code:
            names |= bert_and_sentences()
        exec(code, names)
        optimizer = names.get("optimizer")
        if optimizer is not None and len(optimizer.alpha_history):
            assert optimizer.alpha_history[-1].information in ("full", "slopes+variances")
        if "finding" in names:
            assert capsys.readouterr().out.startswith("learning rate ")  # found by the first of them, which is printed
            assert len(names["finding"].history) > 20  # the last of them: a small BERT that hardly learns in a test


@pytest.mark.parametrize("path", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda path: path.name)
def test_formulas_are_readable_without_a_renderer(path):
    """The site loads nothing from elsewhere, so there is nothing that would set LaTeX."""
    assert not re.findall(r"\$\$|\$\\|\\frac", path.read_text())


@pytest.mark.parametrize("reason", DropReason)
def test_every_reason_for_a_pair_that_is_not_measured_is_explained(reason):
    assert re.search(rf"^\|.*`{reason}`.*\| \w", (DOCS / "reading.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_in_the_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    return folder


@in_a_browser
@pytest.mark.parametrize("page", ["index", "tutorial", "api"])
def test_the_site_can_be_photographed(site, page, tmp_path):
    pixels = photograph(site / f"{page}.html", tmp_path / f"{page}.png", 1200, 1000)
    assert len({tuple(colour) for colour in (pixels[::7, ::7] * 255).astype(int).reshape(-1, 3)}) > 20
    assert 0.01 < (pixels.min(axis=2) < 0.5).mean() < 0.5


def test_the_site_loads_nothing_and_has_every_name(site):
    reference = (site / "api.html").read_text()
    for name in alpha_optim.__all__:
        if not name.startswith("_"):
            assert f'id="alpha_optim.{name}"' in reference, name
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', reference)
    assert loaded == [], "the pages load something from elsewhere"


def test_the_reference_lists_every_name_with_the_words_of_its_docstring():
    listed = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", (DOCS / "api.md").read_text(), re.M))
    names = [name for name in alpha_optim.__all__ if not name.startswith("__")]
    assert listed == {n: inspect.getdoc(getattr(alpha_optim, n)).splitlines()[0].replace("``", "`") for n in names}
