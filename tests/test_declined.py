"""Where samples cannot be told apart: one short warning, the right slopes, nothing raised, nothing claimed."""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alpha_optim import AlphaGuided
from alpha_optim.slopes import forward_mode
from tests.test_transparency import equal_states
from tests.today import GPT, Experts, Recurrent, T, V
from tests.zoo import TwoHeads

N = 8


class Pair(nn.Module):
    """Two encoders and a bare root parameter, as CLIP has; returns the similarities, or what they are made of."""

    def __init__(self, similarities):
        super().__init__()
        self.image, self.text = nn.Linear(6, 5), nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.similarities = similarities

    def forward(self, x, z):
        image, text = F.normalize(self.image(x), dim=1), F.normalize(self.text(z), dim=1)
        return self.scale.exp() * image @ text.t() if self.similarities else (image, text, self.scale.exp())


class Contrastive(nn.Module):
    """Returns its loss, which couples the samples of a batch."""

    def __init__(self):
        super().__init__()
        self.pair = Pair(True)

    def forward(self, x, z):
        logits = self.pair(x, z)
        return {"loss": F.cross_entropy(logits, torch.arange(len(x))), "logits": logits}


def data(samples, generator):
    return (
        torch.randn(samples, 6, generator=generator),
        torch.randn(samples, 4, generator=generator),
        torch.randint(0, 3, (samples,), generator=generator),
    )


def clip_similarities(model, loss_fn, batch):
    x, z, _ = batch
    logits = model(x, z)
    labels = torch.arange(len(x))
    return (loss_fn(logits, labels) + loss_fn(logits.t(), labels)) / 2


def info_nce(model, loss_fn, batch):
    x, z, _ = batch
    image, text, scale = model(x, z)
    return loss_fn(scale * image @ text.t(), torch.arange(len(x)))


def returned(model, loss_fn, batch):
    return model(*batch[:2])["loss"]


def two_losses(model, loss_fn, batch):
    x, z, y = batch
    one, two = model(x)
    return loss_fn(one, y) + 5.0 * F.mse_loss(two.squeeze(1), z[:, 0])


def one_output_twice(model, loss_fn, batch):
    x, _, y = batch
    one, _ = model(x)
    return loss_fn(one, y) + 0.5 * one.square().mean()


def balance(model, loss_fn, batch):
    x, y = batch
    return loss_fn(model(x).view(-1, V), y.view(-1)) + 0.5 * model.balance


def masked(model, loss_fn, batch):
    x, _, y = batch
    chosen = torch.arange(len(x)) % 3 == 0
    return loss_fn(model(x)[chosen], y[chosen])


def last(model, loss_fn, batch):
    x, _, y = batch
    return loss_fn(model(x)[-5:], y[-5:])


def time_first(model, loss_fn, batch):
    x, y = batch
    output = model(x.t())
    logits = output[0] if isinstance(output, tuple) else output
    return loss_fn(logits.flatten(0, 1), y.t().flatten())


def tokens(samples, generator):
    return tuple(torch.randint(0, V, (samples, T), generator=generator) for _ in range(2))


