"""What is trained: a small problem, one loop around it, and what may happen in between."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.problems import for_matrices

RATES = {"adam": 3e-3, "momentum": 0.05, "sgd": 0.2}


def base_optimizer(kind: str, params: Any, lr: float | None = None) -> torch.optim.Optimizer:
    lr = RATES[kind] if lr is None else lr
    if kind == "adam":
        return torch.optim.Adam(params, lr=lr)
    return torch.optim.SGD(params, lr=lr, momentum=0.9 if kind == "momentum" else 0.0)


class Setup:
    """A small classification, undisturbed.

    Others change parts of it.

    Attributes:
        wrap_loss: Whether `AlphaGuided` is given the loss function.
        cosine: Whether the rate follows a cosine.
        shortest: So many steps at least tell something.
    """

    batch, features, classes, noise = 32, 10, 4, 0.3
    wrap_loss, cosine, shortest = True, False, 120

    def __init__(self, seed: int, steps: int, kind: str = "adam", lr: float | None = None) -> None:
        self.seed, self.steps, self.kind, self.lr = seed, steps, kind, lr
        torch.manual_seed(seed)
        self.rng = torch.Generator().manual_seed(1000 + seed)
        teacher = torch.Generator().manual_seed(7)
        self.teacher = (
            torch.randn(self.features, 16, generator=teacher),
            torch.randn(16, self.classes, generator=teacher),
        )
        self.loss_fn: nn.Module = nn.CrossEntropyLoss()
        self.model = self.build()
        self.base = self.optimizer()

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.features, 32), nn.ReLU(), nn.Linear(32, self.classes))

    def optimizer(self) -> Any:
        return base_optimizer(self.kind, self.model.parameters(), self.lr)

    def samples(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, self.features, generator=rng)
        logits = (x @ self.teacher[0]).relu() @ self.teacher[1]
        logits = logits + self.noise * torch.randn(count, self.classes, generator=rng)
        return x, logits.argmax(1)

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        return self.samples(self.batch, self.rng)

    def loss(self, n: int) -> Tensor:
        x, y = self.data(n)
        return self.loss_fn(self.model(x), y)

    def before(self, n: int, run: Any) -> None:
        """Before the batch of call ``n``."""

    def after(self, n: int, run: Any) -> None:
        """After its step."""

    def step(self, n: int, run: Any) -> None:
        """Make one call of the loop."""
        run.optimizer.zero_grad()
        loss = self.loss(n)
        loss.backward()
        run.step(loss)

    def evaluated(self) -> nn.Module:
        return self.model

    def evaluate(self) -> float:
        """The loss to be compared, lower is better; on data that was not trained on."""
        x, y = self.samples(2000, torch.Generator().manual_seed(5))
        model = self.evaluated().eval()
        with torch.no_grad():
            loss = F.cross_entropy(model(x), y).item()
        model.train()
        return loss


class BatchNormed(Setup):
    """A network with BatchNorm."""

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(self.features, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, self.classes)
        )  # fmt: skip


class _Cosine(nn.Module):
    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 32))
        self.directions = nn.Parameter(0.1 * torch.randn(classes, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.inner(x), dim=1) @ F.normalize(self.directions, dim=1).T / 0.1


class Normalised(Setup):
    """Logits are cosine similarities, so that nothing but the direction of the weights counts."""

    def build(self) -> nn.Module:
        return _Cosine(self.features, self.classes)


# ---------------------------------------------------------------- case 2: buffers that are no state


class _Masked(nn.Module):
    def __init__(self, features: int, classes: int, fill: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, classes))
        mask = torch.zeros(40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), fill)
        self.register_buffer("mask", mask.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.0 * self.mask[0, 0].float()


class Mask(Setup):
    """A causal mask as a buffer."""

    fill, dtype = -math.inf, torch.float32

    def build(self) -> nn.Module:
        return _Masked(self.features, self.classes, self.fill, self.dtype)


class MaskLowest(Mask):
    """The same with the lowest number of float32."""

    fill = torch.finfo(torch.float32).min


class MaskLarge(Mask):
    """The same with -1e20."""

    fill = -1e20


class MaskHalf(Mask):
    """The same in half precision, its norm beyond what that holds."""

    fill, dtype = -1e4, torch.float16


# ---------------------------------------------------------------- case 3: batches that are not finite


class NanLoss(Setup):
    """Every 50th batch has only ignored targets."""

    period = 50

    def bad(self, n: int) -> bool:
        return n % self.period == self.period - 1

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = super().data(n)
        return x, torch.full_like(y, -100) if self.bad(n) else y


class NanOften(NanLoss):
    """Two of five batches are not finite, some of them one after the other."""

    def bad(self, n: int) -> bool:
        return n % 10 in (3, 6, 7, 8)


class NanAtBorders(NanLoss):
    """The last batch of 20 and the first of the next 20 are not finite, as where data are not shuffled."""

    shortest = 300

    def bad(self, n: int) -> bool:
        return n > 0 and n % 20 in (0, 19)


class NanRandom(NanLoss):
    """One batch in ten is not finite, by chance."""

    often = 0.1

    def bad(self, n: int) -> bool:
        return bool(torch.rand(self.steps, generator=torch.Generator().manual_seed(self.seed))[n] < self.often)


class NanRandomly(NanRandom):
    """Three batches in ten are not finite, by chance."""

    often = 0.3


class NanInput(BatchNormed, NanLoss):
    """Every 50th batch has a nan in its input, which goes into the statistics of BatchNorm."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = Setup.data(self, n)
        if self.bad(n):
            x[0, 0] = math.nan
        return x, y


