"""Files that are cut off, changed or foreign, and runs that are killed."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import random
import struct
import time

import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaHistory, AlphaScheduler
from tests.test_kill import STEPS, start, start_two
from tests.test_transparency import equal_states

KILLED = (
    (1, ("sgd", "backpack", "fp32")),
    (1, ("momentum", "layerwise", "fp16")),
    (1, ("adamw", "layerwise", "fp32")),
    (2, ("adamw", "layerwise", "fp32")),
)
"""How many processes train, and what."""


def make(steps=12):
    """A run with a scheduler, some steps old."""
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), nn.CrossEntropyLoss()
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-2), model, loss_fn)
    scheduler = AlphaScheduler(optimizer, total_steps=200)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(torch.randn(8, 4)), torch.randint(0, 2, (8,))).backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


# ---------------------------------------------------------------- histories

ODD = (3.7, -3, "7", True, None, [], {}, 10**400, math.inf, math.nan, "nonsense")
"""What no field that counts can be, and hardly any other."""


def history_is_read_or_refused(path, content, expected=None):
    """Either a history, the ``expected`` one if there is one, or an error that names file and line; nothing else."""
    path.write_bytes(content)
    try:
        history = AlphaHistory.load(path)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
        assert all(type(count) is int and count >= 0 for m in history for count in (m.iteration, m.samples_end))
        assert all(type(rate) is float for m in history for rate in (*m.lr, m.alpha))
        assert all(type(count) is int and count >= 0 for count in history.dropped.values())
        assert expected is None or equal_states(history.state_dict(), expected.state_dict())
    assert not refused or str(path) in refused, refused
    assert len(refused) < 600, refused


def history_checks(folder, count=150):
    """A history file with bytes changed, lines cut, and other things in its place."""
    whole = folder / "whole.jsonl"
    history = make()[1].alpha_history
    history.save(whole)
    content = whole.read_bytes()
    dice = random.Random(0)
    changed, other = [content[: dice.randrange(len(content))] for _ in range(count)], []
    for _ in range(count):
        place = dice.randrange(len(content))
        other.append(content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :])
        other.append(content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :])
    lines = content.splitlines(keepends=True)
    for _ in range(count // 3):
        some = dice.sample(lines, len(lines))
        changed.append(b"".join(some[: dice.randrange(1, len(some))]))
    head, row = (without_checksum(json.loads(line), "crc32") for line in lines[:2])
    rows = [{**row, name: value} for name in ("iteration", "samples_end", "alpha", "lr") for value in ODD]
    heads = [
        {**head, name: value} for name in ("version", "dropped", "abandoned") for value in (*ODD, {"x": -1}, [[0, -1]])
    ]
    changed += [lines[0] + json.dumps(entry).encode() + b"\n" for entry in rows]
    changed += [json.dumps(entry).encode() + b"\n" + lines[1] for entry in heads]
    changed += [lines[0] + b"[" * 200_000, lines[0] + lines[1].replace(b'"iteration": 0', b'"iteration": 1e999')]
    changed += [b"", b"\n\n", b"{}", b"[]", b"null", b"\x00" * 100, b"\xff\xfe", b"PK\x03\x04" + bytes(50), b"1e999\n"]
    path = folder / "changed.jsonl"
    parts = [(part, None) for part in changed] + [(part, history) for part in other]
    return [
        (f"history file, change {n}", functools.partial(history_is_read_or_refused, path, *part))
        for n, part in enumerate(parts)
    ]


def without_checksum(state, key="checksum"):
    """What is left of a state or a line that nobody can tell was changed."""
    return {name: value for name, value in state.items() if name != key}


# ---------------------------------------------------------------- checkpoints


def flattened(state, path=()):
    """Paths to all entries of nested dicts and lists."""
    yield path
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        yield from flattened(value, (*path, key))


def at(state, path):
    for key in path:
        state = state[key]
    return state


def state_is_taken_or_refused(name, state, path, value, sealed=False):
    """A state dict with one entry replaced: taken over, or refused with nothing changed; ``sealed``: refused."""
    parts = dict(zip(("model", "optimizer", "scheduler"), make(3), strict=True))
    changed = copy.deepcopy(state)
    if not sealed:
        (changed["alpha_guided"] if name == "optimizer" else changed).pop("checksum")
    holder = at(changed, path[:-1])
    if value is Missing:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    before = copy.deepcopy(parts[name].state_dict())
    weights = copy.deepcopy(parts["model"].state_dict())
    try:
        parts[name].load_state_dict(changed)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        refused = str(error)
    else:
        assert not sealed, "a changed number was taken over"
        return
    assert refused
    assert equal_states(before, parts[name].state_dict()), f"refused ({refused}), and changed all the same"
    assert equal_states(weights, parts["model"].state_dict())


class Missing:
    """Stands for an entry that is left out."""


def flipped(number, dice):
    """Another number, one bit away."""
    if isinstance(number, bool):
        return not number
    if isinstance(number, int):
        return number ^ 1 << dice.randrange(16)
    (bits,) = struct.unpack("<q", struct.pack("<d", number))
    first = 52 if math.isnan(number) else 0  # any other fraction is nan again, the same number to everybody
    return struct.unpack("<d", struct.pack("<q", bits ^ 1 << dice.randrange(first, 63)))[0]


def state_checks(count=250):
    """Entries of our own in the optimizer's state dict, and of the scheduler's, left out or replaced; flipped bits."""
    dice = random.Random(1)
    _, optimizer, scheduler = make(40)
    made = []
    for name, part, root in (("optimizer", optimizer, ("alpha_guided",)), ("scheduler", scheduler, ())):
        state = part.state_dict()
        paths = [root + path for path in flattened(at(state, root)) if path and path[-1] != "checksum"]
        numbers = [path for path in paths if isinstance(at(state, path), (int, float)) and "schedule" not in path]
        made += [
            (
                f"{name}'s state, a bit of {path}",
                functools.partial(state_is_taken_or_refused, name, state, path, flipped(at(state, path), dice), True),
            )
            for path in dice.sample(numbers, min(count // 2, len(numbers)))
        ]
        for path in dice.sample(paths, min(count, len(paths))):
            value = dice.choice((Missing, "nonsense", None, -1, 10**9, [], {}, [None], float("nan")))
            made.append(
                (
                    f"{name}'s state, {path} = {value}",
                    functools.partial(state_is_taken_or_refused, name, state, path, value),
                )
            )
    return made


def nothing_is_unpickled():
    """A checkpoint of ours holds tensors and plain values only."""
    model, optimizer, scheduler = make(40)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, scheduler)], file)
    file.seek(0)
    torch.load(file, weights_only=True)


def file_checks(folder):
    """Pairs of a name and a check."""
    return [*history_checks(folder), *state_checks(), ("plain values only", nothing_is_unpickled)]


# ---------------------------------------------------------------- kills


def started(folder, count, case):
    return [start(folder, case)] if count == 1 else start_two(folder, case)


def ended(folder, count, case):
    """The result of a run that is left alone."""
    for process in started(folder, count, case):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return (folder / "result.txt").read_text()


def killed_run_ends_alike(folder, count, case, seed, expected):
    """Kill -9 after a random step and a moment more, perhaps while a checkpoint is written; up to three times."""
    dice = random.Random(seed)
    killed = folder / f"killed-{seed}"  # no space: a store is named by an address
    killed.mkdir()
    for _ in range(dice.randint(1, 3)):
        victims = started(killed, count, case)
        last = dice.randrange(STEPS)
        for line in victims[0].stdout:
            if int(line) >= last:
                break
        dice.shuffle(victims)
        for victim in victims:
            time.sleep(dice.random() * 0.02)
            victim.kill()
        for victim in victims:
            victim.communicate()
    assert ended(killed, count, case) == expected()


def kill_checks(folder, count, seed):
    """Pairs of a name and a check."""

    @functools.cache
    def uninterrupted(count, case):
        whole = folder / "-".join((str(count), *case))
        whole.mkdir()
        return ended(whole, count, case)

    made = []
    for n in range(count):
        processes, case = KILLED[n % len(KILLED)]
        expected = functools.partial(uninterrupted, processes, case)
        check = functools.partial(killed_run_ends_alike, folder, processes, case, 1000 * seed + n, expected)
        made.append((f"kill {n}", check))
    return made
