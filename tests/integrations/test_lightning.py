"""A real training run by Lightning, in every way its trainer steps an optimizer."""

import logging
import pathlib
import re
import warnings

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

from alpha_optim import AlphaGuided, AlphaScheduler, Hold  # noqa: E402
from alpha_optim.integrations.lightning import AlphaLRFinder, AlphaMonitor  # noqa: E402
from tests.test_transparency import equal_states  # noqa: E402
from tests.today import GPT, T, V  # noqa: E402

BATCHES, TOTAL = 30, 60
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# Of Lightning and of what it imports, none of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
]


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(20, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator))
        for _ in range(BATCHES)
    ]


class Module(lightning.LightningModule):
    def __init__(self, wrapped=True, manual=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        self.loss_fn = nn.CrossEntropyLoss()
        self.automatic_optimization = not manual
        self.wrapped = wrapped
        self.rates = []

    def training_step(self, batch, index):
        x, y = batch
        if self.automatic_optimization:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return self.loss_fn(self.net(x), y)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss_fn(self.net(x), y))
        optimizer.step()
        self.lr_schedulers().step()
        return None

    def configure_optimizers(self):
        base = torch.optim.AdamW(self.parameters(), lr=1e-3)
        if not self.wrapped:
            return base
        self.guided = AlphaGuided(base, self.net, self.loss_fn)
        if self.wrapped == "alone":
            return self.guided
        scheduler = AlphaScheduler(self.guided, total_steps=TOTAL)
        return {"optimizer": self.guided, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module, checkpoint=None, **options):
    options = {"max_epochs": 2, "logger": False, **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return trainer


def make(**options):
    torch.manual_seed(0)
    return Module(**options)


@pytest.mark.compatibility("Lightning", "automatic optimization, a rate per step")
def test_automatic_optimization_measures_every_step_and_sets_the_rate():
    module = make()
    fit(module)
    history = module.guided.alpha_history
    assert history.iterations.tolist() == list(range(TOTAL - 1))
    assert {m.information for m in history} == {"full"}
    # Too short for a search: the rate given is held for half of the run, and then annealed.
    assert len(set(module.rates)) >= TOTAL / 2
    assert module.rates[-1] < 0.1 * module.rates[0]
    assert [m.lr[0] for m in history] == module.rates[: TOTAL - 1]


@pytest.mark.compatibility("Lightning", "without a scheduler: bit for bit the bare optimizer")
def test_without_a_scheduler_nothing_is_changed():
    bare, wrapped = make(wrapped=False), make(wrapped="alone")
    fit(bare)
    fit(wrapped)
    assert equal_states(bare.net.state_dict(), wrapped.net.state_dict())
    assert len(wrapped.guided.alpha_history) == TOTAL - 1


@pytest.mark.compatibility("Lightning", "manual optimization")
def test_manual_optimization():
    module = make(manual=True)
    fit(module)
    assert module.guided.iteration == TOTAL
    assert {m.information for m in module.guided.alpha_history} == {"full"}


@pytest.mark.compatibility("Lightning", "accumulate_grad_batches")
def test_accumulation_is_one_batch():
    module = make()
    fit(module, accumulate_grad_batches=3)
    history = module.guided.alpha_history
    assert len(history) == TOTAL // 3 - 1
    assert {m.samples_start for m in history} == {60}


@pytest.mark.compatibility("Lightning", "gradient_clip_val, by norm and by value")
@pytest.mark.parametrize(("algorithm", "lost"), [("norm", 0), ("value", 1)])
def test_clipping(algorithm, lost):
    module = make()
    fit(module, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
    history = module.guided.alpha_history
    assert len(history) == TOTAL - 1 - lost
    assert {m.information for m in history} == {"full"}


@pytest.mark.compatibility("Lightning", "precision: 16-mixed, bf16-mixed, bf16-true")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_precision(precision):
    exact, module = make(), make()
    fit(exact)
    fit(module, precision=precision)
    history = module.guided.alpha_history
    assert len(history) == TOTAL - 1
    assert {m.information for m in history} == {"full"}
    # The first steps are those of the run in full precision, up to rounding.
    first = exact.guided.alpha_history[0]
    assert history[0].loss_start == pytest.approx(first.loss_start, rel=0.02)
    if precision != "bf16-true":  # there most parameters are too coarse for a step this short: another direction
        assert history[0].slope_start == pytest.approx(first.slope_start, rel=0.2)


@pytest.mark.compatibility("Lightning", "its checkpoint resumes bit for bit")
def test_its_checkpoint_resumes(tmp_path):
    whole, first, second = make(), make(), make()
    fit(whole)
    fit(first, max_epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    fit(second, checkpoint=tmp_path / "run.ckpt")
    assert equal_states(whole.net.state_dict(), second.net.state_dict())
    assert repr(list(whole.guided.alpha_history)) == repr(list(second.guided.alpha_history))
    assert whole.rates[BATCHES:] == second.rates


@pytest.mark.compatibility("Lightning", "alpha in its loggers: AlphaMonitor")
def test_the_monitor_logs_alpha_over_the_steps_since_the_last_time(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    module = make()
    fit(module, logger=CSVLogger(tmp_path), callbacks=[AlphaMonitor(every=20)], log_every_n_steps=1)
    logged = CSVLogger(tmp_path, version=0)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert logged.name == "lightning_logs"
    table = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    table = [row for row in table if row.get("alpha_optim/alpha")]
    assert [int(row["step"]) for row in table] == [20, 40, 60]
    history = module.guided.alpha_history
    assert float(table[-1]["alpha_optim/alpha"]) == pytest.approx(history.windowed(20).alpha)
    assert float(table[-1]["alpha_optim/lr"]) == pytest.approx(history[-1].lr[0])


class Language(lightning.LightningModule):
    def __init__(self, wrapped):
        super().__init__()
        self.net, self.loss_fn, self.wrapped = GPT(dropout=0.1), nn.CrossEntropyLoss(), wrapped

    def training_step(self, batch, index):
        x, y = batch
        return self.loss_fn(self.net(x).view(-1, V), y.view(-1))

    def configure_optimizers(self):
        base = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        return AlphaGuided(base, self.net, self.loss_fn) if self.wrapped else base


@pytest.mark.compatibility("Lightning", "a language model, accumulate_grad_batches, bf16-mixed")
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "32-true"), (2, "32-true"), (1, "bf16-mixed")])
def test_a_language_model(tmp_path, accumulate, precision):
    def run(wrapped):
        torch.manual_seed(0)
        module, generator = Language(wrapped), torch.Generator().manual_seed(0)
        data = [tuple(torch.randint(0, V, (20, T), generator=generator) for _ in range(2)) for _ in range(16)]
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", precision=precision, accumulate_grad_batches=accumulate, logger=False,
            gradient_clip_val=1.0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
        return module.net, trainer.optimizers[0]

    (bare, _), (model, guided) = run(False), run(True)
    assert equal_states(bare.state_dict(), model.state_dict())
    assert len(guided.alpha_history) == 16 // accumulate - 1
    assert {m.information for m in guided.alpha_history[2:]} == {"full"}
    assert {m.samples_start for m in guided.alpha_history} == {20 * accumulate}


@pytest.mark.compatibility("Lightning", "weights averaged by its callback, which replaces the scheduler")
def test_a_replaced_scheduler_does_not_undo_the_average():
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    class Averaged(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
            self.loss_fn = nn.CrossEntropyLoss()

        def training_step(self, batch, index):
            x, _ = batch
            return self.loss_fn(self.net(x), x[:, :3].argmax(1))

        def configure_optimizers(self):
            base = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            self.guided = AlphaGuided(base, self.net, self.loss_fn)
            self.scheduler = AlphaScheduler(self.guided, Hold())
            return {"optimizer": self.guided, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}

    torch.manual_seed(0)
    module = Averaged()
    trainer = lightning.Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=0.5)],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    assert module.guided.guard_events == ()
    assert trainer.lr_scheduler_configs[0].scheduler is not module.scheduler
    module.eval()
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    assert module.loss_fn(module.net(x), x[:, :3].argmax(1)).item() < 0.4