class TimeFirst(nn.Module):
    """Attention over dimension 0."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 8), nn.Linear(8, V)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)))


def linear():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


CASES = {
    "clip, similarities": (lambda: Pair(True), clip_similarities, data, "samples interact"),
    "info nce": (lambda: Pair(False), info_nce, data, "samples interact"),
    "contrastive loss returned": (Contrastive, returned, data, "samples interact"),
    "two losses, one seen": (lambda: TwoHeads(3, 1), two_losses, data, "not all of the loss"),
    "two losses of one output": (lambda: TwoHeads(3, 1), one_output_twice, data, "not all of the loss"),
    "balance of a router": (Experts, balance, tokens, "not all of the loss"),
    "subset by a mask": (linear, masked, data, "subset picked by a mask"),
    "the last rows": (linear, last, data, "subset picked by a mask"),
    "time first, lstm": (lambda: Recurrent(nn.LSTM, False), time_first, tokens, "sample_dim"),
    "time first, attention": (TimeFirst, time_first, tokens, "sample_dim"),
}


def train(name, wrapped, samples, kind, autocast=None, **options):
    build, loss_of, make, _ = CASES[name]
    torch.manual_seed(0)
    model, loss_fn, generator = build(), nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
    optimizer = kind(model.parameters(), lr=0.01)
    optimizer = (
        AlphaGuided(optimizer, model, None if name.endswith("returned") else loss_fn, **options)
        if wrapped
        else optimizer
    )
    slopes = []
    for _ in range(9):
        batch = make(samples, generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = loss_of(model, loss_fn, batch)
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        gradients = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        optimizer.step()
        changes = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        length = torch.stack([c.norm() for c in changes]).norm()
        slopes.append(float(sum((c * g).sum() for c, g in zip(changes, gradients, strict=True)) / length))
    return model, optimizer, slopes


@pytest.mark.compatibility(
    "Models", "contrastive losses, terms beside loss_fn, subsets by mask, time first unsaid: slopes, and a warning"
)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("samples", [N, 40])
@pytest.mark.parametrize("variance", ["sampled", "exact"])
@pytest.mark.parametrize("name", CASES)
def test_declined_never_wrong(name, samples, variance, kind):
    bare, _, _ = train(name, False, samples, kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, guided, slopes = train(name, True, samples, kind, variance=variance)
    said = [str(warning.message) for warning in caught]
    assert [text for text in said if CASES[name][3] in text], said
    assert all(len(text) < 500 for text in said)
    assert len(said) <= 2
    assert equal_states(bare.state_dict(), model.state_dict())
    assert {m.information for m in guided.alpha_history} == {"slopes"}
    measured = [m.slope_start for m in guided.alpha_history]
    assert measured == pytest.approx(slopes[:8], rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("variance", ["sampled", "exact"])
def test_time_first_with_sample_dim_is_full(variance):
    torch.manual_seed(0)
    model, loss_fn, generator = TimeFirst(), nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    guided = AlphaGuided(adamw, model, loss_fn, sample_dim=1, variance=variance)
    for _ in range(6):
        guided.zero_grad()
        time_first(model, loss_fn, tokens(40, generator)).backward()
        guided.step()
    assert {m.information for m in guided.alpha_history} == {"full"}
    assert {m.samples_start for m in guided.alpha_history} == {40}


def clamped(losses, y):
    return losses.clamp(max=float(losses.detach().median())).mean()


def hardest(losses, y):
    return losses.topk(len(losses) // 2).values.mean()


def masked_by_product(losses, y):
    counts = (y != 0).float()
    return (losses * counts).sum() / counts.sum()


@pytest.mark.parametrize("reduce", [clamped, hardest, masked_by_product])
def test_losses_of_reduction_none_that_are_left_out(reduce):
    """A mask leaves out losses of any size; what leaves them out by size is no mean over samples."""
    torch.manual_seed(0)
    model, loss_fn, generator = linear(), nn.CrossEntropyLoss(reduction="none"), torch.Generator().manual_seed(1)
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.01), model, loss_fn)
    sent = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            x, _, y = data(N, generator)
            guided.zero_grad()
            loss = reduce(loss_fn(model(x), y), y)
            loss.backward()
            sent.append(loss.item())
            guided.step()
    said = [str(warning.message) for warning in caught]
    seen = {m.information for m in guided.alpha_history if m.iteration > 2}
    if reduce is masked_by_product:
        assert not said
        assert seen == {"full"}
        losses = [m.loss_start for m in guided.alpha_history][2:]
        assert losses == pytest.approx(sent[2:-1], rel=1e-5)
    else:
        assert [text for text in said if "clamped" in text], said
        assert "full" not in seen


# ------------------------------------------------------------------ situations from public reports


@pytest.mark.compatibility("Models", "sparse and nested tensors as inputs: never an exception")
@pytest.mark.parametrize("backend", ["auto", "layerwise", "gradients", "cached"])
@pytest.mark.parametrize("layout", ["coo", "csr", "nested"])
@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning", "ignore:Sparse CSR:UserWarning")
@pytest.mark.filterwarnings("ignore:no slopes of single samples:UserWarning")
def test_inputs_that_are_no_plain_rows(layout, backend):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, given):
            if layout == "nested":
                rows = self.layer(given).to_padded_tensor(0.0)
                return self.head(rows.sum(1))
            return self.head(torch.sparse.mm(given, self.layer.weight.t()) + self.layer.bias)

    torch.manual_seed(0)
    model, loss_fn = Model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.Adam(model.parameters()), model, loss_fn, backend=backend)
    for _ in range(5):
        dense = torch.randn(7, 5) * (torch.rand(7, 5) < 0.5)
        given = {
            "coo": dense.to_sparse,
            "csr": dense.to_sparse_csr,
            "nested": lambda: torch.nested.nested_tensor([torch.randn(k % 3 + 1, 5) for k in range(7)]),
        }[layout]()
        guided.zero_grad()
        loss_fn(model(given), torch.randint(0, 3, (7,))).backward()
        guided.step()
    assert len(guided.alpha_history) == 4
    if backend in ("auto", "layerwise") and layout != "nested":
        assert {m.information for m in guided.alpha_history} == {"full"}


@pytest.mark.compatibility("Loops", "torch.func transforms of the model in the loop")
@pytest.mark.parametrize("transform", ["vmap grad", "jacrev", "hessian", "grad"])
def test_functorch_calls_in_the_loop_are_not_ours(transform):
    from torch.func import functional_call, grad, hessian, jacrev, vmap

    def run(wrapped):
        torch.manual_seed(0)
        model, loss_fn = linear(), nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(model.parameters())
        optimizer = AlphaGuided(optimizer, model, loss_fn) if wrapped else optimizer
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            x, _, y = data(6, generator)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            params = {name: p.detach() for name, p in model.named_parameters()}

            def loss_of(values, a, b):
                return loss_fn(functional_call(model, values, (a.reshape(-1, 6),)), b.reshape(-1))

            def output_of(a, values=params):
                return functional_call(model, values, (a,)).sum(0)

            if transform == "vmap grad":
                vmap(grad(loss_of), (None, 0, 0))(params, x, y)
            elif transform == "jacrev":
                jacrev(output_of)(x)
            elif transform == "hessian":
                hessian(output_of)(x[:1])
            else:
                grad(loss_of)(params, x, y)
            optimizer.step()
        return model, optimizer

    (bare, _), (model, guided) = run(False), run(True)
    assert equal_states(bare.state_dict(), model.state_dict())
    assert {m.information for m in guided.alpha_history} == {"full"}


@pytest.mark.compatibility("Models", "lazy layers, wrapped before their first forward pass")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_lazy_layers(kind):
    def run(wrapped):
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3)), nn.CrossEntropyLoss()
        optimizer = kind(model.parameters(), lr=0.01)
        optimizer = AlphaGuided(optimizer, model, loss_fn) if wrapped else optimizer
        generator = torch.Generator().manual_seed(0)
        for _ in range(7):
            x, _, y = data(6, generator)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        return model, optimizer

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules")
        (bare, _), (model, guided) = run(False), run(True)
    assert equal_states(bare.state_dict(), model.state_dict())
    assert guided.alpha_history[-1].information == "full"


@pytest.mark.compatibility("torch.optim", "Adafactor without a rate of its own (Transformers): measured")
def test_an_optimizer_without_a_rate(tmp_path):
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    torch.manual_seed(0)
    model, loss_fn, generator = linear(), nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
    adafactor = transformers.Adafactor(model.parameters(), lr=None, relative_step=True, warmup_init=True)
    guided = AlphaGuided(adafactor, model, loss_fn)
    for _ in range(5):
        x, _, y = data(6, generator)
        guided.zero_grad()
        loss_fn(model(x), y).backward()
        guided.step()
    assert {m.information for m in guided.alpha_history} == {"full"}
    assert all(rate != rate for m in guided.alpha_history for rate in m.lr)  # nan: it has none
    guided.alpha_history.save(tmp_path / "history.jsonl")
    guided.load_state_dict(guided.state_dict())
    from alpha_optim import AlphaScheduler

    with pytest.raises(ValueError, match="finds its own learning rate"):
        AlphaScheduler(guided)


class SAM(torch.optim.Optimizer):
    """Moves to w + e before it calls the closure, and back to w for the step."""

    def __init__(self, base, rho=0.05):
        self.base, self.rho = base, rho
        super().__init__(base.param_groups, base.defaults)
        self.param_groups = base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        moves = [self.rho * p.grad / norm for p in params]
        for p, e in zip(params, moves, strict=True):
            p.add_(e)
        self.zero_grad()
        loss = closure()
        for p, e in zip(params, moves, strict=True):
            p.sub_(e)
        self.base.step()
        return loss


@pytest.mark.compatibility("Loops", "SAM: measured from the entry of step")
def test_sam_is_measured_from_the_entry_of_its_step():
    def run(wrapped):
        torch.manual_seed(0)
        model, loss_fn, generator = linear().double(), nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer = AlphaGuided(optimizer, model, loss_fn) if wrapped else optimizer
        slopes = []
        for _ in range(6):
            x, _, y = data(6, generator)

            def closure(x=x, y=y):
                loss = loss_fn(model(x.double()), y)
                loss.backward()
                return loss

            optimizer.zero_grad()
            closure()
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            optimizer.step(closure)
            d = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
            slopes.append(float(gradient @ d / d.norm()))
        return model, optimizer, slopes

    bare, _, expected = run(False)
    model, guided, _ = run(True)
    assert equal_states(bare.state_dict(), model.state_dict())
    assert len(guided.alpha_history) == 5
    assert [m.slope_start for m in guided.alpha_history] == pytest.approx(expected[:5], rel=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_language_model(backend):
    torch._dynamo.reset()

    def run(wrapped):
        torch.manual_seed(0)
        model, loss_fn, generator = GPT(), nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
        net = torch.compile(model, backend=backend)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        optimizer = AlphaGuided(optimizer, net, loss_fn) if wrapped else optimizer
        for _ in range(8):
            x, y = tokens(20, generator)
            optimizer.zero_grad()
            loss_fn(net(x).view(-1, V), y.view(-1)).backward()
            optimizer.step()
        return model, optimizer

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        bare, _ = run(False)
        torch._dynamo.utils.counters.clear()
        model, guided = run(True)
    assert equal_states(bare.state_dict(), model.state_dict())
    assert {m.information for m in guided.alpha_history} == {"full"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1
    torch._dynamo.reset()


@pytest.mark.compatibility("Models", "compiled children of a model")
def test_a_model_with_a_compiled_child():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, loss_fn, generator = GPT(), nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1].compile(backend="eager")
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.01), model, loss_fn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="The .grad attribute")  # that Dynamo reads
        for _ in range(6):
            x, y = tokens(20, generator)
            guided.zero_grad()
            loss_fn(model(x).view(-1, V), y.view(-1)).backward()
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"full"}
    torch._dynamo.reset()


@dataclass
class LogitsAndHidden:
    logits: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("made", [LogitsAndHidden, SimpleNamespace, dict, Frozen])
def test_an_output_beside_what_it_was_made_from(made):
    """What reaches the hidden state through the logits is not the loss's own; a frozen one cannot be taken apart."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            hidden = self.inner(x).tanh()
            return made(logits=self.outer(hidden), hidden=hidden)

    torch.manual_seed(0)
    model, loss_fn = Model(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters()), model, loss_fn, variance="exact")
    expected = pytest.warns(UserWarning, match="not all of the loss") if made is Frozen else nullcontext()
    with expected:
        for _ in range(4):
            guided.zero_grad()
            output = model(torch.randn(12, 6))
            loss_fn(output["logits"] if made is dict else output.logits, torch.randint(0, 3, (12,))).backward()
            assert type(output) is made
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"slopes" if made is Frozen else "full"}


