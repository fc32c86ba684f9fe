"""Started by torchrun or accelerate launch: a run of a framework on two processes; writes what it found by rank."""

import os
import pathlib
import sys
import warnings

import torch
from torch import nn

from alpha_optim import AlphaGuided, AlphaScheduler
from tests.distributed import setups

STEPS = 120


def data():
    return [(x, y) for x, y in zip(*setups.batch(0, torch.float32, total=2 * 8 * STEPS), strict=True)]


def found(guided, model, scheduler):
    measured = list(guided.alpha_history)
    return {
        "alphas": [m.alpha for m in measured],
        "information": sorted({str(m.information) for m in measured[2:] if m.status != "no_step"}),
        "samples": sorted({m.samples_end for m in measured}),
        "rates": [m.lr for m in measured],
        "last": scheduler.get_last_lr(),
        "iteration": guided.iteration,
        "params": [param.detach().clone() for param in model.parameters()],
        "losses": [m.loss_end for m in measured],
    }


def by_lightning(folder):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.loss_fn = setups.mlp(torch.float32), nn.CrossEntropyLoss()

        def training_step(self, batch, index):
            return self.loss_fn(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            self.guided = AlphaGuided(torch.optim.AdamW(self.parameters(), lr=1e-5), self.net, self.loss_fn)
            self.scheduler = AlphaScheduler(self.guided, total_steps=STEPS)
            return {"optimizer": self.guided, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}

    module = Module()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, enable_model_summary=False, **options
    )
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=8))
    return module.guided, module, module.scheduler


def by_accelerate(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, loss_fn = setups.mlp(torch.float32), nn.CrossEntropyLoss()
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-5), model, loss_fn)
    scheduler = AlphaScheduler(guided, total_steps=STEPS)
    loader = torch.utils.data.DataLoader(data(), batch_size=8)
    net, optimizer, loader, rates = accelerator.prepare(model, guided, loader, scheduler)
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(net):
                accelerator.backward(loss_fn(net(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
    return guided, model, scheduler


def by_trainer(folder):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    guided = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-5), model)
    scheduler = AlphaScheduler(guided, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.arange(12) * int(torch.randint(1, 5, (), generator=generator)) % 32 for _ in range(2 * 8 * STEPS)]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            disable_tqdm=True,
            save_strategy="no",
            ddp_backend="gloo",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizers=(guided, scheduler),
    )
    trainer.train()
    return guided, model, scheduler


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = found(*{"lightning": by_lightning, "accelerate": by_accelerate, "trainer": by_trainer}[name](folder))
    here = pathlib.Path(__file__).parent  # warnings point at the line of the user, who is we
    said = [str(entry.message) for entry in caught if here in pathlib.Path(entry.filename).parents]
    torch.save({**result, "said": said}, folder / f"{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # without it gloo sometimes aborts at the end
        torch.distributed.destroy_process_group()
