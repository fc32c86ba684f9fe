"""DistributedDataParallel: alpha on several ranks is that of one process on all their samples."""

import math

import pytest
import torch
from torch import nn

from tests.distributed import setups
from tests.reference.per_sample_loop import observe_run

BACKENDS = [
    (optimizer, backend, variance, given)
    for optimizer in setups.OPTIMIZERS
    for backend in ("auto", "backpack", "cached", "layerwise", "gradients")
    for variance in ("exact", "sampled")
    for given in ("ddp", "inner")
    if optimizer == "sgd" or backend != "backpack"
] + [(optimizer, "auto", "exact", given) for optimizer in setups.OPTIMIZERS for given in ("by hand", "nothing")]
FEW = 16
"""Samples of all ranks together: no more than ``variance="sampled"`` takes in one process, so that both take all."""
WAYS = [(name, variance) for name in setups.WAYS for variance in ("exact", "sampled")]
UNSEEN = [
    (optimizer, sampled, returns)
    for optimizer in ("sgd", "momentum", "adamw")
    for sampled in (True, False)
    for returns in (True, False)
]
UNEQUAL = [(64, 64), (96, 32), (120, 8)]
FOUR = [
    ("adamw", "auto", "exact", "ddp"),
    ("sgd", "backpack", "exact", "ddp"),
    ("momentum", "cached", "sampled", "inner"),
]


def samples(variance):
    return FEW if variance == "sampled" else setups.BATCH


def on_ranks(rank, size, folder):
    """Everything at once: starting processes is what takes time."""
    backends = BACKENDS if size == 2 else FOUR
    found = {"plain": {}, "ways": {}, "float32": {}, "said": {}}
    for case in backends:
        found["plain"][case], found["said"][case] = setups.said(
            lambda case=case: setups.plain(rank, size, *case, total=samples(case[2]))
        )
        found["float32"][case] = setups.plain(rank, size, *case, dtype=torch.float32, total=samples(case[2]))
    if size == 2:
        found["ways"] = {case: setups.said(setups.way, rank, size, *case) for case in WAYS}
        found["returns"] = {v: setups.returns_loss(rank, size, v) for v in ("exact", "sampled")}
        found["dropout"] = {
            unseen: setups.said(setups.unrepeatable_dropout, rank, size, unseen) for unseen in (0.0, 3.0)
        }
        found["shares"] = {how: setups.shares_of_one_mean(rank, size, how) for how in ("in place", "anew")}
        found["bad batch"] = setups.one_bad_batch(rank, size)
        found["waits"] = setups.steps_that_wait(rank, size)
        found["threads"] = setups.uneven_threads(rank, size)
        found["unseen"] = {case: setups.said(setups.unseen_term, rank, size, *case) for case in UNSEEN}
        found["unequal"] = {counts: setups.unequal(rank, size, counts) for counts in UNEQUAL}
        found["micro"] = {view: setups.micro_batches(rank, size, view) for view in (False, True)}
        found["apart"] = setups.said(setups.apart_later, rank, size)
        found["averaged"] = {period: setups.averaged_now_and_then(rank, size, period) for period in (2, 4, 3)}
        found["loaded"] = setups.loaded_on_one_rank(rank, size)
        found["out of data"] = setups.out_of_data(rank, size)
        found["subset"] = setups.plain(rank, size, "adamw", variance="sampled", total=64)
    return found


def assert_same(found, expected, relative, absent=()):
    """Every measurement of ``found`` agrees with that of the same iteration in ``expected``."""
    assert len(found) >= len(expected) - len(absent)
    for iteration, (information, numbers) in found.items():
        assert information == expected[iteration][0]
        scale = {name: abs(value) for name, value in zip(setups.NUMBERS, expected[iteration][1], strict=True)}
        # Slopes differ by rounding of their parts: relative to the larger of slope and noise.
        for end in ("start", "end"):
            noise = scale[f"slope_variance_{end}"]
            scale[f"slope_{end}"] = max(scale[f"slope_{end}"], 0.0 if math.isnan(noise) else noise**0.5)
        for name, one, other in zip(setups.NUMBERS, numbers, expected[iteration][1], strict=True):
            if math.isnan(one) or math.isnan(other):
                assert math.isnan(one) == math.isnan(other), name
            else:
                assert abs(one - other) <= relative * max(scale[name], 1e-300), (iteration, name, one, other)


