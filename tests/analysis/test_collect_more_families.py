"""Traces of families beyond those of tiny_moes, against the largest logits that transformers records."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe_cpt.analysis import collect_routing
from tests.helpers.tiny_models import SIZES, VOCABULARY


E, K = 8, 2
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
EVEN = {"num_experts_per_tok": K, "moe_intermediate_size": 8}
GROUPS = {**EVEN, "n_routed_experts": E, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LOCAL = {"num_local_experts": E, "num_experts_per_tok": K}
PLAIN = {"layer_types": ["full_attention"] * 2, "head_dim": 8}
CONFIGS = {
    "afmoe": {**EVEN, **PLAIN, "num_experts": E, "num_dense_layers": 0},
    "deepseek_v2": {**GROUPS, **LATENT, "first_k_dense_replace": 0},
    "dots1": {**GROUPS, "first_k_dense_replace": 0, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": E, "moe_k": K, "moe_intermediate_size": 8, "moe_layer_start_index": 0},
    "flex_olmo": {"num_experts": E, "num_experts_per_tok": K},
    "glm4_moe": {**GROUPS, "first_k_dense_replace": 0, "head_dim": 8},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": E, "moe_topk": K, "head_dim": 8},
    "lfm2_moe": {**EVEN, "num_experts": E, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
    "minimax": {**LOCAL, **PLAIN},
    "phimoe": LOCAL,
    "qwen3_next": {**EVEN, **PLAIN, "num_experts": E, "shared_expert_intermediate_size": 8},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_trace_holds_the_largest_logits(kind, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "pad_token_id": 0, **CONFIGS[kind]})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, weight in model.named_parameters():  # the routers of some families start at 0
        if weight.shape[0] == E and weight.ndim == 2 and ("gate" in name or "router" in name):
            nn.init.normal_(weight, std=0.3)
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    trace = collect_routing(model, [{"input_ids": row} for row in ids.tolist()], tmp_path, progress=False)
    with torch.no_grad():
        recorded = model(ids, output_router_logits=True).router_logits
    assert [(layer.num_experts, layer.experts_per_token) for layer in trace.layers] == [(E, K)] * len(recorded)
    assert len(recorded) == 2
    for layer, logits in enumerate(recorded):
        want = logits.reshape(-1, E).topk(K).indices.sort(-1).values
        assert torch.equal(trace.top_k_index(layer).long().sort(-1).values, want)
