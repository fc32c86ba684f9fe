"""Parameters spread over processes: FSDP2, HSDP, tensor parallelism. Slopes are those of one process."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from alpha_optim import AlphaGuided, AlphaScheduler
from alpha_optim.policies import Hold
from tests.distributed import setups
from tests.distributed.test_steering import equal, error_of

pytestmark = setups.needs_fsdp
TWO = [
    *[("fsdp", optimizer, given) for optimizer in setups.OPTIMIZERS for given in ("model", "nothing")],
    ("fsdp, a part left whole", "adamw", "model"),
    ("fsdp, a part left whole", "sgd", "model"),
    ("clipped", "sgd", "model"),
    ("clipped", "adamw", "model"),
    ("clipped", "adamw", "nothing"),
    ("bfloat16", "adamw", "model"),
    ("offloaded", "adamw", "model"),
    ("accumulated", "adamw", "model"),
    ("tensor parallel", "adamw", "model"),
    ("tensor parallel", "sgd", "nothing"),
]
FOUR = [
    ("fsdp", "adamw", "model"),
    ("hybrid", "adamw", "model"),
    ("hybrid", "sgd", "model"),
    ("tensor parallel and fsdp", "momentum", "model"),
]


def network():
    torch.manual_seed(0)
    # 17 is not a multiple of 2 or 4, and of the last layer some ranks have nothing.
    return nn.Sequential(
        nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 17), nn.Tanh(), nn.Linear(17, 3)
    ).double()


def spread(model, how, size):
    """Spread a model; returns the rank's place among those with batches of their own, and how many those are."""
    rank = torch.distributed.get_rank()
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    if "tensor parallel" in how:
        alone = how == "tensor parallel"
        shape, names = ((size,), ("tp",)) if alone else ((2, size // 2), ("dp", "tp"))
        whole = init_device_mesh("cpu", shape, mesh_dim_names=names)
        parallelize_module(model, whole["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if alone:
            return 0, 1
        for layer in layers:
            fully_shard(layer, mesh=whole["dp"])
        fully_shard(model, mesh=whole["dp"])
        return whole["dp"].get_local_rank(), 2
    shape, names = ((2, size // 2), ("copies", "parts")) if how == "hybrid" else ((size,), ("parts",))
    options = {"mesh": init_device_mesh("cpu", shape, mesh_dim_names=names)}
    if how == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if how == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if how == "fsdp, a part left whole":
        options["ignored_params"] = set(layers[1].parameters())
    for layer in layers:
        if how != "fsdp, a part left whole" or layer is not layers[1]:
            fully_shard(layer, **options)
    fully_shard(model, **options)
    return rank, size


def train(rank, size, how, optimizer, given):
    """The textbook loop; a part left whole has its gradients averaged by hand."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    place, parts = spread(model, how, size) if size > 1 else (0, 1)
    there = given == "model"
    guided = AlphaGuided(
        setups.OPTIMIZERS[optimizer](model.parameters()),
        model if there else None,
        loss_fn if there else None,
        backend="gradients" if size == 1 else "auto",
    )
    for step in range(7):
        x, y = setups.of_rank(step, place, parts)
        guided.zero_grad()
        if how == "accumulated":  # gradients are spread over the ranks after the second half only
            for half, (a, b) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
                if size > 1:
                    model.set_requires_gradient_sync(half == 1)
                (0.5 * loss_fn(model(a), b)).backward()
        else:
            loss_fn(model(x), y).backward()
        if how == "fsdp, a part left whole" and size > 1:
            for param in model[2].parameters():
                torch.distributed.all_reduce(param.grad)
                param.grad /= size
        if how == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        guided.step()
    return setups.record(guided), guided.backend


class Sequences(nn.Module):
    """Its norm sees a part of every sequence on each rank, and holds all of its parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.norm(x))))


def in_parts_of_sequences(rank, size, optimizer):
    model = Sequences().double()
    if size > 1:
        plan = {
            "norm": SequenceParallel(),
            "a": ColwiseParallel(input_layouts=Shard(1)),
            "b": RowwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(model, init_device_mesh("cpu", (size,)), plan)
    guided = AlphaGuided(setups.OPTIMIZERS[optimizer](model.parameters()), model, backend="gradients")
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(6, 4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        guided.zero_grad()
        (model(x.chunk(size, dim=1)[rank]) - y).square().mean().backward()
        guided.step()
    return [(m.alpha, m.step_length, m.slope_start, m.slope_end) for m in guided.alpha_history]


def resumed(rank, size, optimizer, folder):
    """A part left whole, every rank its own file; in the middle, and without."""

    def build():
        model = network()
        spread(model, "fsdp, a part left whole", size)
        return model, AlphaGuided(setups.OPTIMIZERS[optimizer](model.parameters()), model)

    found = []
    for saved in (None, 4):
        model, guided = build()
        for step in range(7):
            if step == saved:
                path = f"{folder}/{optimizer} {rank}.pt"
                torch.save([model.state_dict(), guided.state_dict()], path)
                model, guided = build()
                of_model, of_optimizer = torch.load(path, weights_only=False)
                model.load_state_dict(of_model)
                guided.load_state_dict(of_optimizer)
            x, y = setups.of_rank(step, rank, size)
            guided.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            guided.step()
        found.append(guided.alpha_history.alphas.tolist())
    return found


def steered(rank, size, how, steps, lr, broken=None):
    """With a scheduler; at one step the last rank's batch is not finite."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    place, parts = spread(model, how, size)
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=lr), model, loss_fn)
    policy = {"policy": Hold()} if broken is not None else {"total_steps": steps}
    scheduler = AlphaScheduler(guided, **policy)
    rates, states = [], []
    for step in range(steps):
        x, y = setups.of_rank(step, place, parts)
        if broken is not None and broken[0] <= step < broken[1] and rank == size - 1:
            x = x * math.nan
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
        scheduler.step()
        rates.append(guided.param_groups[0]["lr"])
        states.append([param._local_tensor.detach().clone() for param in model.parameters()])
    scheduler.finish()
    x, y = setups.batch(999)
    with torch.no_grad():
        loss = float(loss_fn(model(x), y))
    return {"rates": rates, "loss": loss, "events": [str(e.reason) for e in guided.guard_events], "states": states}


def asks_for_samples(rank, size):
    model = network()
    spread(model, "fsdp", size)
    AlphaGuided(torch.optim.AdamW(model.parameters()), model, backend="layerwise")


def on_ranks(rank, size, folder):
    # PyTorch warns of views that tensor parallel layers return, with or without us.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    found = {case: setups.said(train, rank, size, *case) for case in (TWO if size == 2 else FOUR)}
    how = "fsdp" if size == 2 else "hybrid"
    found["total"] = steered(rank, size, how, 150, 1e-6)
    found["nan once"] = steered(rank, size, how, 20, 0.01, (10, 11))
    found["nan twice"] = steered(rank, size, how, 20, 0.01, (10, 12))
    if size == 2:
        found["sequences"] = {name: in_parts_of_sequences(rank, size, name) for name in ("sgd", "momentum")}
        found["resumed"] = {name: resumed(rank, size, name, folder) for name in ("sgd", "adamw")}
    found["refused"] = error_of(asks_for_samples, rank, size)
    return found


def assert_slopes_of_one_process(ranks, case):
    (history, backend), said = ranks[0][case]
    how, optimizer, _ = case
    assert all(repr(rank[case][0]) == repr(ranks[0][case][0]) for rank in ranks)
    assert backend == "gradients"
    assert not said
    (expected, _) = train(0, 1, *case)
    missing = {0} if how == "fsdp, a part left whole" else set()  # its gradients are written to after the pass
    assert set(history) == set(expected) - missing
    relative = 0.1 if how == "bfloat16" else 1e-11
    if optimizer == "adamw" and how == "clipped":
        relative = 1e-9  # clipped gradients of 1e-4 beside Adam's epsilon
    for iteration, (information, numbers) in history.items():
        if how == "bfloat16" and iteration > 0:
            continue  # another path
        assert information == "slopes"
        for name, one, other in zip(setups.NUMBERS, numbers, expected[iteration][1], strict=True):
            if name not in ("alpha_std", "slope_variance_start", "slope_variance_end"):
                assert one == pytest.approx(other, rel=relative, abs=1e-13, nan_ok=True), (iteration, name)


@pytest.mark.compatibility("Process", "FSDP2 (fully_shard): slopes; clipping, mixed precision, CPU offload")
@pytest.mark.parametrize("case", TWO, ids=" ".join)
def test_slopes_on_two_ranks(two, case):
    assert_slopes_of_one_process(two, case)


@pytest.mark.compatibility("Process", "HSDP, tensor parallelism (DTensor), both: slopes")
@pytest.mark.parametrize("case", FOUR, ids=" ".join)
def test_slopes_on_four_ranks(four, case):
    assert_slopes_of_one_process(four, case)


def test_a_search_and_the_guard(two, four):
    for ranks in (two, four):
        total = [rank["total"] for rank in ranks]
        assert all(rank["rates"] == total[0]["rates"] for rank in total)
        assert max(total[0]["rates"]) > 1e-3
        assert total[0]["loss"] < 0.2
        for rank in ranks:
            once, twice = rank["nan once"], rank["nan twice"]
            assert once["events"] == ["loss_not_finite"]
            assert equal(once["states"][9], once["states"][10])
            assert not equal(once["states"][10], once["states"][11])
            assert twice["events"] == ["loss_not_finite", "loss_not_finite"]
            assert equal(twice["states"][11], twice["states"][8])
            assert twice["rates"][11] == 0.5 * twice["rates"][8]


def test_slopes_of_samples_are_refused_by_name(two):
    for rank in two:
        assert rank["refused"].startswith("ValueError: backend='layerwise' is impossible here: parameters are spread")
        assert "'gradients'" in rank["refused"]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_gradients_that_wait_to_be_summed(two, optimizer):
    expected = in_parts_of_sequences(0, 1, optimizer)
    for rank in two:
        assert rank["sequences"][optimizer] == [pytest.approx(row, rel=1e-10) for row in expected]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_with_a_part_left_whole(two, optimizer):
    for rank in two:
        straight, after = rank["resumed"][optimizer]
        assert after == pytest.approx(straight, rel=1e-9)
        assert len(after) == 6