class EmptyBatch(NanLoss):
    """Every 50th batch is empty."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = Setup.data(self, n)
        return (x[:0], y[:0]) if self.bad(n) else (x, y)


class InfGradient(NanLoss):
    """Every 50th gradient is infinite, the loss is not."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        return Setup.data(self, n)

    def step(self, n: int, run: Any) -> None:
        run.optimizer.zero_grad()
        loss = self.loss(n)
        loss.backward()
        if self.bad(n):
            next(self.model.parameters()).grad.view(-1)[0] = math.inf
        run.step(loss)


# ---------------------------------------------------------------- case 4: the loss grows by design


class HandsOver(Setup):
    """Losses of the samples are handed over."""

    def step(self, n: int, run: Any) -> None:
        run.optimizer.zero_grad()
        losses = self.loss(n)
        if run.guided is None:
            losses.mean().backward()
        else:
            run.guided.backward(losses)
        run.step(losses.detach().mean())


class KlWeight(HandsOver):
    """A second term whose weight grows from 0 to 20."""

    wrap_loss = False
    ramp = 0.5

    def weight(self, n: int) -> float:
        return 20.0 * min(1.0, n / (self.ramp * self.steps))

    def loss(self, n: int) -> Tensor:
        x, y = self.data(n)
        logits = self.model(x)
        return self._sent(F.cross_entropy(logits, y, reduction="none"), logits, n)

    def _sent(self, losses: Tensor, logits: Tensor, n: int) -> Tensor:
        return losses + self.weight(n) * 0.05 * logits.square().mean(1)

    def evaluate(self) -> float:
        x, y = self.samples(2000, torch.Generator().manual_seed(5))
        with torch.no_grad():
            logits = self.model(x)
            return self._sent(F.cross_entropy(logits, y, reduction="none"), logits, self.steps).mean().item()


class KlJump(KlWeight):
    """The weight jumps at half time."""

    def weight(self, n: int) -> float:
        return 20.0 if n >= self.steps // 2 else 0.0


