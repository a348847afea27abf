"""Hidden states, log-probabilities and divergences of any causal LM against its own logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

from hf_moe_cpt.trainers.surgery import model_pass
from hf_moe_cpt.trainers.surgery.model_pass import (
    check_head,
    head_of,
    next_token_kl,
    run_model,
    token_logp,
)
from tests.helpers.tiny_models import tiny_model


SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "gpt2": GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2),
}


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]) if kind in CONFIGS else tiny_model(kind)
    return _wide(model).eval()


def _wide(model: nn.Module) -> nn.Module:
    """In float64, which the grouped products of experts do not take."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model.double()


def _batch(vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (3, 9), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": attention}


@pytest.mark.parametrize("kind", [*CONFIGS, "mixtral", "cpt_moe"])
def test_log_probabilities_and_gradients_are_those_of_full_logits(kind):
    model = _model(kind)
    check_head(model)
    batch = _batch(model.config.vocab_size)
    target = batch["input_ids"][:, 1:, None]
    logits = model(**batch).logits.double()
    want = logits.log_softmax(-1)[:, :-1].gather(-1, target)[..., 0]
    weights = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    (want * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = token_logp(run_model(model, batch).hidden, head_of(model), batch["input_ids"], chunk_tokens=5)
    (got * weights).sum().backward()
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_divergence_is_that_of_full_logits(kind):
    model, reference = _model(kind), _model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    batch = _batch(61)
    mask = batch["attention_mask"][:, 1:].bool()
    logps = [m(**batch).logits[:, :-1].log_softmax(-1) for m in (model, reference)]
    kl = functional.kl_div(logps[0], logps[1], log_target=True, reduction="none").sum(-1)
    want = ((kl * mask).sum(1) / mask.sum(1)).mean()
    states = [(run_model(m, batch).hidden, head_of(m)) for m in (model, reference)]
    got, per_token = next_token_kl(*states, mask, chunk_tokens=4)
    assert torch.allclose(got, want, rtol=1e-9)
    assert torch.allclose(per_token, kl, rtol=1e-8, atol=1e-12)


def test_no_logits_but_those_of_one_position_are_made(monkeypatch):
    model = _model("llama")
    seen = []
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(x.shape) or functional.linear(x, head.weight))
    head = head_of(model)
    run_model(model, _batch(61))
    assert seen == [(3, 1, 16)]


@pytest.mark.parametrize("kind", ["mixtral", "cpt_moe"])
def test_router_penalty_is_what_the_model_adds_to_its_loss(kind):
    model = _wide(tiny_model(kind, router_aux_loss_coef=0.37)).train()
    batch = _batch(model.config.vocab_size)
    penalty = run_model(model, batch, with_router_penalty=True).router_penalty
    with_it = model(**batch, labels=batch["input_ids"], output_router_logits=True).loss
    logits = model(**batch).logits.double()
    plain = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert penalty > 0
    assert torch.allclose(penalty.double(), with_it - plain, rtol=1e-5)
    assert run_model(model, batch).router_penalty is None


def test_models_that_make_logits_in_another_way_are_refused(monkeypatch):
    model = _model("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 3.0 * functional.linear(x, model.lm_head.weight))
    with pytest.raises(ValueError, match="makes its logits in a way that is not known"):
        check_head(model)
    with pytest.raises(ValueError, match="no causal LM of transformers"):
        head_of(nn.Linear(2, 2))
    layer = model.lm_head
    layer.lora_A = nn.ModuleDict()
    with pytest.raises(ValueError, match="leave it out of target_modules"):
        head_of(model)


def test_a_wrapper_is_looked_through():
    model = _model("llama")
    wrapped = nn.Module()
    wrapped.module = model
    assert model_pass.causal_lm_of(wrapped) is model