class SplitOutput(nn.Module):
    """Returns two outputs of one function."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x):
        return torch.einsum("ni,kij->nkj", x, self.weight).unbind(1)


class UsesOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.split, self.head = SplitOutput(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.split(x)[0].tanh())


@pytest.mark.parametrize("backend", ["auto", "layerwise", "cached"])
def test_an_output_that_nobody_uses_of_a_function_with_several(backend):
    """Torch calls hooks on it with None; so it does for the state that cuDNN's recurrent layers return."""
    torch.manual_seed(0)
    model, loss_fn = UsesOne(), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters()), model, loss_fn, backend=backend, variance="exact")
    for _ in range(5):
        guided.zero_grad()
        loss_fn(model(torch.randn(12, 6)), torch.randint(0, 3, (12,))).backward()
        guided.step()
    assert {m.information for m in guided.alpha_history} == {"full"}
    assert guided.alpha_history.dropped == {}


@pytest.mark.parametrize("name", CASES)
def test_what_is_declined_in_tf32(name, monkeypatch):
    """Rounding is allowed for where a GPU's products are coarser; samples that interact are noticed all the same."""
    monkeypatch.setattr(forward_mode, "in_tf32", lambda model: True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, guided, _ = train(name, True, 40, torch.optim.SGD)
    assert [warning for warning in caught if CASES[name][3] in str(warning.message)]
    assert {m.information for m in guided.alpha_history} == {"slopes"}


@pytest.fixture
def without_onednn():
    """The kernels of its LSTM run in no 16 bits on CPUs without AVX-512."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(enabled)


@pytest.mark.usefixtures("without_onednn")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("samples", [N, 40])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"balance of a router"}))  # torch runs it in no 16 bits
def test_what_is_declined_under_autocast(name, samples, kind):
    """Rounding to 16 bits could hide that samples interact."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, guided, _ = train(name, True, samples, kind, torch.bfloat16)
    assert [warning for warning in caught if CASES[name][3] in str(warning.message)]
    assert {m.information for m in guided.alpha_history} == {"slopes"}


class AsksForAType(nn.Module):
    """Knows what to do in bf16 only, or has no memory for more."""

    def __init__(self, error, rows):
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 3)
        self.error, self.rows = error, rows

    def forward(self, x):
        h = self.one(x)
        if h.dtype is not torch.bfloat16 and len(x) >= self.rows:
            raise self.error
        return self.two(h.tanh())


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(
    "error", [KeyError("float32"), torch.OutOfMemoryError("out of memory")], ids=["type", "memory"]
)
def test_a_model_that_runs_under_autocast_only(error, rows):
    torch.manual_seed(0)
    model, loss_fn = AsksForAType(error, rows), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters()), model, loss_fn)
    for _ in range(6):
        guided.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(model(torch.randn(64, 6)), torch.randint(0, 3, (64,)))
        loss.backward()
        guided.step()
    assert {m.information for m in guided.alpha_history} == {"full"}
    assert guided.alpha_history[-1].samples_start == 64


