"""Decoding with a cache of any kind makes the tokens that decoding without one makes, here and as remote code.

The reference is greedy decoding with `use_cache=False`, which sees the whole text at every step.
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hf_moe_cpt.modeling.configuration_cpt_moe import PRESETS, CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CACHE_NAME, NEWEST_TESTED, CptMoeForCausalLM, warn_of_untested_release


TINY = [preset for preset in PRESETS if preset.endswith("-tiny")]
ATTENTION = {"num_key_value_heads": 2, "qk_norm": "head", "qkv_bias": True, "sliding_window": 4}
SETTINGS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def model_of(preset: str, **fields) -> CptMoeForCausalLM:
    torch.manual_seed(0)
    return CptMoeForCausalLM(CptMoeConfig.from_preset(preset, vocab_size=64, num_hidden_layers=2, **fields)).eval()


def here_and_remote(folder: Path, preset: str, **fields) -> list[torch.nn.Module]:
    """A model of the package, and the same weights with the code that was saved beside them."""
    model = model_of(preset, **fields)
    model.save_pretrained(folder)
    remote_class = get_class_from_dynamic_module("modeling_cpt_moe.CptMoeForCausalLM", str(folder))
    remote = remote_class.from_pretrained(folder, config=CptMoeConfig.from_pretrained(folder)).eval()
    assert type(remote).__module__.startswith("transformers_modules.")
    return [model, remote]


def prompts(rows: int = 2, columns: int = 7) -> torch.Tensor:
    return torch.randint(1, 64, (rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset, fields", [*((preset, {}) for preset in TINY), ("pb-granular-tiny", ATTENTION)])
def test_no_kind_of_cache_and_no_padding_changes_a_token(preset: str, fields: dict, tmp_path) -> None:
    ids = prompts()
    padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], dim=1)
    mask = (torch.arange(10) >= 3).long().expand(2, 10)
    for model in here_and_remote(tmp_path, preset, **fields) if fields else [model_of(preset)]:
        want = model.generate(ids, **SETTINGS, use_cache=False)[:, 7:]
        ways = {
            "dynamic": {"input_ids": ids},
            "static": {"input_ids": ids, "cache_implementation": "static", "disable_compile": True},
            "assisted": {"input_ids": ids[:1], "assistant_model": model},
            "given": {"input_ids": ids, CACHE_NAME: DynamicCache(config=model.config)},
            "embeddings": {"inputs_embeds": model.get_input_embeddings()(ids)},
            "padding": {"input_ids": padded, "attention_mask": mask},
            "padding, no cache": {"input_ids": padded, "attention_mask": mask, "use_cache": False},
        }
        for way, given in ways.items():
            got = model.generate(**given, **SETTINGS)[:, -5:]
            assert torch.equal(got, want[: len(got)]), (way, type(model).__module__)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_are_one_argument(name: str, tmp_path) -> None:
    ids = prompts()
    for model in here_and_remote(tmp_path, "pb-granular-tiny", **ATTENTION):
        want = model(ids, use_cache=False).logits[:, -1]
        for part in (model, model.model):
            cache = DynamicCache(config=model.config)
            part(ids[:, :-1], use_cache=True, **{name: cache})
            assert cache.get_seq_length() == ids.shape[1] - 1
            last = part(ids[:, -1:], use_cache=True, **{name: cache})
            logits = last.logits if part is model else model.lm_head(last.last_hidden_state)
            torch.testing.assert_close(logits[:, -1], want)


def test_two_caches_are_refused() -> None:
    model = model_of("dense-tiny")
    with pytest.raises(TypeError, match="two names of one argument"):
        model(prompts(), cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize("part", ["model", "base_model"])
def test_a_keyword_that_nobody_reads_is_told(part: str, monkeypatch) -> None:
    whole = model_of("dense-tiny")
    model = whole if part == "model" else whole.base_model
    for value in (torch.ones(2, 7), DynamicCache()):
        with pytest.raises(TypeError, match=f"does not read past_keys={type(value).__name__}"):
            model(prompts(), past_keys=value)
    warnings = warnings_from_now(monkeypatch)
    model(prompts(), past_keys=3, attention_msk=None, return_dict=True, output_hidden_states=True)
    assert [line for line in warnings if "past_keys=int" in line] and not [w for w in warnings if "msk" in w]


def warnings_from_now(monkeypatch) -> list[str]:
    """The warnings of the models from now on."""
    lines: list[str] = []
    monkeypatch.setattr(sys.modules[CptMoeForCausalLM.__module__].logger, "warning_once", lines.append)
    return lines


@pytest.mark.parametrize(
    ("version", "is_told"), [("5.24.9", False), ("5.17.0", False), ("5.25.0.dev0", True), ("6.0", True)]
)
def test_an_untested_release_is_told(version: str, is_told: bool, monkeypatch) -> None:
    lines = warnings_from_now(monkeypatch)
    warn_of_untested_release(version)
    assert bool(lines) == is_told and all(version in line for line in lines)


def test_the_newest_tested_release_is_the_pinned_one() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    (pinned,) = [line.partition("==")[2] for line in pins if line.startswith("transformers==")]
    assert NEWEST_TESTED == tuple(int(part) for part in pinned.split(".")[:2])


def test_routers_are_recorded_in_training_or_when_asked() -> None:
    model, ids = model_of("pb-granular-tiny"), prompts()
    assert model(ids)[0].shape == (2, 7, 64), "the logits come first, as in every model of transformers"
    assert model(ids, output_router_logits=True).aux_loss.ndim == 0
    assert "router_logits" not in model.base_model(ids)
    assert model.train()(ids, labels=ids).router_logits is not None
    assert model(ids).router_logits is None


def test_a_sinkhorn_router_in_training_mode_is_told_once_where_people_generate(monkeypatch) -> None:
    lines = warnings_from_now(monkeypatch)
    sinkhorn, plain = model_of("sb-granular-tiny"), model_of("pb-granular-tiny")
    for model in (sinkhorn, plain.train()):
        model.generate(prompts(), **SETTINGS)
    assert not any("model.eval()" in line for line in lines)
    sinkhorn.train().generate(prompts(), **SETTINGS)
    assert sum("call model.eval() before model.generate()" in line for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["pb-granular-tiny", "sb-switch-tiny", "dense-tiny"])
def test_continuous_batching_gives_the_text_of_each_prompt_alone(preset: str) -> None:
    model = model_of(preset, attn_implementation="sdpa")
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    asked = [[5, 6, 7, 8], [9, 10], [11] * 17]
    answers = model.generate_batch(inputs=asked, generation_config=settings, progress_bar=False)
    assert len(answers) == len(asked)
    for answer in answers.values():
        alone = model.generate(torch.tensor([answer.prompt_ids]), generation_config=settings)
        assert answer.error is None and answer.generated_tokens == alone[0, len(answer.prompt_ids) :].tolist()


@pytest.mark.slow
def test_parts_on_disk_compute_the_same(tmp_path) -> None:
    model = model_of("lf-granular-tiny")
    model.save_pretrained(tmp_path / "model")
    here = ("lm_head", *(f"model.{part}" for part in ("embed_tokens", "norm", "rotary_emb", "layers.0")))
    places = {**dict.fromkeys(here, "cpu"), "model.layers.1": "disk"}
    loaded = CptMoeForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "disk")
    )
    assert next(loaded.model.layers[1].parameters()).is_meta
    torch.testing.assert_close(loaded(prompts()).logits, model(prompts()).logits)