def test_all_ranks_have_the_same_history(ranks):
    for name in ("plain", "float32", "ways"):
        for case, history in ranks[0][name].items():
            assert all(repr(rank[name][case]) == repr(history) for rank in ranks[1:]), case


@pytest.mark.compatibility("Process", "DistributedDataParallel, two and four processes: alpha of all ranks' samples")
def test_equals_one_process_on_all_samples(ranks):
    for case, history in ranks[0]["plain"].items():
        optimizer, backend, variance, given = case
        expected = setups.plain(
            0, 1, optimizer, backend, variance, "nothing" if given == "nothing" else "inner", total=samples(variance)
        )
        # Gradients averaged after the backward pass are copied from the second step on.
        assert_same(history, expected, 1e-12, absent={0} if given == "by hand" else ())
        assert len(history) == 6 - (given == "by hand")


def test_equals_one_process_in_float32(ranks):
    for case, history in ranks[0]["float32"].items():
        optimizer, backend, variance, given = case
        expected = setups.plain(
            0, 1, optimizer, backend, variance, "nothing" if given == "nothing" else "inner",
            dtype=torch.float32, total=samples(variance),
        )  # fmt: skip
        close = {n: (i, v) for n, (i, v) in history.items() if n < 3}  # later the parameters themselves differ
        assert_same(close, {n: e for n, e in expected.items() if n < 3}, 1e-5, absent={0} if given == "by hand" else ())


def test_equals_one_backward_pass_per_sample(ranks):
    case = ("adamw", "auto", "exact", "ddp")
    model, loss_fn = setups.mlp(), nn.CrossEntropyLoss()
    rows = observe_run(
        model,
        lambda output, y, i: loss_fn(output, y),
        loss_fn,
        setups.OPTIMIZERS["adamw"](model.parameters()),
        [setups.batch(step) for step in range(7)],
    )
    for iteration, row in enumerate(rows):
        numbers = dict(zip(setups.NUMBERS, ranks[0]["plain"][case][iteration][1], strict=True))
        for name, value in row.items():
            assert numbers[name] == pytest.approx(value, rel=1e-11, abs=1e-13), name


def test_nothing_is_said(two):
    assert all(not said for said in two[0]["said"].values())


@pytest.mark.compatibility(
    "Process", "DDP with no_sync, unused parameters, bucket views, static graph, unequal batches"
)
@pytest.mark.parametrize("case", WAYS, ids=" ".join)
def test_ways_of_data_parallel_training(two, case):
    name, variance = case
    history, said = two[0]["ways"][case]
    assert not said
    assert len(history) == 6
    if variance == "sampled":  # other samples than in one process
        assert history[5][0] == "full" or name == "a rank without data"
        return
    assert_same(history, setups.way(0, 1, name), 1e-11)


def test_dropout_that_cannot_be_repeated(two):
    history, said = two[0]["dropout"][0.0]
    assert [information for information, _ in history.values()] == ["full"] * 7
    assert said == []


def test_a_term_of_the_loss_that_was_not_seen_is_told_where_dropout_cannot_be_repeated(two):
    history, said = two[0]["dropout"][3.0]
    assert history[0][0] == "slopes"
    assert "not all of the loss" in said[0]


def test_a_model_that_returns_its_loss(two):
    for variance, history in two[0]["returns"].items():
        assert [information for information, _ in history.values()] == ["full"] * 6
        if variance == "exact":
            expected = setups.returns_loss(0, 1)
            # The variance of losses at the very first start is seen a step later than in one process.
            del history[0], expected[0]
            assert_same(history, expected, 1e-11)


