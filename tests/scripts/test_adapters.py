"""Adapters and frozen parts from the command line, in all three trainers: experts included, saved and resumed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_moe_cpt.model_arguments import ModelArguments, expert_weights
from hf_moe_cpt.routing.hooks import find_experts
from hf_moe_cpt.scripts import cpt, rainbowpo, surgery
from hf_moe_cpt.trainers.common.updates import freeze, quantise_experts
from tests.helpers.fresh_process import command_words
from tests.helpers.hostile_inputs import WEIGHTS
from tests.helpers.preference_runs import pairs
from tests.helpers.tiny_models import QUICK, word_tokenizer
from tests.helpers.tiny_moes import moe_model
from tests.helpers.tolerances import relative_rms_error


MAINS = {"cpt": cpt.main, "rainbowpo": rainbowpo.main, "surgery": surgery.main}
MATRICES = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two mixtures on disk, texts, pairs and sets of a surgery."""
    folder = tmp_path_factory.mktemp("adapters")
    for kind in ("gpt_oss", "cpt_moe"):
        moe_model(kind).save_pretrained(folder / kind)
        word_tokenizer().save_pretrained(folder / kind)
    texts = [" ".join(f"w{2 + (start + place) % 40}" for place in range(20)) for start in range(12)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    pairs(8).to_json(folder / "pairs.jsonl")
    for seed, name in enumerate(("unlearn", "retain")):
        rows = pairs(4, seed).rename_column("chosen", "completion").remove_columns("rejected")
        rows.to_json(folder / f"{name}.jsonl")
    return folder


def words_of(command, folder, kind, run, **changes):
    data = {
        "cpt": {"dataset_name": folder / "texts.jsonl", "max_length": 16, "eval_on_start": False},
        "rainbowpo": {"dataset_name": folder / "pairs.jsonl", "bf16": False, "gradient_checkpointing": False},
        "surgery": {f"{name}_dataset_name": folder / f"{name}.jsonl" for name in ("unlearn", "retain")}
        | {"max_length": 32, "forget_target": 3.5, "eval_steps": 1},
    }[command]
    adapter = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "experts"]}
    pace = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    settings = {"model_name_or_path": folder / kind, "output_dir": run, **QUICK, **data, **adapter, **pace, **changes}
    return command_words(settings)


