"""Models of Transformers that return their loss: the full fit, and nothing of the run changed by it."""

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

from alpha_optim import AlphaGuided, AlphaScheduler  # noqa: E402
from tests.reference.losses_of_samples import observe  # noqa: E402
from tests.test_today import QUANTITIES  # noqa: E402
from tests.test_transparency import equal_states  # noqa: E402

V, T, N = 31, 10, 6
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def gpt2(dropout):
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=16, n_layer=2, n_head=2, **rates)
    return transformers.GPT2LMHeadModel(config)


def llama(dropout):
    config = transformers.LlamaConfig(vocab_size=V, attention_dropout=dropout, **SMALL)
    return transformers.LlamaForCausalLM(config)


def bert(dropout):
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=V, max_position_embeddings=T, **SMALL, **rates)
    )


def t5(dropout):
    config = transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=dropout,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit(dropout):
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=5, **SMALL, **rates)
    return transformers.ViTForImageClassification(config)


def lora(dropout):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, init_lora_weights=False)
    return peft.get_peft_model(llama(dropout), config)


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert, "t5": t5, "vit": vit, "lora": lora}


def batch_of(name, generator, samples=N):
    if name == "vit":
        return {
            "pixel_values": torch.randn(samples, 1, 8, 8, generator=generator),
            "labels": torch.randint(0, 5, (samples,), generator=generator),
        }
    x = torch.randint(1, V, (samples, T), generator=generator)
    y = torch.randint(1, V, (samples, T), generator=generator) if name in ("bert", "t5") else x.clone()
    padding = torch.arange(T) >= torch.randint(4, T + 1, (samples, 1), generator=generator)
    y[padding] = -100
    return {"input_ids": x, "attention_mask": (~padding).long(), "labels": y}


def widened(batch, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def losses_of_samples(name, model, batch):
    """From the logits, by the definition of each model's loss."""
    logits, labels = model(**batch).logits, batch["labels"]
    if name == "vit":
        return F.cross_entropy(logits, labels, reduction="none")
    if name in ("gpt2", "llama", "lora"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return rows.sum(1) * len(labels) / (labels != -100).sum()


def train(name, wrapped, steps, dropout, dtype=torch.float32, samples=N, **options):
    torch.manual_seed(0)
    model = MODELS[name](dropout).to(dtype)
    model.train()
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=3e-3)
    optimizer = AlphaGuided(optimizer, model, **options) if wrapped else optimizer
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**widened(batch_of(name, generator, samples), dtype)).loss.backward()
        optimizer.step()
    return model, optimizer, torch.get_rng_state()


@pytest.mark.compatibility("Trainer", "models that return their loss: GPT-2, Llama, BERT, T5, ViT, LoRA by peft")
@pytest.mark.parametrize("samples", [N, 20])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_the_full_fit_without_a_trace(name, dropout, samples):
    bare, _, random = train(name, False, 10, dropout, samples=samples)
    model, guided, same_random = train(name, True, 10, dropout, samples=samples)  # a warning would be an error here
    assert {m.information for m in guided.alpha_history[2:]} == {"full"}
    assert {m.samples_start for m in guided.alpha_history} == {samples}
    assert equal_states(bare.state_dict(), model.state_dict())
    assert torch.equal(random, same_random)


@pytest.mark.parametrize("name", MODELS)
def test_exact_variances_are_those_of_one_backward_pass_per_sample(name):
    _, guided, _ = train(name, True, 5, 0.0, torch.float64, variance="exact")
    torch.manual_seed(0)
    model = MODELS[name](0.0).double().train()
    bare = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    batches = [widened(batch_of(name, generator), torch.float64) for _ in range(5)]
    expected = observe(lambda batch: losses_of_samples(name, model, batch), bare, batches)
    # Causal models compute their loss in float32 whatever they are, Llama and T5 their norms.
    tolerance = 1e-8 if name in ("bert", "vit") else 1e-5
    for m, row in zip(guided.alpha_history, expected, strict=True):
        assert m.information == "full"
        for quantity in QUANTITIES:
            assert getattr(m, quantity) == pytest.approx(row[quantity], rel=tolerance), (m.iteration, quantity)


@pytest.mark.parametrize("lr", [1e-6, 10.0])
def test_a_model_that_returns_its_loss_is_trained_from_any_rate(lr):
    """Sequences with a constant stride; the best of a grid of rates ends at 0.09, chance is 3.5."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=32, n_embd=48, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLMLoss",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    optimizer = AlphaGuided(torch.optim.AdamW(model.parameters(), lr=lr), model)
    scheduler = AlphaScheduler(optimizer, total_steps=400)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(400):
        start, stride = (torch.randint(1, top, (16, 1), generator=generator) for top in (32, 5))
        tokens = (start + stride * torch.arange(24)) % 32
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.2
    assert optimizer.alpha_history[-1].information == "full"
