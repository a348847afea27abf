"""torch.compile captures a whole forward and backward in one graph, and computes the same."""

import pytest
import torch

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from tests.helpers.tolerances import assert_matches


# Before 5.23 the backward of transformers' fp32 stand-in for grouped_mm could not be compiled.
EXPERTS = "grouped_mm" if hasattr(torch.ops.transformers, "grouped_mm_fallback_backward") else "batched_mm"


ATTENTION = {"qkv_bias": True, "qk_norm": "head", "sliding_window": 6}


@pytest.mark.slow  # trainers/common/test_kernels.py compiles the layers of a model in every run
@pytest.mark.compiles
@pytest.mark.parametrize(("preset", "fields"), [("pb-granular-tiny", ATTENTION), ("sb-switch-tiny", {})])
def test_one_graph(preset: str, fields: dict) -> None:
    config = CptMoeConfig.from_preset(preset, vocab_size=128, num_hidden_layers=1, **fields)
    model = CptMoeForCausalLM(config).train()
    model.set_experts_implementation(EXPERTS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(0, 128, (2, 16))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": tokens, "use_cache": False}
    inputs["num_items_in_batch"] = torch.tensor(60)
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        out = run(**inputs)
        out.loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        gradients[-1] |= {"logits": out.logits, "loss": out.loss}
        assert (out.aux_loss is not None) == preset.startswith("pb-")
    for name, want in gradients[1].items():
        assert_matches(name, gradients[0][name], want)
