"""A real training run by Accelerate."""

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")

from alpha_optim import AlphaGuided, AlphaScheduler  # noqa: E402
from tests.test_transparency import equal_states  # noqa: E402
from tests.today import GPT, T, V  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.cpu.amp.autocast")


def samples():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, generator=generator), torch.randint(0, 3, (), generator=generator)) for _ in range(400)]


class Run:
    """Twenty batches of twenty samples an epoch."""

    def __init__(self, accumulate=1, precision=None, wrapped=True, scheduled=True):
        accelerate.state.AcceleratorState._reset_state(True)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        self.loss_fn = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        parts = [self.model, torch.utils.data.DataLoader(samples(), batch_size=20)]
        if wrapped:
            self.optimizer = AlphaGuided(self.optimizer, self.model, self.loss_fn)
        parts.append(self.optimizer)
        if scheduled:
            parts.append(AlphaScheduler(self.optimizer, total_steps=60))
        self.prepared, self.loader, self.stepper, *rates = self.accelerator.prepare(*parts)
        self.rates = rates[0] if rates else None

    def epochs(self, count, clip=False):
        for _ in range(count):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.prepared):
                    self.accelerator.backward(self.loss_fn(self.prepared(x), y))
                    if clip and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.prepared.parameters(), 0.1)
                    self.stepper.step()
                    if self.rates is not None:
                        self.rates.step()
                    self.stepper.zero_grad()
        return self


@pytest.mark.compatibility("Accelerate", "prepare, accelerator.backward")
def test_prepared_like_any_optimizer():
    run = Run().epochs(3)
    assert type(run.stepper).__name__ == "AcceleratedOptimizer"
    history = run.optimizer.alpha_history
    assert history.iterations.tolist() == list(range(59))
    assert {m.information for m in history} == {"full"}
    assert run.optimizer.param_groups[0]["lr"] != 1e-3
    assert run.stepper.param_groups is run.optimizer.param_groups


@pytest.mark.compatibility("Accelerate", "without a scheduler: bit for bit the bare optimizer")
def test_without_a_scheduler_nothing_is_changed():
    bare = Run(wrapped=False, scheduled=False).epochs(1)
    wrapped = Run(scheduled=False).epochs(1)
    assert equal_states(bare.model.state_dict(), wrapped.model.state_dict())


@pytest.mark.compatibility("Accelerate", "gradient accumulation, clip_grad_norm_")
@pytest.mark.parametrize("clip", [False, True])
def test_accumulation_is_one_batch(clip):
    run = Run(accumulate=2).epochs(3, clip)
    history = run.optimizer.alpha_history
    assert run.optimizer.iteration == 30
    assert len(history) == 29
    assert {m.samples_start for m in history} == {40}
    assert run.optimizer._session.pairing.habits.keep_copies is False


@pytest.mark.compatibility("Accelerate", "mixed_precision='bf16'")
def test_mixed_precision():
    first = Run().epochs(1).optimizer.alpha_history[0]
    history = Run(precision="bf16").epochs(1).optimizer.alpha_history
    assert {m.information for m in history} == {"full"}
    assert history[0].slope_start == pytest.approx(first.slope_start, rel=0.1)


@pytest.mark.compatibility("Accelerate", "a language model, accumulation and bf16 together")
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_language_model_with_accumulation(precision):
    def run(wrapped):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
        torch.manual_seed(0)
        model, loss_fn = GPT(dropout=0.1), nn.CrossEntropyLoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = AlphaGuided(optimizer, model, loss_fn) if wrapped else optimizer
        generator = torch.Generator().manual_seed(0)
        data = [torch.randint(0, V, (2, T), generator=generator) for _ in range(160)]
        net, loader, stepper = accelerator.prepare(model, torch.utils.data.DataLoader(data, batch_size=10), optimizer)
        for batch in loader:
            x, y = batch.unbind(1)
            with accelerator.accumulate(net):
                accelerator.backward(loss_fn(net(x).view(-1, V), y.reshape(-1)))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                stepper.step()
                stepper.zero_grad()
        return model, optimizer

    (bare, _), (model, guided) = run(False), run(True)
    assert equal_states(bare.state_dict(), model.state_dict())
    assert len(guided.alpha_history) == 7
    assert {m.information for m in guided.alpha_history[2:]} == {"full"}
    assert {m.samples_start for m in guided.alpha_history} == {20}


@pytest.mark.compatibility("Accelerate", "save_state, load_state: bit for bit")
def test_a_saved_state_resumes(tmp_path):
    whole = Run().epochs(2)
    Run().epochs(1).accelerator.save_state(tmp_path)
    resumed = Run()
    resumed.accelerator.load_state(tmp_path)
    resumed.epochs(1)
    assert equal_states(whole.model.state_dict(), resumed.model.state_dict())
    assert repr(list(whole.optimizer.alpha_history)) == repr(list(resumed.optimizer.alpha_history))
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]
