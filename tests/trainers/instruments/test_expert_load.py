"""Loads and MRI of MoEs that we did not write, against counts from their recorded router logits."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_moe_cpt.analysis.moe_layers import find_experts
from hf_moe_cpt.trainers.instruments.expert_load import ExpertLoadMeter


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3)),
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **SIZES, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
        ),
    ),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=8),
    ),
}


def _model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model_class, config = FAMILIES[family]
    return model_class(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_mri_equals_a_count_from_router_logits(family):
    model = _model(family)
    ids = torch.randint(0, 32, (3, 7))
    meter = ExpertLoadMeter(model)
    with meter.observe():
        outputs = model(ids, output_router_logits=True)
    meter.end_step()
    summary = meter.pop()
    chosen, experts = model.config.num_experts_per_tok, outputs.router_logits[0].shape[-1]
    for layer, logits in enumerate(outputs.router_logits):
        busiest = logits.topk(chosen).indices.flatten().bincount(minlength=experts).max().item()
        assert summary.mri[layer] == pytest.approx(busiest / ids.numel())
        assert summary.normalized[layer] == pytest.approx(busiest / ids.numel() * experts / chosen)
    assert len(summary.mri) == 2


def test_routers_that_return_logits_only_are_counted_by_what_they_chose():
    config = DeepseekV3Config(
        **SIZES,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config)
    seen = []
    find_experts(model)[0].register_forward_hook(lambda module, args, output: seen.append(args[1]))
    meter = ExpertLoadMeter(model)
    with meter.observe():
        model(torch.randint(0, 32, (2, 9)))
    meter.end_step()
    assert meter.pop().mri == pytest.approx([seen[0].flatten().bincount(minlength=8).max().item() / 18])


def test_a_step_means_the_same_in_one_batch_or_in_three():
    model = _model("mixtral")
    ids = torch.randint(0, 32, (6, 7))
    meter = ExpertLoadMeter(model)
    summaries = []
    for parts in (1, 3):
        for part in ids.chunk(parts):
            with meter.observe():
                model(part)
        meter.end_step()
        summaries.append(meter.pop())
    assert summaries[0] == summaries[1]


def test_padding_does_not_count():
    model = _model("mixtral")
    ids = torch.randint(0, 32, (2, 5))
    meter = ExpertLoadMeter(model)
    with meter.observe():
        model(ids)
    meter.end_step()
    want = meter.pop()
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(2, 5), torch.zeros(2, 3)], dim=1).long()
    with meter.observe(mask):
        model(padded, attention_mask=mask)
    meter.end_step()
    assert meter.pop() == want


def test_recomputation_by_checkpointing_does_not_count_twice():
    model = _model("mixtral").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 32, (2, 6))
    meter = ExpertLoadMeter(model)
    with meter.observe():
        loss = model(ids, labels=ids).loss
    (counts,) = meter._counts.values()
    before = counts.clone()
    loss.backward()
    assert torch.equal(before, counts) and not meter._pending
    assert before[:, :-1].sum(-1).tolist() == [ids.numel() * 2] * 2
    assert before[:, -1].tolist() == [ids.numel()] * 2


def test_dense_models_have_no_experts_and_no_summary():
    meter = ExpertLoadMeter(LlamaForCausalLM(LlamaConfig(**SIZES)))
    meter.end_step()
    assert meter.experts == [] and meter.pop() is None


def test_close_removes_the_hooks():
    model = _model("mixtral")
    meter = ExpertLoadMeter(model)
    meter.close()
    with meter.observe():
        model(torch.randint(0, 32, (1, 4)))
    meter.end_step()
    assert meter.pop() is None
