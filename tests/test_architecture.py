"""The drawing in docs/architecture.md, as a test."""

import ast
import pathlib
import subprocess
import sys

import pytest

import alpha_optim

ROOT = pathlib.Path(alpha_optim.__file__).parent
FOLDERS = [  # each folder or file at the root may import from those above it
    {"user_warning", "distributed"},
    {"alpha"},
    {"observe", "policies", "report"},
    {"slopes"},
    {"measure"},
    {"steer"},
    {"optimizer"},
    {"scheduler"},
    {"range_test"},
    {"integrations"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, folder in enumerate(FOLDERS) for name in folder}
PURE = ("alpha", "policies")
MODULES = sorted(ROOT.rglob("*.py"))


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_root_stays_small():
    entries = [entry for entry in ROOT.iterdir() if entry.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= 15


def parts_imported(path):
    return {name.split(".")[1] for name in imported(path) if name.startswith("alpha_optim.")} & set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_folders_above(path):
    here = part_of(path)
    assert here in RANK, f"{here} has no place in FOLDERS"
    for part in parts_imported(path) - {here}:
        assert RANK[part] < RANK[here], f"{here} must not import {part}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pure_parts_know_nothing_of_torch(path):
    if part_of(path) in PURE:
        assert not [name for name in imported(path) if name.split(".")[0] == "torch"]


def test_only_one_file_knows_torch_distributed():
    for path in MODULES:
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        found = {name for name in (*imported(path), *names) if name.startswith("torch.distributed")}
        assert not found or path.name == "distributed.py", (path, found)


def test_no_clock_is_read():
    """A clock that jumps, or another time zone, changes nothing: only the terminal view waits between two looks."""
    for path in MODULES:
        clocks = {name.split(".")[0] for name in imported(path)} & {"time", "datetime", "locale", "calendar"}
        assert not clocks or path.name == "terminal.py", path


RECORDS = ("columns", "row", "metrics")
"""What holds rates that were, not those that will be."""


def writes_a_rate(node):
    """Whether a statement sets an entry "lr", or changes a tensor that is one in place."""
    if isinstance(node, (ast.Assign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
        targets = [node.func.value]
    else:
        return False
    places = [target for target in targets if isinstance(target, ast.Subscript)]
    places = [place for place in places if ast.unparse(place.value) not in RECORDS]
    return any(isinstance(place.slice, ast.Constant) and place.slice.value == "lr" for place in places)


def test_only_the_scheduler_writes_learning_rates():
    writers = {path.name for path in MODULES for node in ast.walk(ast.parse(path.read_text())) if writes_a_rate(node)}
    assert writers == {"scheduler.py"}


@pytest.mark.parametrize("line", ['g["lr"] = 1', 'group["lr"].fill_(1)', 'g["lr"] *= 2', 'g["lr"].mul_(2)'])
def test_every_way_of_writing_a_rate_is_seen(line):
    assert any(map(writes_a_rate, ast.walk(ast.parse(line))))


def test_importing_the_package_stays_light():
    heavy = [
        "matplotlib",
        "backpack",
        "pandas",
        "scipy.special",
        "torchvision",
        "cockpit",
        "tensorboard",
        "lightning",
        "plotly",
        "plotext",
        "rich",
    ]
    code = f"import sys, alpha_optim; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_all_is_exact_and_sorted():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    seen = {  # by type checkers
        alias.name: node.module.removeprefix("alpha_optim.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("alpha_optim.")
        for alias in node.names
    }
    assert seen == alpha_optim._HOME
    assert set(alpha_optim.__all__) == {*seen, "__version__"} <= set(dir(alpha_optim))
    assert alpha_optim.__all__ == sorted(alpha_optim.__all__)
    for name in seen:
        value = getattr(alpha_optim, name)
        assert value.__name__ == name
        assert value.__module__.startswith("alpha_optim."), name
    with pytest.raises(AttributeError, match="no attribute 'AlphaGuide'"):
        _ = alpha_optim.AlphaGuide


@pytest.mark.parametrize("command", ["report", "diagnose", "compare", "watch"])
def test_files_of_runs_are_looked_at_without_torch(command, tmp_path):
    """Importing torch takes longer than the rest of a report."""
    history = alpha_optim.AlphaHistory()
    ends = alpha_optim.Observation(8, -1.0, 0.1, 2.0, 0.5), alpha_optim.Observation(8, 0.2, 0.1, 1.9, 0.5)
    for iteration in range(50):
        history.append(alpha_optim.measure_alpha(iteration, 0.1, *ends, (0.1,)))
    history.save(tmp_path / "run.jsonl")
    options = {"report": ["-o", str(tmp_path / "page.html")], "watch": ["--once"]}.get(command, [])
    arguments = [command, str(tmp_path / "run.jsonl"), *options]
    code = f"""
import sys
from alpha_optim.report.command_line import main
status = main({arguments!r})
print("torch" in sys.modules, status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 0", done


def test_oracles_do_not_import_the_package():
    for path in (pathlib.Path(__file__).parent / "reference").glob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "alpha_optim"], path


def test_the_changelog_knows_the_version():
    changelog = (pathlib.Path(__file__).parent.parent / "CHANGELOG.md").read_text()
    assert f"## {alpha_optim.__version__}" in changelog
