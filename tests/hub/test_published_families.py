"""Checkpoints as they are published, with the keys of their config.json, come in with equal logits, in bfloat16.

The keys and switches are those of the named models, older spellings of rotary settings and types among them; sizes are
tiny and weights random.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe_cpt.hub.convert import convert
from hf_moe_cpt.hub.upcycle import upcycle
from tests.helpers.hub_checkpoints import biased, logits_of, saved
from tests.helpers.tolerances import assert_matches


SIZES = json.loads("""{
  "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 16,
  "initializer_range": 0.3, "intermediate_size": 32, "max_position_embeddings": 64, "num_attention_heads": 4,
  "num_hidden_layers": 2, "num_key_value_heads": 2, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
  "use_cache": true, "vocab_size": 48
}""")
DENSE = json.loads("""{
  "Qwen3-0.6B": {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": false, "head_dim": 8,
    "max_window_layers": 2, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
    "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false
  },
  "Llama-3.2-1B": {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false, "head_dim": 4,
    "mlp_bias": false, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "tie_word_embeddings": true, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
      "original_max_position_embeddings": 32, "rope_type": "llama3"}
  },
  "Qwen2.5, extended as its card says": {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"},
    "sliding_window": 32, "use_sliding_window": false, "tie_word_embeddings": false
  }
}""")
MIXTURES = json.loads("""{
  "OLMoE-1B-7B-0924": {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": false, "clip_qkv": null,
    "norm_topk_prob": false, "num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4,
    "output_router_logits": false, "rope_scaling": null, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": false
  },
  "Qwen3-30B-A3B": {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
    "decoder_sparse_step": 1, "head_dim": 8, "max_window_layers": 2, "mlp_only_layers": [],
    "moe_intermediate_size": 8, "norm_topk_prob": true, "num_experts": 6, "num_experts_per_tok": 3,
    "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false, "use_sliding_window": false
  },
  "Mixtral-8x7B-v0.1": {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2,
    "num_local_experts": 4, "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false
  }
}""")


def published(keys: dict, folder: Path) -> Path:
    """bfloat16 weights with biases and norms that matter, under a config.json of these keys."""
    (folder / "keys").mkdir(parents=True)
    (folder / "keys" / "config.json").write_text(json.dumps(SIZES | keys))
    torch.manual_seed(0)
    model = biased(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "keys"), dtype=torch.bfloat16))
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    saved(model, folder / "model")
    (folder / "keys" / "config.json").rename(folder / "model" / "config.json")
    return folder / "model"


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_are_upcycled_by_exact_copies(name: str, tmp_path: Path) -> None:
    """Experts that are copies, each with weight 1/2: every tensor is the dense model's, bit for bit."""
    dense = published(DENSE[name], tmp_path / "published")
    copies = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    made = upcycle(dense, tmp_path / "moe", "switch", **copies, moe_intermediate_size=32)
    assert made.function == "the dense model's, up to rounding"
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "moe" / "model.safetensors")
    kept = {key for key in before if ".mlp." not in key}
    assert kept == {key for key in after if ".mlp." not in key}
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == torch.bfloat16 for key in kept)
    for layer in ("model.layers.0.mlp.", "model.layers.1.mlp."):
        gate_up = torch.cat([before[f"{layer}gate_proj.weight"], before[f"{layer}up_proj.weight"]])
        assert all(torch.equal(expert, gate_up) for expert in after[f"{layer}experts.gate_up_proj"])
        down = before[f"{layer}down_proj.weight"]
        assert all(torch.equal(expert, down) for expert in after[f"{layer}experts.down_proj"])
    in_float32 = [logits_of(folder, dtype=torch.float32) for folder in (tmp_path / "moe", dense)]
    assert_matches(name, *in_float32)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_converted_and_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    theirs = published(MIXTURES[name], tmp_path / "published")
    convert(theirs, tmp_path / "ours", "cpt_moe")
    convert(tmp_path / "ours", tmp_path / "back", MIXTURES[name]["model_type"])
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (theirs, tmp_path / "back")]
    changed = {key for key in MIXTURES[name] if configs[0].get(key) != configs[1].get(key)}
    assert changed <= {"router_aux_loss_coef", "max_window_layers"}  # the first by rounding, the second means nothing
    assert configs[0]["router_aux_loss_coef"] == pytest.approx(configs[1]["router_aux_loss_coef"])
    want = logits_of(theirs, dtype=torch.float32)
    assert_matches(name, logits_of(tmp_path / "ours", dtype=torch.float32), want)
    assert_matches(f"{name}, back", logits_of(tmp_path / "back", dtype=torch.float32), want)
