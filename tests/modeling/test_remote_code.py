"""A saved checkpoint carries its code: it loads, with the same numbers, where the package cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_moe_cpt.modeling.configuration_cpt_moe import AUTO_MAP, CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM


LOAD_ELSEWHERE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_moe_cpt":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

tokens = torch.arange(24).view(2, 12)
for folder in sys.argv[1:]:
    out = {}
    for auto in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
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


VARIANTS = {
    "as in Qwen": {"qkv_bias": True, "sliding_window": 8, "qk_norm": "head"},
    "as in OLMoE": {"attention_bias": True, "qk_norm": "projection"},
}


def model_of(variant: str) -> CptMoeForCausalLM:
    """With biases and norms of attention that matter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "pad_token_id": 63}
    model = CptMoeForCausalLM(CptMoeConfig.from_preset("pb-granular-tiny", **sizes, **VARIANTS[variant]))
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and ".self_attn." in name:
            torch.nn.init.uniform_(weight)
    return model


def test_a_checkpoint_travels_without_the_package(tmp_path: Path) -> None:
    """One process loads all variants, which are different models of one and the same code."""
    modeling = Path(sys.modules[CptMoeForCausalLM.__module__].__file__).parent
    files = {path.name for path in modeling.glob("*_cpt_moe.py")}
    folders = []
    for variant in VARIANTS:
        folders.append(tmp_path / variant.replace(" ", "_"))
        model_of(variant).save_pretrained(folders[-1])
        assert {path.name for path in folders[-1].glob("*.py")} == files
        assert json.loads((folders[-1] / "config.json").read_text())["auto_map"] == AUTO_MAP

    script = tmp_path / "load_elsewhere.py"
    script.write_text(LOAD_ELSEWHERE)
    subprocess.run([sys.executable, str(script), *map(str, folders)], cwd=tmp_path, check=True)
    for folder in folders:
        assert_loads_alike_here(folder, torch.load(folder / "out.pt"))
        assert {path.name for path in (folder / "again").glob("*.py")} == files
        assert json.loads((folder / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP


def assert_loads_alike_here(folder: Path, got: dict[str, torch.Tensor]) -> None:
    """With the package the same numbers, bit for bit."""
    tokens = torch.arange(24).view(2, 12)
    for auto in (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification):
        torch.manual_seed(0)
        model = auto.from_pretrained(folder).eval()
        assert type(model).__module__ == "hf_moe_cpt.modeling.modeling_cpt_moe"
        if auto is not AutoModelForSequenceClassification:  # its classifier is drawn anew
            assert torch.equal(got[auto.__name__], model(input_ids=tokens)[0]), auto.__name__
        if auto is AutoModelForCausalLM:
            assert torch.equal(got["loss"], model.train()(input_ids=tokens, labels=tokens).loss)
            assert torch.equal(got["generated"], model.eval().generate(tokens[:1], max_new_tokens=3, do_sample=False))
    assert got["AutoModelForSequenceClassification"].shape == (2, 2)