@pytest.mark.parametrize(
    "command, kind",
    [
        *(pytest.param("cpt", kind, marks=pytest.mark.slow) for kind in ("gpt_oss", "cpt_moe")),
        ("rainbowpo", "gpt_oss"),
        pytest.param("surgery", "cpt_moe", marks=pytest.mark.slow),
    ],
)
def test_adapters_of_experts_train_where_nothing_is_frozen_and_resume(folder, tmp_path, command, kind):
    run, again = tmp_path / "run", tmp_path / "again"
    frozen = {"freeze": ["layers.0", "router"], "warmup_steps": 0}  # two steps are few to warm up
    MAINS[command](words_of(command, folder, kind, run, **frozen))
    assert sorted(json.loads((run / "adapter_config.json").read_text())["target_parameters"]) == MATRICES
    weights = load_file(run / "adapter_model.safetensors")
    changed = {name: bool(value.any()) for name, value in weights.items() if "lora_B" in name}  # they start at 0
    assert len(changed) == 6 and changed == {name: ".layers.1." in name for name in changed}
    shutil.copytree(run / "checkpoint-1", again / "checkpoint-1")
    MAINS[command](words_of(command, folder, kind, again, **frozen, resume_from_checkpoint=True))
    resumed = load_file(again / "adapter_model.safetensors")
    assert resumed.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-7, msg=name)
    torn = shutil.copytree(run / "checkpoint-1", tmp_path / "torn" / "checkpoint-1")
    (torn / "checkpoint_files.json").unlink()
    WEIGHTS["lost"](torn / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is not in its weights, and would be random"):
        MAINS[command](words_of(command, folder, kind, torn.parent, **frozen, resume_from_checkpoint=True))


REFUSED = {
    "settings without an adapter": ({"use_peft": None, "lora_target_modules": ["q_proj"]}, "add --use_peft"),
    "a rank without an adapter": ({"use_peft": None, "lora_target_modules": None}, "--lora_r is about an adapter"),
    "two kinds of quantisation": ({"load_in_4bit": True, "load_in_8bit": True}, "choose one of them"),
    "dropout in experts": ({"lora_dropout": 0.1}, "have neither --lora_dropout nor --use_dora"),
    "an unknown part": ({"freeze": ["heads"]}, "'heads' is no part of .* choose from router, experts, embeddings"),
    "everything frozen": ({"freeze": ["model"]}, "Nothing is left to train when model is frozen"),
    "an option that from_pretrained lacks": ({"model_init_kwargs": '{"revision_": "x"}'}, "revision_"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_no_adapter_can_be_is_refused(folder, tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cpt.main(words_of("cpt", folder, "gpt_oss", tmp_path / "run", **changes))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe", "cpt_moe"])
@pytest.mark.parametrize("is_adapted", [True, False], ids=["adapted", "bare"])
def test_quantised_experts_are_near_the_weights_trained_through_and_saved_as_they_compute(
    kind, bits, is_adapted, tmp_path
):
    """Against the weights they were made of: the rounding of bitsandbytes' types. Adapters, of experts too, learn."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model, tokens = moe_model(kind), torch.arange(2, 42).view(2, 20)
    experts = find_experts(model)[0]
    before, size = experts.down_proj.detach().clone(), model.num_parameters()
    targets = {"target_parameters": expert_weights(model)} if is_adapted else {}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **targets))
    for _ in range(2):  # the second time nothing happens
        quantise_experts(model, ModelArguments(load_in_4bit=bits == 4, load_in_8bit=bits == 8).quantization())
    base = model.get_base_model()
    assert 0 < relative_rms_error(experts.forward.whole("down_proj"), before) < (0.12 if bits == 4 else 0.02)
    assert experts.down_proj.shape == before.shape and experts.down_proj.untyped_storage().nbytes() == 4
    assert base.num_parameters() >= size  # as if nothing were quantised
    codes = [codes.clone() for codes in experts.buffers() if codes.dtype == torch.uint8]
    with torch.no_grad():
        first, again = (model(input_ids=tokens).logits for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)  # nothing is added up from pass to pass
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for place in range(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=place > 0):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)
    kept = [codes for codes in experts.buffers() if codes.dtype == torch.uint8]
    assert all(torch.equal(old, new) for old, new in zip(codes, kept, strict=True))
    model.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    if is_adapted:
        with pytest.raises((RuntimeError, ValueError), match="single memory location|merged adapter"):
            model.merge_and_unload()
        return
    whole = model.merge_and_unload()  # an adapter beside the experts
    whole.save_pretrained(tmp_path / "whole")
    loaded = type(whole).from_pretrained(tmp_path / "whole", experts_implementation="eager")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, whole(input_ids=tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("command", MAINS)
def test_every_command_trains_adapters_over_experts_of_4_bits(folder, tmp_path, command):
    pytest.importorskip("bitsandbytes")
    MAINS[command](words_of(command, folder, "cpt_moe", tmp_path / "run", load_in_4bit=True))
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    changed = {name: bool(value.any()) for name, value in weights.items() if "lora_B" in name}
    assert any(".experts." in name for name in changed) and all(changed.values())


def test_all_linear_layers_of_a_mixture_are_its_experts_too(folder):
    for kind, want in (("gpt_oss", MATRICES), ("cpt_moe", MATRICES)):
        arguments = ModelArguments(str(folder / kind), use_peft=True, lora_target_modules=["all-linear"])
        config = arguments.peft_config()
        assert (config.target_modules, config.target_parameters, config.lora_dropout) == ("all-linear", want, 0.0)
    assert ModelArguments(use_peft=True).peft_config().lora_dropout == 0.05


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "jamba"])
@pytest.mark.parametrize("part", ["experts", "embeddings", "head", "norms", "self_attn", "layers.1"])
def test_a_part_is_frozen_and_nothing_else(kind, part):
    model = moe_model(kind)
    freeze(model, [part])
    fragment = {"experts": ".experts.", "embeddings": "embed_tokens", "head": "lm_head", "norms": "norm"}
    want = {name for name, _ in model.named_parameters() if fragment.get(part, f".{part}.") in name}
    assert want and {name for name, weight in model.named_parameters() if not weight.requires_grad} == want
