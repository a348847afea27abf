"""A saved checkpoint carries its code: it loads, with the same numbers, where the package cannot be imported."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_moe_cpt.modeling.configuration_cpt_moe import AUTO_MAP, CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM


LOAD_ELSEWHERE = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

tokens = torch.arange(24).view(2, 12)
folder, out = sys.argv[1], {}
heads = (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)
for auto in (AutoModelForCausalLM, AutoModel, *heads):
    torch.manual_seed(0)
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    out[auto.__name__] = model(input_ids=tokens)[0].detach()
    if auto is AutoModelForCausalLM:
        out["loss"] = model.train()(input_ids=tokens, labels=tokens).loss.detach()
        out["generated"] = model.eval().generate(tokens[:1], max_new_tokens=3, do_sample=False)
        model.save_pretrained(folder + "/again")
        assert AutoConfig.from_pretrained(folder + "/again", trust_remote_code=True).num_experts == 31
torch.save(out, folder + "/out.pt")
assert "hf_moe_cpt" not in sys.modules
"""


def test_a_checkpoint_travels_without_the_package(elsewhere, tmp_path: Path) -> None:
    """With biases and norms of attention that matter; with the package the same numbers, bit for bit."""
    modeling = Path(sys.modules[CptMoeForCausalLM.__module__].__file__).parent
    files = {path.name for path in modeling.glob("*_cpt_moe.py")}
    fields = {"vocab_size": 64, "num_hidden_layers": 1, "pad_token_id": 63, "sliding_window": 8}
    fields |= {"qkv_bias": True, "qk_norm": "head", "routed_scaling_factor": 3}
    config = CptMoeConfig.from_preset("pb-granular-tiny", **fields)
    model, folder = CptMoeForCausalLM(config), tmp_path / "as_in_Qwen"
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and ".self_attn." in name:
            torch.nn.init.uniform_(weight)
    model.save_pretrained(folder)
    elsewhere(LOAD_ELSEWHERE, folder)
    for saved in (folder, folder / "again"):
        assert {path.name for path in saved.glob("*.py")} == files
        assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
    tokens, got = torch.arange(24).view(2, 12), torch.load(folder / "out.pt")
    for auto in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        torch.manual_seed(0)
        model = auto.from_pretrained(folder).eval()
        assert type(model).__module__ == "hf_moe_cpt.modeling.modeling_cpt_moe"
        if auto is not AutoModelForSequenceClassification:  # its classifier is drawn anew
            assert torch.equal(got[auto.__name__], model(input_ids=tokens)[0]), auto.__name__
        if auto is AutoModelForCausalLM:
            assert torch.equal(got["loss"], model.train()(input_ids=tokens, labels=tokens).loss)
            assert torch.equal(got["generated"], model.eval().generate(tokens[:1], max_new_tokens=3, do_sample=False))
    shapes = {"Sequence": (2, 2), "Token": (2, 12, 2)}
    assert all(got[f"AutoModelFor{kind}Classification"].shape == shape for kind, shape in shapes.items())
    assert got["AutoModelForQuestionAnswering"].shape == (2, 12)