class Permuted(Setup):
    """The labels are permuted at half time."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = super().data(n)
        return x, (y + 1) % self.classes if n >= self.steps // 2 else y

    def evaluate(self) -> float:
        x, y = self.samples(2000, torch.Generator().manual_seed(5))
        with torch.no_grad():
            return F.cross_entropy(self.model(x), (y + 1) % self.classes).item()


class PermutedOften(Permuted):
    """The task changes every 60 steps."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = Setup.data(self, n)
        return x, (y + n // 60) % self.classes

    def evaluate(self) -> float:
        x, y = self.samples(2000, torch.Generator().manual_seed(5))
        with torch.no_grad():
            return F.cross_entropy(self.model(x), (y + (self.steps - 1) // 60) % self.classes).item()


class SmallerBatches(Setup):
    """From 256 samples to 8."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        return self.samples(256 if n < self.steps // 2 else 8, self.rng)


class MixedBatches(Setup):
    """Batches of 4 to 128 samples."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        return self.samples((128, 4, 32, 8, 64)[n % 5], self.rng)


class GrowingBatches(Setup):
    """From 8 samples to 256 (case 15)."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        return self.samples(8 if n < self.steps // 2 else 256, self.rng)


class EasyAndHard(Setup):
    """Most batches are easy, one in eight is hard; their losses differ by a factor."""

    every = 8

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = super().data(n)
        if n % self.every == self.every - 1:
            flip = torch.rand(len(y), generator=self.rng) < 0.7
            y = torch.where(flip, torch.randint(0, self.classes, y.shape, generator=self.rng), y)
        return x, y


class RareHard(EasyAndHard):
    """One batch in forty is hard."""

    every = 40


class HardPairs(Setup):
    """Two hard batches in a row, every 60 steps."""

    places, shortest = (58, 59), 300  # the second pair tells that it is not the rate

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = super().data(n)
        return x, (y + 1) % self.classes if n % 60 in self.places else y


class HardTriples(HardPairs):
    """Three hard batches in a row, every 60 steps."""

    places = (57, 58, 59)


class Curriculum(Setup):
    """Noise of the labels grows over the run."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = super().data(n)
        flip = torch.rand(len(y), generator=self.rng) < 0.6 * n / self.steps
        return x, torch.where(flip, torch.randint(0, self.classes, y.shape, generator=self.rng), y)


class LabelNoise(Setup):
    """Two labels of five are random."""

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = super().data(n)
        flip = torch.rand(len(y), generator=self.rng) < 0.4
        return x, torch.where(flip, torch.randint(0, self.classes, y.shape, generator=self.rng), y)


class TinyBatches(Setup):
    """Batches of 2 samples."""

    batch = 2


# ---------------------------------------------------------------- scales of the loss


class Regression(HandsOver):
    """Mean squared error of targets times a factor."""

    factor, offset, tail = 1.0, 0.0, False

    def build(self) -> nn.Module:
        self.loss_fn = nn.MSELoss()
        return nn.Sequential(nn.Linear(self.features, 32), nn.Tanh(), nn.Linear(32, 1))

    def samples(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, self.features, generator=rng)
        y = (x @ self.teacher[0]).relu() @ self.teacher[1][:, :1] / 10
        if self.tail:
            y = y + torch.distributions.StudentT(2.5).sample((count, 1)) if rng is self.rng else y
        return x, y

    def scaled(self, output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().mean(1) * self.factor + self.offset

    def loss(self, n: int) -> Tensor:
        x, y = self.data(n)
        return self.scaled(self.model(x), y)

    def evaluate(self) -> float:
        x, y = self.samples(2000, torch.Generator().manual_seed(5))
        with torch.no_grad():
            return self.scaled(self.model(x), y).mean().item()


class TinyLoss(Regression):
    """A loss of 1e-9."""

    factor = 1e-9


class HugeLoss(Regression):
    """A loss of 1e12."""

    factor = 1e12


class NegativeLoss(Regression):
    """A loss that is negative."""

    offset = -50.0


class HeavyTails(Regression):
    """Targets with outliers: losses of single batches are 100 times the usual."""

    tail = True


class Returns(Regression):
    """As in reinforcement learning: the scale of the targets drifts up by a factor of 30."""

    growth = 30.0

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = self.samples(self.batch, self.rng)
        return x, y * self.growth ** (n / self.steps)

    def evaluate(self) -> float:
        x, y = self.samples(2000, torch.Generator().manual_seed(5))
        with torch.no_grad():
            return self.scaled(self.model(x), self.growth * y).mean().item()


class ReturnsSlow(Returns):
    """The same by a factor of 5."""

    growth = 5.0


class Shifting(Regression):
    """The targets move away, by 26 times what they scatter."""

    shift = 20.0

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = self.samples(self.batch, self.rng)
        return x, y + self.shift * n / self.steps

    def evaluate(self) -> float:
        x, y = self.samples(2000, torch.Generator().manual_seed(5))
        with torch.no_grad():
            return self.scaled(self.model(x), y + self.shift).mean().item()


class NoisyTargets(Regression):
    """Noise of the targets grows to 13 times what they scatter without."""

    noise = 10.0

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = self.samples(self.batch, self.rng)
        return x, y + self.noise * n / self.steps * torch.randn(y.shape, generator=self.rng)


class Hinge(Regression):
    """Most batches have no loss at all."""

    batch = 4

    def scaled(self, output: Tensor, y: Tensor) -> Tensor:
        return (0.1 - output[:, 0] * y[:, 0].sign()).clamp(min=0)


# ---------------------------------------------------------------- cases 5, 32: rates


class WritesRate(Setup):
    """The loop writes a cosine into the groups at every step."""

    def before(self, n: int, run: Any) -> None:
        for group in run.base.param_groups:
            group["lr"] = RATES[self.kind] * 0.5 * (1 + math.cos(math.pi * n / self.steps))


class PerEpoch(Setup):
    """The scheduler is stepped every 50 steps."""

    def after(self, n: int, run: Any) -> None:
        if n % 50 == 49:
            run.end_epoch()


class NeverAgain(Setup):
    """The scheduler is no longer stepped after half of the run, and the weights are averaged by hand (case 14)."""

    def step(self, n: int, run: Any) -> None:
        run.stops_scheduler = n >= self.steps // 2
        super().step(n, run)
        if n >= self.steps // 2 and n % 20 == 0:
            with torch.no_grad():
                for param in self.model.parameters():
                    param.add_(0.3 * torch.randn_like(param))  # another point, worse for a while


# ---------------------------------------------------------------- cases 6, 7, 8: tensors that come and change


class Grows(BatchNormed):
    """A backbone is added to the optimizer in mid-run."""

    at = 0.4

    def build(self) -> nn.Module:
        self.backbone = nn.Sequential(nn.Linear(self.features, self.features), nn.BatchNorm1d(self.features))
        model = nn.Sequential(self.backbone, super().build())
        self.backbone.requires_grad_(False)
        return model

    def optimizer(self) -> Any:
        return base_optimizer(self.kind, [p for p in self.model.parameters() if p.requires_grad])

    def before(self, n: int, run: Any) -> None:
        if n == int(self.at * self.steps):
            self.backbone.requires_grad_(True)
            run.optimizer.add_param_group({"params": list(self.backbone.parameters()), "lr": RATES[self.kind] / 10})


class Replaced(Setup):
    """Parameters are replaced by longer ones, their state moved by hand."""

    def before(self, n: int, run: Any) -> None:
        if n not in (self.steps // 3, self.steps // 2):
            return
        first, last = self.model[0], self.model[2]
        with torch.no_grad():
            new = {
                first.weight: torch.cat([first.weight, 0.1 * torch.randn(4, self.features)]),
                first.bias: torch.cat([first.bias, torch.zeros(4)]),
                last.weight: torch.cat([last.weight, torch.zeros(self.classes, 4)], 1),
            }
        made = {}
        for old, value in new.items():
            param = made[old] = nn.Parameter(value)
            state = run.base.state.pop(old, {})
            pad = {
                k: v if v.dim() == 0 else _padded(v, value.shape)
                for k, v in state.items()
                if isinstance(v, Tensor)
            }  # fmt: skip
            run.base.state[param] = pad
        for group in run.base.param_groups:
            group["params"] = [made.get(param, param) for param in group["params"]]
        first.weight, first.bias, last.weight = (made[p] for p in new)


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    out = torch.zeros(shape)
    out[tuple(slice(0, size) for size in value.shape)] = value
    return out


class _Cache(nn.Module):
    def __init__(self, inner: nn.Module, persistent: bool) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("rows", torch.zeros(0, 4), persistent=persistent)
        self.filled = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.rows = torch.cat([self.rows, x.detach()[:1, :4]])[-60:]
            self.filled = min(60, self.filled + 1)
            assert len(self.rows) == self.filled
            assert self.filled < 2 or bool(self.rows.abs().sum(1).min() > 0)
        return self.inner(x)


class GrowingCache(Setup):
    """A buffer that is a cache, grows, and has a Python counter beside it."""

    persistent = True

    def build(self) -> nn.Module:
        return _Cache(super().build(), self.persistent)


class GrowingCacheOwn(GrowingCache):
    """The same cache, not saved with the model."""

    persistent = False


class Frozen(Setup):
    """Half of the parameters are frozen, and thawed at half time."""

    def before(self, n: int, run: Any) -> None:
        self.model[0].requires_grad_(n >= self.steps // 2)


class Sparse(Setup):
    """Sparse gradients."""

    def build(self) -> nn.Module:
        self.embedding = nn.Embedding(50, 16, sparse=True)
        return nn.Sequential(self.embedding, nn.Flatten(), nn.Linear(48, self.classes))

    def optimizer(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.2)

    def samples(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 50, (count, 3), generator=rng)
        return x, (x.sum(1) // 5) % self.classes


# ---------------------------------------------------------------- an explosion by one bad step


class Spike(Setup):
    """One step at a rate a thousand times too high."""

    at = (0.5,)
    factor = 1000.0

    def step(self, n: int, run: Any) -> None:
        spike = n in [int(a * self.steps) for a in self.at]
        if spike:
            for group in run.base.param_groups:
                group["lr"] *= self.factor
        super().step(n, run)
        if spike:
            for group in run.base.param_groups:
                group["lr"] /= self.factor


class GrowsAndSpike(Grows, Spike):
    """A backbone is added one step after one that explodes."""

    at = (0.4,)

    def before(self, n: int, run: Any) -> None:
        if n == int(0.4 * self.steps) + 1:
            self.backbone.requires_grad_(True)
            run.optimizer.add_param_group({"params": list(self.backbone.parameters()), "lr": RATES[self.kind] / 10})


class ReplacedAndSpike(Replaced, Spike):
    """Parameters are replaced after a step that explodes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.at = ((self.steps // 3 - 1) / self.steps + 1e-9, self.steps // 2 / self.steps + 1e-9)


class CacheAndSpike(GrowingCache, Spike):
    """A cache that grows, and a step that explodes while it does."""

    at = (0.05, 0.5)


class MaskAndSpike(Mask, Spike):
    """A mask, and a step that explodes."""


class SpikeAveraged(Spike):
    """A spike, and an average of the weights that is updated after every accepted step (case 11)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )

    def step(self, n: int, run: Any) -> None:
        super().step(n, run)
        if n == 0 and run.guided is not None:
            run.guided.register_accepted_hook(lambda _optimizer: self.average.update_parameters(self.model))
        elif run.guided is None:
            self.average.update_parameters(self.model)

    def evaluated(self) -> nn.Module:
        return self.average


class WithOwnWeights(Spike):
    """A spike under an optimizer that keeps weights of its own (cases 9, 10)."""

    which = "schedulefree"

    def optimizer(self) -> Any:
        params = self.model.parameters()
        if self.which == "schedulefree":
            from schedulefree import AdamWScheduleFree

            made: Any = AdamWScheduleFree(params, lr=1e-2)
            made.train()
        elif self.which == "lookahead":
            from pytorch_optimizer import Lookahead

            made = Lookahead(torch.optim.AdamW(params, lr=3e-3))
        elif self.which == "prodigy":
            from prodigyopt import Prodigy

            made = Prodigy(params)
        else:
            from dadaptation import DAdaptAdam

            made = DAdaptAdam(params)
        return made

    def evaluate(self) -> float:
        if self.which != "schedulefree":
            return super().evaluate()
        self.base.eval()
        loss = super().evaluate()
        self.base.train()
        return loss


class LookaheadSpike(WithOwnWeights):
    """The same under Lookahead."""

    which = "lookahead"


class ProdigySpike(WithOwnWeights):
    """The same under Prodigy."""

    which, factor = "prodigy", 100.0


class DAdaptSpike(WithOwnWeights):
    """The same under D-Adaptation."""

    which, factor = "dadapt", 100.0


class OwnWeightsCalm(WithOwnWeights):
    """Schedule-Free, undisturbed."""

    at = ()


class ProdigyNan(ProdigySpike):
    """Batches that are not finite under Prodigy."""

    at = ()

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = super().data(n)
        return x, torch.full_like(y, -100) if n % 25 == 24 else y


class TwoOptimizers(Spike):
    """Muon for matrices and AdamW for the rest (case 13)."""

    at = ()

    def optimizer(self) -> Any:
        params = list(self.model.parameters())
        return [
            for_matrices(params),
            torch.optim.AdamW([p for p in params if p.dim() != 2], lr=3e-3),
        ]


class TwoOptimizersSpike(TwoOptimizers):
    """The same, and one step at a rate a thousand times too high."""

    at = (0.5,)


class VirtualSteps(Setup):
    """An optimizer whose ``step`` moves on every fourth call (case 22)."""

    batch = 8

    def optimizer(self) -> Any:
        class Virtual(torch.optim.SGD):
            calls = 0

            def step(self, closure: Any = None) -> Any:
                self.calls += 1
                return super().step(closure) if self.calls % 4 == 0 else None

        return Virtual(self.model.parameters(), lr=0.2)


class TokensThatCount(Setup):
    """Reduction "sum" divided by the tokens that count, padding changing from batch to batch (case 20)."""

    length = 12

    def build(self) -> nn.Module:
        self.loss_fn = nn.CrossEntropyLoss(reduction="sum", ignore_index=-100)
        return super().build()

    def data(self, n: int) -> tuple[Tensor, Tensor]:
        x, y = self.samples(16 * self.length, self.rng)
        lengths = torch.randint(1, self.length + 1, (16, 1), generator=self.rng)
        if n % 2:
            lengths = lengths.clamp(max=2)
        pad = torch.arange(self.length)[None] >= lengths
        return x.view(16, self.length, -1), y.view(16, self.length).masked_fill(pad, -100)

    def loss(self, n: int) -> Tensor:
        x, y = self.data(n)
        return self.loss_fn(self.model(x).flatten(0, 1), y.flatten()) / (y != -100).sum()


class SeenInPart(Setup):
    """Two losses, of which the loss function sees one (case 30)."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.features, 32), nn.Tanh(), nn.Linear(32, self.classes + 1))

    def loss(self, n: int) -> Tensor:
        x, y = self.data(n)
        output = self.model(x)
        return self.loss_fn(output[:, :-1], y) + (output[:, -1] - 3 * x[:, 0]).square().mean()

    def evaluate(self) -> float:
        x, y = self.samples(2000, torch.Generator().manual_seed(5))
        with torch.no_grad():
            output = self.model(x)
            return (F.cross_entropy(output[:, :-1], y) + (output[:, -1] - 3 * x[:, 0]).square().mean()).item()


class NothingSeen(Setup):
    """The loss is functional, and nobody hands it over."""

    wrap_loss = False

    def loss(self, n: int) -> Tensor:
        x, y = self.data(n)
        return F.cross_entropy(self.model(x), y)


class Scaled(NanLoss):
    """A hand-made loss scale, and steps skipped by it as a gradient scaler does."""

    def step(self, n: int, run: Any) -> None:
        run.optimizer.zero_grad()
        loss = self.loss(n)
        (loss * 1024).backward()
        finite = True
        for param in self.model.parameters():
            param.grad.div_(1024)
            finite = finite and bool(torch.isfinite(param.grad).all())
        run.step(loss) if finite else run.scheduler_step()


class Sam(torch.optim.SGD):
    """Moves to w + e, evaluates the closure there, and steps from w."""

    radius = 0.02

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [p for g in self.param_groups for p in g["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm() + 1e-12
        moves = [self.radius * p.grad / norm for p in params]
        torch._foreach_add_(params, moves)
        with torch.enable_grad():
            loss = closure()
        torch._foreach_sub_(params, moves)
        super().step()
        return loss


class Sharpness(Setup):
    """Sharpness-aware minimization, which moves to w + e before it calls the closure (case 12)."""

    def optimizer(self) -> Any:
        return Sam(self.model.parameters(), lr=0.1, momentum=0.9)

    def step(self, n: int, run: Any) -> None:
        x, y = self.data(n)

        def closure() -> Tensor:
            run.optimizer.zero_grad()
            loss = self.loss_fn(self.model(x), y)
            loss.backward()
            return loss

        run.step_with(closure(), closure)


class Attention(Setup):
    """A small language model with flattened losses and a causal mask, batches of unlike difficulty (cases 1, 35)."""

    batch, vocabulary, length = 16, 12, 8

    def build(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self, v: int, t: int) -> None:
                super().__init__()
                self.embed, self.position = nn.Embedding(v, 24), nn.Parameter(0.1 * torch.randn(t, 24))
                self.layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
                self.head = nn.Linear(24, v)
                mask = torch.full((t, t), -math.inf).triu(1)
                self.register_buffer("mask", mask)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.layer(self.embed(x) + self.position, src_mask=self.mask))

        return Model(self.vocabulary, self.length)

    def samples(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        start = torch.randint(0, self.vocabulary, (count, 1), generator=rng)
        stride = torch.randint(1, 4, (count, 1), generator=rng)
        x = (start + stride * torch.arange(self.length + 1)) % self.vocabulary
        noisy = torch.rand(count, 1, generator=rng) < 0.3
        x = torch.where(noisy, torch.randint(0, self.vocabulary, x.shape, generator=rng), x)
        return x[:, :-1], x[:, 1:]

    def loss(self, n: int) -> Tensor:
        x, y = self.data(n)
        return self.loss_fn(self.model(x).view(-1, self.vocabulary), y.reshape(-1))

    def evaluate(self) -> float:
        x, y = self.samples(500, torch.Generator().manual_seed(5))
        with torch.no_grad():
            return F.cross_entropy(self.model(x).flatten(0, 1), y.flatten()).item()


class Scheduled(Setup):
    """A cosine as ``schedule=``, from a good rate."""

    cosine = True


class AttentionScheduled(Attention):
    """A short training of a transformer with a cosine as ``schedule=``, from a good rate (case 35)."""

    cosine, batch = True, 32


class Adversarial(Setup):
    """A generator and a critic of their own; the critic is not the subject (case 34)."""

    def build(self) -> nn.Module:
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=2e-3, betas=(0.5, 0.99))
        self.loss_fn = nn.BCEWithLogitsLoss()
        return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))

    def optimizer(self) -> Any:
        return torch.optim.Adam(self.model.parameters(), lr=2e-3, betas=(0.5, 0.99))

    def real(self) -> Tensor:
        return 0.3 * torch.randn(64, 2, generator=self.rng) + torch.tensor([2.0, -1.0])

    def step(self, n: int, run: Any) -> None:
        critic_loss = nn.BCEWithLogitsLoss()
        fake = self.model(torch.randn(64, 4, generator=self.rng))
        self.critic_optimizer.zero_grad()
        ones, zeros = torch.ones(64, 1), torch.zeros(64, 1)
        (critic_loss(self.critic(self.real()), ones) + critic_loss(self.critic(fake.detach()), zeros)).backward()
        self.critic_optimizer.step()
        run.optimizer.zero_grad()
        loss = self.loss_fn(self.critic(fake), ones)
        loss.backward()
        run.step(loss)

    def evaluate(self) -> float:
        with torch.no_grad():
            fake = self.model(torch.randn(2000, 4, generator=torch.Generator().manual_seed(1)))
            far = (fake.mean(0) - torch.tensor([2.0, -1.0])).norm() + (fake.std(0) - 0.3).norm()
        return float(far)
