"""How long a page of a long run takes: `python -m alpha_optim report`, against reading the lines with `json`.

python -m examples.benchmarks.long_file                    # a million measurements, about half a GB for a minute
python -m examples.benchmarks.long_file --measurements 100000
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alpha_optim import AlphaHistory, Observation, measure_alpha


def write(path: Path, count: int) -> None:
    """A file of so many measurements; every loss and slope is its own, as in a run."""
    draw = random.Random(0).gauss
    history = AlphaHistory(maxlen=count)
    for iteration in range(count):
        height = 2.0 * math.exp(-2.0 * iteration / count)
        start = Observation(32, -abs(draw(1.0, 0.2)), 0.1, height + draw(0.0, 0.05), 0.5)
        end = Observation(32, draw(0.1, 0.3), 0.1, height + draw(0.0, 0.05), 0.5)
        history.append(measure_alpha(iteration, 0.1, start, end, (0.1 * (1.0 - iteration / count),)))
    history.save(path)


def seconds_of_page(path: Path, page: Path) -> float:
    """Time of the whole command, from its start to its end."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "alpha_optim", "report", str(path), "-o", str(page)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def peak_of_page(path: Path, page: Path) -> float:
    """Peak memory of the command, in bytes (Linux)."""
    code = """
import sys
from pathlib import Path
from alpha_optim.report.command_line import main
main(["report", *sys.argv[1:]])
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    command = [sys.executable, "-c", code, str(path), "-o", str(page)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return 1024.0 * int(done.stdout.split()[-1])


def seconds_of_json(path: Path) -> float:
    """Time of reading every line, and nothing else."""
    begin = time.perf_counter()
    with path.open("rb") as file:
        for line in file:
            json.loads(line)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", type=int, default=1_000_000)
    count = parser.parse_args().measurements
    with tempfile.TemporaryDirectory() as folder:
        path, page = Path(folder) / "run.jsonl", Path(folder) / "report.html"
        write(path, count)
        plain, made = seconds_of_json(path), min(seconds_of_page(path, page) for _ in range(3))
        peak = peak_of_page(path, page)
        sizes = f"{os.path.getsize(path) / 1e6:,.0f} MB, page of {os.path.getsize(page) / 1e6:.1f} MB"
    print(f"{count:,} measurements, {sizes}")
    print(f"page in {made:.1f} s, {made / plain:.2f} of the {plain:.1f} s that reading the lines with json takes")
    print(f"peak memory {peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