def test_sampled_variances_are_those_of_the_first_samples_of_every_rank(two):
    """At the first step all samples are looked at, later 16 of each rank."""
    model, loss_fn = setups.mlp(), nn.CrossEntropyLoss()
    optimizer = setups.OPTIMIZERS["adamw"](model.parameters())
    gradients, steps = [], []
    for step in range(2):
        x, y = setups.batch(step, total=64)
        rows = []
        for i in [i for rank in range(2) for i in range(rank, 64, 2)[:16]]:
            loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        gradients.append(torch.stack(rows))
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        steps.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    slopes = gradients[1] @ steps[0] / steps[0].norm()
    measured = dict(zip(setups.NUMBERS, two[0]["subset"][0][1], strict=True))
    assert measured["slope_variance_end"] == pytest.approx(float(slopes.var()), rel=1e-10)


@pytest.mark.parametrize("how", ["in place", "anew"])
def test_losses_divided_by_the_targets_of_all_ranks(two, how):
    history, expected = two[0]["shares"][how], setups.shares_of_one_mean(0, 1, how)
    del history[0], expected[0]
    assert_same(history, expected, 1e-11)


def test_a_bad_batch_leaves_what_is_known_of_variances(two):
    history, expected = two[0]["bad batch"], setups.one_bad_batch(0, 1)
    assert list(history) == list(expected)
    assert_same(history, expected, 1e-11)


def test_sums_in_another_order_make_no_difference_between_ranks(two):
    assert two[0]["threads"] == two[1]["threads"]
    assert len(two[0]["threads"]) == 11


def test_who_only_watches_waits_for_no_other_rank_but_where_variances_are_measured(two):
    """What ranks say is added up while the next forward pass runs; variances come anew at twice the distance each."""
    for rank in two:
        assert {16, 31} <= set(rank["waits"])
        assert not set(rank["waits"]) & {*range(17, 31), *range(33, 40)}


@pytest.mark.parametrize("case", UNSEEN, ids=str)
def test_a_term_of_the_loss_that_no_rank_sees_is_told_on_all_of_them(two, case):
    """Each sees the gradient of all, and samples of its own only; read at the end, when it is late to find out."""
    for rank in two:
        information, told = rank["unseen"][case]
        assert set(information) == {"slopes"}, information
        assert len(told) == 1, told
        assert "not all of the loss" in told[0]


@pytest.mark.parametrize("counts", UNEQUAL, ids=str)
@pytest.mark.parametrize("processes", [1, 2])
def test_sampled_variances_of_unequal_batches_are_those_of_all_samples_but_for_chance(two, processes, counts):
    """In small batches a sample weighs more; from the large one are most of them."""
    ratios = two[0]["unequal"][counts] if processes == 2 else setups.unequal(0, 1, counts)
    assert len(ratios) >= 3
    assert 0.5 < math.exp(sum(map(math.log, ratios)) / len(ratios)) < 2.0, ratios


@pytest.mark.parametrize("view", [False, True])
def test_gradients_that_are_moved_between_micro_batches_count(two, view):
    assert_same(two[0]["micro"][view], setups.micro_batches(0, 1, view), 1e-11)


def test_what_was_measured_together_and_apart_is_read_at_once(two):
    for rank in two:
        (count, dropped), _ = rank["apart"]
        assert count + sum(dropped.values()) == 29
        assert dropped == {"other_rank": 1}


@pytest.mark.parametrize("period", [2, 4, 3])
def test_models_that_are_averaged_now_and_then_are_not_one(two, period):
    assert all("do not train one model" in rank["averaged"][period] for rank in two)


def test_a_state_that_one_rank_has_loaded_is_an_error_on_all(two):
    for rank in two:
        assert len(rank["loaded"]) == 2
        assert all("1 of 2 ranks begin to measure" in error for error in rank["loaded"])


def test_losses_handed_over_of_an_empty_batch(two):
    history = two[0]["out of data"]
    assert list(history) == list(range(5))
    assert history[2][1][setups.NUMBERS.index("samples_end")] == setups.BATCH // 2
    assert all(math.isfinite(numbers[0]) for _, numbers in history.values())