class Plain(lightning.LightningModule):
    """A bare optimizer, and logs in its step."""

    def __init__(self, lr=1e-6):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.loss_fn = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), nn.CrossEntropyLoss()

    def training_step(self, batch, index):
        loss = self.loss_fn(self.net(batch[0]), batch[0][:, :3].argmax(1))
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def fit_plain(tmp_path, **options):
    torch.manual_seed(0)
    module, finder = Plain(), AlphaLRFinder(**options)
    before = [param.detach().clone() for param in module.parameters()]
    seen = []

    class Look(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.extend(param.detach().clone() for param in pl_module.parameters())

    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[finder, Look()],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches() * 4, batch_size=None))
    assert all(torch.equal(a, b) for a, b in zip(before, seen, strict=True))
    assert "log" not in vars(module)
    return module, finder, trainer


@pytest.mark.compatibility("Lightning", "a range test when fit begins: AlphaLRFinder")
def test_a_range_test_before_training(tmp_path):
    module, finder, trainer = fit_plain(tmp_path)
    assert finder.finding.lr > 1e-3
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.hparams.lr == 1e-6  # only said
    module, finder, trainer = fit_plain(tmp_path, attribute="lr")
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.hparams.lr == finder.finding.lr
    with pytest.raises(ValueError, match="have an attribute 'rate'"):
        fit_plain(tmp_path, attribute="rate")


class Validated(Module):
    """Validated after every few steps, by a figure that is worse every time."""

    def configure_optimizers(self):
        optimizer = AlphaGuided(torch.optim.AdamW(self.parameters(), lr=1e-3), self.net, self.loss_fn)
        scheduler = AlphaScheduler(optimizer, total_steps=300)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self):
        self.log("figure", float(self.trainer.global_step))

    def validation_step(self, batch, index):
        self.log("validated", float(self.trainer.global_step))


@pytest.mark.parametrize("figure", ["figure", "validated"])
def test_early_stopping_as_in_the_recipe_counts_from_the_end_of_the_search(tmp_path, figure):
    """Whether it is asked after epochs or after validation."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "EarlyStoppingAfterSearch" in block]
    names = {}
    exec(code, names)
    stopping = names["EarlyStoppingAfterSearch"](figure, patience=1, check_on_train_epoch_end=figure == "figure")
    module = Validated()
    data = torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer = lightning.Trainer(
        max_steps=300, callbacks=[stopping], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data, data)
    begun = {name: n for n, name in module.lr_schedulers().policy.phases}
    assert begun["held"] > 2 * BATCHES  # several epochs lie within the search, any two of which would have stopped it
    assert begun["held"] < trainer.global_step <= begun["held"] + 3 * BATCHES
    assert trainer.should_stop
