"""Markdown tables and raw results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


KEYS = ("data", "model", "optimizer", "base", "batch", "variant")
"""What makes a case, where nothing else is said."""


def load(name: str, keys: tuple[str, ...] = KEYS) -> list[dict[str, Any]]:
    """Read a file of raw results; of several of one case the last counts."""
    path = RESULTS / name
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({tuple(str(row.get(key)) for key in keys): row for row in rows}.values())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