class Tempered(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.temperature, self.reduction = nn.Parameter(torch.ones(())), "mean"

    def forward(self, output, y):
        return F.cross_entropy(output * self.temperature, y, reduction=self.reduction)


@pytest.mark.parametrize("trained", [False, True])
def test_a_parameter_of_the_loss_that_is_trained_is_the_reason_told(trained):
    torch.manual_seed(0)
    model, loss_fn, generator = nn.Linear(6, 3), Tempered(), torch.Generator().manual_seed(0)
    params = [*model.parameters(), *(loss_fn.parameters() if trained else ())]
    guided = AlphaGuided(torch.optim.AdamW(params, lr=0.01), model, loss_fn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            x, _, y = data(N, generator)
            guided.zero_grad()
            loss_fn(model(x), y).backward()
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"slopes" if trained else "full"}
    told = [str(warning.message) for warning in caught]
    assert len(told) == trained
    assert all("parameters of the loss function are trained" in text for text in told)


def test_an_empty_batch_is_no_subset():
    torch.manual_seed(0)
    model, loss_fn, generator = nn.Linear(6, 3), nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=0.01), model, loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in (N, N, 0, N, N):
            x, _, y = data(samples, generator)
            guided.zero_grad()
            loss = loss_fn(model(x), y)
            if samples:
                loss.backward()
                guided.step()
    with pytest.warns(UserWarning, match="a subset picked by a mask"):
        x, _, y = data(N, generator)
        guided.zero_grad()
        loss_fn(model(x)[:5], y[:5]).backward()
        guided.step()


class Centred(nn.Module):
    """Every sample sees the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.below(x))
        return self.above(h - h.mean(0))


@pytest.mark.parametrize("backend", ["backpack", "cached", "layerwise"])
@pytest.mark.parametrize("name", ["two losses", "centred"])
def test_a_backend_that_was_asked_for_declines_for_good(name, backend):
    """Checks lie far apart, and between them nothing is claimed either."""
    torch.manual_seed(0)
    model, loss_fn, generator = (
        TwoHeads(3, 1) if name == "two losses" else Centred(),
        nn.CrossEntropyLoss(),
        torch.Generator(),
    )
    guided = AlphaGuided(torch.optim.SGD(model.parameters(), lr=0.01), model, loss_fn, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(80):
            batch = data(N, generator)
            guided.zero_grad()
            if name == "two losses":
                two_losses(model, loss_fn, batch).backward()
            else:
                loss_fn(model(batch[0]), batch[-1]).backward()
            guided.step()
    assert {m.information for m in guided.alpha_history} == {"slopes"}
    assert len(caught) == 1
