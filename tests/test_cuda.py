"""On a GPU: nothing is waited for, nothing is kept, nothing of the run is changed, and alpha is the same."""

import copy
import gc
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alpha_optim import AlphaGuided, AlphaScheduler, CalibrateThenAnneal, Hold, find_lr
from tests import zoo
from tests.parity import QUANTITIES
from tests.reference.per_sample_loop import observe_run
from tests.test_transparency import equal_states

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch.cuda knows")
DEVICE = "cuda"
N, VOCABULARY, LENGTH = 32, 31, 16
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adamw, fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "adamw, capturable": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01), capturable=True),
    "adamw, loop": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False),
}


class Attention(nn.Module):
    def __init__(self, width=32, dropout=0.0, fused_dropout=0.0):
        super().__init__()
        self.fused_dropout = fused_dropout
        self.embedding, self.positions = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(LENGTH, width))
        self.qkv, self.out, self.norm = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)
        self.head, self.dropout = nn.Linear(width, VOCABULARY), nn.Dropout(dropout)

    def forward(self, x):
        h = self.dropout(self.embedding(x) + self.positions)
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.fused_dropout, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head(self.dropout(h)).transpose(1, 2)


class Recurrent(nn.Module):
    """cuDNN's layer returns a state that nobody uses."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(VOCABULARY, 16), nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, x):
        return self.head(self.cell(self.embedding(x))[0]).transpose(1, 2)


class Pooled(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.dropout(self.two(F.relu(self.norm(self.one(x)))).relu().mean((2, 3))))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10)),
    "cnn": Pooled,
    "attention": Attention,
    "dropout": lambda: Attention(dropout=0.2),
    "fused dropout": lambda: Attention(fused_dropout=0.2),
    "lstm": Recurrent,
}


def batch(name, k, size=N):
    """The same batch on every machine."""
    generator = torch.Generator().manual_seed(k)
    if name in ("attention", "dropout", "fused dropout", "lstm"):
        x = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
        return x.to(DEVICE), x.roll(-1, 1).to(DEVICE)
    x = torch.randn(size, *((20,) if name == "mlp" else (1, 8, 8)), generator=generator)
    return x.to(DEVICE), torch.randint(0, 10, (size,), generator=generator).to(DEVICE)


def make(name, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return MODELS[name]().to(DEVICE, dtype), nn.CrossEntropyLoss()


def train(name, model, optimizer, loss_fn, steps, clip=False, scheduler=None, autocast=None, scaler=None, start=0):
    for k in range(start, start + steps):
        x, y = batch(name, k)
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = loss_fn(model(x), y)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None:
            scheduler.step()


@pytest.fixture(autouse=True)
def _deterministic():
    """Kernels of cuDNN that add in any order would differ from run to run."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def waits(run):
    """How often something waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(entry.message) for entry in caught)


@pytest.mark.compatibility(
    "GPU", "no step waits for the GPU but for the guard, once; fused, capturable and foreach optimizers"
)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_a_step_waits_for_nothing_but_the_guards_one_transfer(name, kind, steered, clip):
    def counted(wrapped):
        model, loss_fn = make(name)
        optimizer, scheduler = OPTIMIZERS[kind](model.parameters()), None
        if wrapped:
            # What a policy sees has to be read; one that sees nothing leaves the guard's transfer.
            optimizer = AlphaGuided(optimizer, model, loss_fn, every=lambda n: not steered)
            scheduler = AlphaScheduler(optimizer, Hold()) if steered else None
        train(name, model, optimizer, loss_fn, 40, clip, scheduler)
        x, y = batch(name, 40)
        found = []
        for _ in range(8):
            measures_anew = wrapped and bool(optimizer._session.pairing.iteration.task.due)

            def step():
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()

            count = waits(step)
            if not measures_anew:
                found.append(count)
        return found

    bare, guided = counted(False), counted(True)
    assert guided
    assert set(guided) == {bare[-1] + steered}


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw", "adamw, fused"])
def test_between_steps_there_is_one_more_copy_of_the_parameters(kind):
    def held(wrapped):
        gc.collect()
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 10)).to(DEVICE), nn.MSELoss()
        before = torch.cuda.memory_allocated()
        optimizer = OPTIMIZERS[kind](model.parameters())
        if wrapped:
            optimizer = AlphaGuided(optimizer, model, loss_fn)
        x, y = torch.randn(64, 512, device=DEVICE), torch.randn(64, 10, device=DEVICE)
        for _ in range(6):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        size = sum(4 * param.numel() for param in model.parameters())
        return (torch.cuda.memory_allocated() - before) / size

    held(False)  # libraries take their work space
    gc.disable()
    try:
        assert held(True) - held(False) <= 1.05
    finally:
        gc.enable()


@pytest.mark.compatibility(
    "GPU",
    "CUDA: parameters, buffers and random numbers bit for bit; dropout, attention, cuDNN's recurrent layers",
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_is_bit_for_bit_that_of_the_bare_optimizer(name, kind):
    def run(wrapped):
        model, loss_fn = make(name)
        base = optimizer = OPTIMIZERS[kind](model.parameters())
        if wrapped:
            optimizer = AlphaGuided(base, model, loss_fn)
        torch.manual_seed(1)
        train(name, model, optimizer, loss_fn, 12, clip=True)
        return model.state_dict(), base.state_dict(), torch.get_rng_state(), torch.cuda.get_rng_state(), optimizer

    *bare, _ = run(False)
    *guided, optimizer = run(True)
    assert equal_states(bare, guided)
    assert {m.information for m in optimizer.alpha_history} == {"full"}


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_alpha_is_that_of_one_backward_pass_per_sample(name, kind):
    model, loss_fn = make(name, dtype=torch.float64)
    twin = copy.deepcopy(model)
    batches = [batch(name, k, size=6) for k in range(5)]
    if name == "mlp":
        batches = [(x.double(), y) for x, y in batches]
    expected = observe_run(
        twin, zoo.cross_entropy_of_one, F.cross_entropy, OPTIMIZERS[kind](twin.parameters()), batches
    )
    guided = AlphaGuided(OPTIMIZERS[kind](model.parameters()), model, loss_fn, variance="exact")
    for x, y in batches:
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert len(guided.alpha_history) == len(expected)
    for m, row in zip(guided.alpha_history, expected, strict=True):
        assert m.information == "full"
        for quantity in QUANTITIES:
            assert getattr(m, quantity) == pytest.approx(row[quantity], rel=1e-8, abs=1e-10), quantity


@pytest.mark.compatibility("GPU", "autocast in bf16 and fp16 with a GradScaler")
@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamw, fused"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"lstm"}))  # cuDNN's, in 16 bits, is repeated too coarsely
def test_autocast_with_a_gradient_scaler(name, precision, kind):
    def run(wrapped):
        model, loss_fn = make(name)
        base = optimizer = OPTIMIZERS[kind](model.parameters())
        if wrapped:
            optimizer = AlphaGuided(base, model, loss_fn)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12, enabled=precision is torch.float16)
        train(name, model, optimizer, loss_fn, 12, autocast=precision, scaler=scaler)
        return model.state_dict(), optimizer

    bare, _ = run(False)
    guided, optimizer = run(True)
    assert equal_states(bare, guided)
    assert len(optimizer.alpha_history) == 11
    assert {m.information for m in optimizer.alpha_history} == {"full"}


@pytest.mark.compatibility("GPU", "checkpoints, loaded with map_location")
@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamw, capturable"])
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint_that_was_moved_to_the_cpu(kind, tmp_path):
    def build():
        model, loss_fn = make("mlp")  # of whose loss torch's kernels give the same bits every time
        guided = AlphaGuided(OPTIMIZERS[kind](model.parameters()), model, loss_fn)
        return model, loss_fn, guided, AlphaScheduler(guided, CalibrateThenAnneal(150))

    model, loss_fn, guided, scheduler = build()
    train("mlp", model, guided, loss_fn, 60, scheduler=scheduler)
    saved = {"model": model.state_dict(), "optimizer": guided.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    train("mlp", model, guided, loss_fn, 40, scheduler=scheduler, start=60)
    again, loss_fn, other, steering = build()
    state = torch.load(tmp_path / "run.pt", map_location="cpu", weights_only=True)
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    steering.load_state_dict(state["scheduler"])
    train("mlp", again, other, loss_fn, 40, scheduler=steering, start=60)
    assert equal_states(model.state_dict(), again.state_dict())
    assert [m.alpha for m in guided.alpha_history][-30:] == [m.alpha for m in other.alpha_history][-30:]


@pytest.mark.compatibility("GPU", "the guard, with its points on the GPU or on the CPU")
@pytest.mark.parametrize("place", [True, "cpu"])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamw, capturable"])
def test_the_guard_skips_takes_back_and_keeps_points_where_it_is_told_to(kind, place):
    model, loss_fn = make("mlp")
    guided = AlphaGuided(OPTIMIZERS[kind](model.parameters()), model, loss_fn)
    scheduler = AlphaScheduler(guided, Hold(), guard=place)
    train("mlp", model, guided, loss_fn, 10, scheduler=scheduler)
    before = copy.deepcopy(model.state_dict())
    x, y = batch("mlp", 10)
    guided.zero_grad()
    loss_fn(model(x * math.nan), y).backward()
    guided.step()
    scheduler.step()
    assert equal_states(before, model.state_dict())
    assert guided.guard_counts["batches_skipped"] == 1
    train("mlp", model, guided, loss_fn, 3, scheduler=scheduler, start=11)
    rates = [group["lr"] for group in guided.param_groups]
    for group in guided.param_groups:  # a step that explodes
        group["lr"] = torch.full_like(group["lr"], 1e30) if torch.is_tensor(group["lr"]) else 1e30
    train("mlp", model, guided, loss_fn, 1, start=14)
    for group, rate in zip(guided.param_groups, rates, strict=True):
        group["lr"] = rate
    train("mlp", model, guided, loss_fn, 8, scheduler=scheduler, start=15)
    assert guided.guard_counts["steps_taken_back"] >= 1
    assert all(bool(torch.isfinite(param).all()) for param in model.parameters())


def test_steps_of_no_length_leave_no_nan():
    model, loss_fn = make("attention")
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.0), model, loss_fn)
    train("attention", model, guided, loss_fn, 4)
    for group in guided.param_groups:
        group["lr"] = 0.01
    train("attention", model, guided, loss_fn, 6, start=4)
    assert {m.status for m in list(guided.alpha_history)[5:]} <= {"measured", "concave"}
    assert {m.information for m in list(guided.alpha_history)[5:]} == {"full"}


def test_a_rate_is_found_as_on_the_cpu():
    def run(device, lr):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
        teacher = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 10)).to(device).requires_grad_(False)
        loss_fn = nn.CrossEntropyLoss()
        guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=lr), model, loss_fn)
        scheduler = AlphaScheduler(guided, total_steps=600)
        last = []
        for k in range(600):
            x = torch.randn(64, 20, generator=torch.Generator().manual_seed(k)).to(device)
            guided.zero_grad()
            loss = loss_fn(model(x), (5.0 * teacher(x)).argmax(1))
            loss.backward()
            guided.step()
            scheduler.step()
            last.append(loss.detach())
        return float(torch.stack(last[-50:]).mean())

    expected = run("cpu", 1e-3)
    for lr in (1e-6, 1e-3, 10.0):
        assert run(DEVICE, lr) < 1.15 * expected + 0.02


def test_a_range_test_leaves_everything_as_it_was():
    model, loss_fn = make("dropout")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train("dropout", model, optimizer, loss_fn, 3)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    random = torch.cuda.get_rng_state()
    found = find_lr(model, optimizer, [batch("dropout", k) for k in range(100)], loss_fn)
    assert len(found.history) > 20
    assert equal_states(before, (model.state_dict(), optimizer.state_dict()))
    assert torch.equal(random, torch.cuda.get_rng_state())


def test_a_model_that_was_moved_after_the_optimizer_was_wrapped():
    def run(wrapped):
        torch.manual_seed(0)
        model, loss_fn = Attention(dropout=0.3), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = AlphaGuided(optimizer, model, loss_fn, every=1) if wrapped else optimizer
        model.to(DEVICE)
        torch.manual_seed(1)
        train("dropout", model, optimizer, loss_fn, 8)
        return model.state_dict(), torch.cuda.get_rng_state(), optimizer

    bare, random, _ = run(False)
    guided, same, optimizer = run(True)
    assert equal_states(bare, guided)
    assert torch.equal(random, same)
    assert {m.information for m in optimizer.alpha_history} == {"full"}


@pytest.mark.compatibility("GPU", "parameters on two devices")
def test_a_model_on_two_devices():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY).to(DEVICE)

        def forward(self, x):
            return self.head(self.embedding(x).to(DEVICE)).transpose(1, 2)

    def run(wrapped):
        torch.manual_seed(0)
        model, loss_fn = Spread(), nn.CrossEntropyLoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
        scheduler = None
        if wrapped:
            optimizer = AlphaGuided(optimizer, model, loss_fn)
            scheduler = AlphaScheduler(optimizer, Hold())
        for k in range(8):
            x, y = batch("attention", k)
            optimizer.zero_grad()
            loss_fn(model(x.cpu()), y).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return model.state_dict(), optimizer

    bare, _ = run(False)
    guided, optimizer = run(True)
    assert equal_states(bare, guided)
    assert {m.information for m in optimizer.alpha_history} == {"full"}


@pytest.mark.compatibility("GPU", "CUDA graphs: a captured step is made and not measured, which is said")
def test_a_step_that_is_captured_into_a_graph_is_made_and_not_looked_at():
    def run(wrapped):
        model, loss_fn = make("mlp")
        optimizer = OPTIMIZERS["adamw, capturable"](model.parameters())
        optimizer = AlphaGuided(optimizer, model, loss_fn) if wrapped else optimizer
        x, y = batch("mlp", 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss_fn(model(x), y).backward()
            optimizer.step()

        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            loss_fn(model(x), y).backward()
            optimizer.step()
        for k in range(1, 5):
            new = batch("mlp", k)
            x.copy_(new[0])
            y.copy_(new[1])
            graph.replay()
        torch.cuda.synchronize()
        return model.state_dict(), optimizer

    bare, _ = run(False)
    with pytest.warns(UserWarning, match="recorded into a CUDA graph"):
        guided, optimizer = run(True)
    assert equal_states(bare, guided)
    assert len(optimizer.alpha_history) <= 3


def test_graphed_callables_keep_their_slopes():
    model, loss_fn = make("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own streams
        model = torch.cuda.make_graphed_callables(model, batch("mlp", 0)[:1])
        guided = AlphaGuided(OPTIMIZERS["adamw"](model.parameters()), model, loss_fn)
        train("mlp", model, guided, loss_fn, 6)
    assert len(guided.alpha_history) == 5
    assert all(math.isfinite(m.alpha) for m in guided.alpha_history)


@pytest.mark.compatibility("GPU", "torch.compile with Inductor, mode='reduce-overhead' too")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model(mode):
    def run(wrapped):
        model, loss_fn = make("mlp")
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the compiler imports
            compiled = torch.compile(model, mode=None if mode == "default" else mode)
            optimizer = AlphaGuided(optimizer, compiled, loss_fn) if wrapped else optimizer
            train("mlp", compiled, optimizer, loss_fn, 8)
        return model.state_dict(), optimizer

    bare, _ = run(False)
    guided, optimizer = run(True)
    assert equal_states(bare, guided)
    assert {m.information for m in optimizer.alpha_history} == {"full"}
