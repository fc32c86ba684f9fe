"""A real training run by the Trainer of Transformers: a small Llama with random weights."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs Accelerate, which is not installed")

from alpha_optim import AlphaGuided, AlphaScheduler  # noqa: E402
from alpha_optim.integrations.transformers import AlphaCallback  # noqa: E402
from tests.test_transparency import equal_states  # noqa: E402

STEPS = 20
transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def tokens():
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randint(0, 64, (16,), generator=generator) for _ in range(80)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def train(tmp_path, complete=False, wrapped=True, scheduled=True, resume=None, logged=False, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model, loss_fn = transformers.LlamaForCausalLM(config), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if wrapped:
        optimizer = AlphaGuided(optimizer, model, loss_fn if complete else None)
    scheduler = AlphaScheduler(optimizer, total_steps=STEPS) if scheduled else None
    if scheduler is None:
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    def loss_of(outputs, labels, num_items_in_batch=None):
        return loss_fn(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            num_train_epochs=2,
            per_device_train_batch_size=8,
            logging_steps=5,
            disable_tqdm=True,
            **{"report_to": [], "save_strategy": "no", "max_grad_norm": 0.5, **options},
        ),
        train_dataset=tokens(),
        optimizers=(optimizer, scheduler),
        compute_loss_func=loss_of if complete else None,
        callbacks=[AlphaCallback(optimizer)] if logged is True else None,
    )
    if logged == "later":
        trainer.add_callback(AlphaCallback(optimizer))
    trainer.train(resume_from_checkpoint=resume)
    return model, optimizer, trainer


@pytest.mark.compatibility("Trainer", "optimizers=(optimizer, scheduler), the model returns its loss: the full fit")
def test_the_loss_that_the_model_returns_is_seen(tmp_path):
    _, optimizer, trainer = train(tmp_path)
    history = optimizer.alpha_history
    assert history.iterations.tolist() == list(range(STEPS - 1))
    assert {m.information for m in history} == {"full"}
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert len(rates) == 4
    assert rates == sorted(rates, reverse=True)  # too short for a search: held, then annealed
    assert rates[-1] < 0.2 * rates[0]


@pytest.mark.compatibility("Trainer", "compute_loss_func: the full fit")
def test_one_line_makes_it_complete(tmp_path):
    _, optimizer, _ = train(tmp_path, complete=True)
    assert {m.information for m in optimizer.alpha_history} == {"full"}


@pytest.mark.compatibility("Trainer", "without AlphaScheduler: bit for bit the bare optimizer")
def test_without_a_scheduler_nothing_is_changed(tmp_path):
    bare, _, _ = train(tmp_path, wrapped=False, scheduled=False)
    model, _, _ = train(tmp_path, scheduled=False)
    assert equal_states(bare.state_dict(), model.state_dict())


@pytest.mark.compatibility("Trainer", "gradient_accumulation_steps, bf16, activation checkpointing")
@pytest.mark.parametrize(
    ("options", "samples"),
    [({"gradient_accumulation_steps": 2}, 16), ({"bf16": True}, 8), ({"checkpointing": True}, 8)],
)
@pytest.mark.parametrize("complete", [True, False])
def test_ways_of_training(tmp_path, options, samples, complete):
    if options.get("checkpointing"):
        options = {"gradient_checkpointing": True}
    _, optimizer, trainer = train(tmp_path, complete=complete, logged=True, **options)
    history = optimizer.alpha_history
    assert {m.information for m in history[2:]} == {"full"}
    assert {m.samples_start for m in history} == {samples}
    # The loss is that of the whole batch, whatever the micro-batches were divided by.
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    first = [m.loss_start for m in history if m.iteration < 5]
    # This loss function does not divide by num_items_in_batch, and the Trainer adds its micro-batches up.
    passes = samples // 8 if complete else 1
    assert sum(first) / len(first) == pytest.approx(logged[0] / passes, rel=2e-2)


@pytest.mark.compatibility("Trainer", "its checkpoint resumes bit for bit")
def test_its_checkpoint_resumes(tmp_path):
    whole, optimizer, _ = train(tmp_path, save_strategy="epoch")
    model, resumed, _ = train(tmp_path, resume=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert equal_states(whole.state_dict(), model.state_dict())
    assert repr(list(optimizer.alpha_history)) == repr(list(resumed.alpha_history))


@pytest.mark.compatibility("Trainer", "alpha in its logs: AlphaCallback")
def test_the_callback_puts_alpha_into_the_logs(tmp_path):
    _, optimizer, trainer = train(tmp_path, logged=True)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4
    assert all("alpha" in row and "alpha_std" in row for row in rows)
    assert rows[-1]["alpha"] == pytest.approx(optimizer.alpha_history.windowed(5).alpha)
    assert not any("alpha" in row for row in trainer.state.log_history if "loss" not in row)
    assert rows[-1]["found_lr"] == pytest.approx(1e-3)  # too short for a search


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("later", [False, True])
def test_reporters_get_alpha_too(tmp_path, monkeypatch, later):
    """They are asked before callbacks that are given, or added later."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(tmp_path, logged="later" if later else True, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in events.Scalars("train/alpha")] == [5, 10, 15, 20]
