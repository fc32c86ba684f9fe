"""Kill -9 at a random step, resume in a new process: the rest is bit for bit the uninterrupted run."""

import os
import random
import subprocess
import sys
import uuid
import zlib

import pytest

STEPS = 40
CASES = [
    ("sgd", "backpack", "fp32"),
    ("sgd", "layerwise", "fp16"),
    ("sgd", "cached", "fp32"),
    ("momentum", "layerwise", "fp32"),
    ("momentum", "layerwise", "fp16"),
    ("momentum", "gradients", "fp32"),
    ("adamw", "layerwise", "fp32"),
    ("adamw", "layerwise", "bf16"),
    ("adamw", "cached", "fp32"),
    ("adamw", "gradients", "fp16"),
]


def start(folder, case, **environment):
    command = [sys.executable, "-W", "ignore", "-m", "tests.killed_run", str(folder), *case, str(STEPS)]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def start_two(folder, case):
    """Two processes that train one model; the first one writes the result."""
    store = str(folder / f"store-{uuid.uuid4()}")  # gloo would look for the addresses of those that were killed
    return [start(folder, case, RANK=str(rank), WORLD_SIZE="2", STORE=store) for rank in (0, 1)]


@pytest.mark.compatibility("Resume", "kill -9 and a new process, with and without AMP, each backend: bit for bit")
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_killed_run_resumes_bit_for_bit(case, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    uninterrupted = start(whole, case)
    victim = start(killed, case)
    last = random.Random(zlib.crc32("-".join(case).encode())).randrange(5, STEPS - 1)
    for line in victim.stdout:
        if int(line) == last:
            victim.kill()
            break
    victim.communicate()
    assert victim.returncode != 0
    resumed = start(killed, case)
    for process in (uninterrupted, resumed):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    text = (whole / "result.txt").read_text()
    assert text == (killed / "result.txt").read_text()
    assert text.count("AlphaMeasurement(") >= STEPS - 8


@pytest.mark.compatibility("Resume", "kill -9 of both processes of a DDP run: bit for bit")
def test_two_killed_processes_resume_bit_for_bit(tmp_path):
    case, (whole, killed) = ("adamw", "layerwise", "fp32"), (tmp_path / "whole", tmp_path / "killed")
    whole.mkdir()
    killed.mkdir()
    uninterrupted, victims = start_two(whole, case), start_two(killed, case)
    for line in victims[0].stdout:
        if int(line) == 26:
            break
    for victim in victims:
        victim.kill()
        victim.communicate()
        assert victim.returncode != 0
    for process in (*uninterrupted, *start_two(killed, case)):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    text = (whole / "result.txt").read_text()
    assert text == (killed / "result.txt").read_text()
    assert text.count("AlphaMeasurement(") >= STEPS - 8
