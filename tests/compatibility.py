"""Writes docs/compatibility.md from the marks on the tests: ``python -m tests.compatibility``."""

import ast
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "compatibility.md"
AREAS = [
    "torch.optim",
    "Other packages",
    "Loops",
    "Precision",
    "Models",
    "Schedules",
    "torch.compile",
    "Lightning",
    "Accelerate",
    "Trainer",
    "Logging",
    "Resume",
    "Process",
    "find_lr",
    "GPU",
]
UNTESTED = [
    (
        "GPU",
        "several GPUs, accelerators other than CUDA's; recurrent layers under autocast (slopes only), dropout inside "
        "fused attention (simulated on a CPU)",
    ),
    ("Distributed", "NCCL, FSDP1, pipeline parallelism, expert parallelism, `torch.compile` around DDP"),
    ("Models", "ScriptModules (torch cannot hook them)"),
    ("Frameworks", "DeepSpeed, Fabric, Ignite, Keras"),
]
LICENSES = {
    "torch": "BSD-3-Clause",
    "backpack-for-pytorch": "MIT",
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "matplotlib": "PSF",
    "msgspec": "BSD-3-Clause",
    "plotext": "MIT",
    "plotly": "MIT",
    "rich": "MIT",
    "pandas": "BSD-3-Clause",
    "peft": "Apache-2.0",
    "transformers": "Apache-2.0",
    "accelerate": "Apache-2.0",
    "lightning": "Apache-2.0",
    "tensorboard": "Apache-2.0",
}
"""Of what is installed with the package and with the extras that users are told of."""
USERS = ("plots", "report", "dataframe", "peft", "integrations")
HEAD = """# What it works with

Written by `python -m tests.compatibility` from the marks on the tests; each row names the test that shows it.
*supported*: works as without alpha, and alpha is measured or the reason why not is said. *refused*: an error
that says what to do instead. Shown on a CPU with torch 2.13 and 2.14.1, Lightning 2.6, Accelerate 1.15 and
Transformers 5.24, the rows of a GPU on one H100 with torch 2.11; with torch 2.6, the oldest that is supported, the same
tests pass but for what that has not (Muon; `fully_shard` on CPUs, which are skipped).

| | what | | test |
|---|---|---|---|
"""

LICENSED = """
## Licenses

The package itself is under the MIT license. It needs torch, backpack-for-pytorch (which asks for torchvision,
BSD-3-Clause, and einops, MIT), numpy and scipy; the others come with extras that are named where they are used.

| package | license |
|---|---|
"""


class Row(NamedTuple):
    """A line of the table."""

    area: str
    thing: str
    status: str
    test: str


def rows():
    """Every marked test, in the order of the areas."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.compatibility":
                    area, thing, *status = (ast.literal_eval(argument) for argument in mark.args)
                    test = f"{path.relative_to(TESTS.parent)}::{node.name}"
                    found.append(Row(area, thing, status[0] if status else "supported", test))
    return sorted(found, key=lambda row: (AREAS.index(row.area), row.status != "supported"))


def document():
    """The whole text."""
    lines = [f"| {row.area} | {row.thing} | {row.status} | `{row.test}` |\n" for row in rows()]
    lines += [f"| {area} | {thing} | untested | |\n" for area, thing in UNTESTED]
    packages = [f"| {name} | {license} |\n" for name, license in LICENSES.items()]
    return HEAD + "".join(lines) + LICENSED + "".join(packages)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
