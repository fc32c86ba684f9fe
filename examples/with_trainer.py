"""Transformers' Trainer: hand over the wrapped optimizer and the scheduler with ``optimizers=``.

A small Llama with random weights learns the characters of Python's own library. Models of Transformers return their
loss, and the losses of single samples are seen where the model computes it, so nothing else is needed. Needs ``pip
install transformers accelerate``.
"""

from __future__ import annotations

import argparse
import json
import tempfile

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from alpha_optim import AlphaGuided, AlphaScheduler
from alpha_optim.integrations.transformers import AlphaCallback

LENGTH = 32


def characters(samples: int) -> list[dict[str, Tensor]]:
    """Pieces of the source of a module of the standard library, one byte per token."""
    with open(json.decoder.__file__, "rb") as file:
        text = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long().clamp_max(127)
    starts = torch.randint(len(text) - LENGTH, (samples,), generator=torch.Generator().manual_seed(0))
    pieces = [text[start : start + LENGTH] for start in starts.tolist()]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=1e-6), model)
    scheduler = AlphaScheduler(optimizer, total_steps=args.steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=16,
            logging_steps=max(1, args.steps // 6),
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=characters(2000),
            optimizers=(optimizer, scheduler),
            callbacks=[AlphaCallback(optimizer)],
        )
        trainer.train()
    print(optimizer.diagnose())


if __name__ == "__main__":
    main()
