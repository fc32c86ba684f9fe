"""A small GPT on text, from three initial rates, its loss as people write it: flattened logits, clipping, dropout.

python -m examples.ex4_language_model
python -m examples.ex4_language_model --bare 3e-2    # AdamW alone, with a short warm-up and a linear decay
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from alpha_optim import AlphaGuided, AlphaScheduler
from examples.data import pieces, text

LENGTH, BATCH, WIDTH = 32, 16, 64


class Gpt(nn.Module):
    """Two blocks of causal attention, positions from ``arange``, the head tied to the embedding."""

    spread_of_positions = 0.02
    """Of their embedding at first, as of that of tokens: with PyTorch's 1 tokens drown in positions."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        with torch.no_grad():
            self.positions.weight.mul_(self.spread_of_positions)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, T, vocabulary]`` of the next letters."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        logits: Tensor = self.head(self.blocks(hidden, mask=mask, is_causal=True))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--bare", type=float, metavar="LR", help="without alpha, at this learning rate")
    args = parser.parse_args()
    steps = args.steps
    codes, vocabulary = text()
    training, held_out = codes[: -len(codes) // 10], codes[-len(codes) // 10 :]
    x, y = pieces(training, LENGTH, steps * BATCH, seed=0)
    x_test, y_test = pieces(held_out, LENGTH, 256, seed=1)
    loss_fn = nn.CrossEntropyLoss()
    for lr in (1e-6, 1e-3, 10.0) if args.bare is None else (args.bare,):
        torch.manual_seed(0)
        model = Gpt(vocabulary)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        if args.bare is None:
            optimizer = AlphaGuided(optimizer, model, loss_fn)
            scheduler: LRScheduler = AlphaScheduler(optimizer, total_steps=steps)
        else:
            scheduler = LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 20) * (1.0 - n / steps))
        for step in range(steps):
            batch = slice(step * BATCH, (step + 1) * BATCH)
            optimizer.zero_grad()
            loss_fn(model(x[batch]).flatten(0, 1), y[batch].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        model.eval()
        with torch.no_grad():
            loss = float(loss_fn(model(x_test).flatten(0, 1), y_test.flatten()))
        if not isinstance(optimizer, AlphaGuided):
            print(f"bare, lr {lr:g}: held-out loss {loss:.2f}")
            continue
        last = optimizer.alpha_history[-1]
        print(f"from lr {lr:g}: held-out loss {loss:.2f} ({last.information}, {last.samples_start} samples a batch)")
        print(f"    {scheduler.policy.story[-1][1]}")  # type: ignore[attr-defined] # - an AlphaScheduler


if __name__ == "__main__":
    main()
