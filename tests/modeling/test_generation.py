"""Decoding with a cache of any kind makes the tokens that decoding without one makes, here and as remote code.

The reference is greedy decoding with `use_cache=False`, which sees the whole text at every step.
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from hf_moe_cpt.modeling.releases_cpt_moe import CACHE_NAME, NEWEST_TESTED, warn_of_untested_release


PRESETS = ("dense-tiny", "pb-granular-tiny", "sb-granular-tiny", "pb-switch-tiny", "sb-switch-tiny")
ATTENTION = {"num_key_value_heads": 2, "qk_norm": "head", "qkv_bias": True, "sliding_window": 4}
CASES = [(preset, {}) for preset in PRESETS] + [("pb-granular-tiny", ATTENTION)]
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def model_of(preset: str, **fields) -> CptMoeForCausalLM:
    torch.manual_seed(0)
    return CptMoeForCausalLM(CptMoeConfig.from_preset(preset, vocab_size=64, num_hidden_layers=2, **fields)).eval()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}{'-attention' if case[1] else ''}")
def models(request, tmp_path_factory) -> list[torch.nn.Module]:
    """One model of the package, and the same weights with the code that lies beside them."""
    preset, fields = request.param
    model = model_of(preset, **fields)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    config = CptMoeConfig.from_pretrained(folder)
    remote = remote_class(folder).from_pretrained(folder, config=config).eval()
    assert type(remote).__module__.startswith("transformers_modules.")
    return [model, remote]


def remote_class(folder: Path) -> type:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module("modeling_cpt_moe.CptMoeForCausalLM", str(folder))


def prompts(rows: int = 2, columns: int = 7) -> torch.Tensor:
    return torch.randint(1, 64, (rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", ["dynamic", "static", "assisted", "given", "embeddings"])
def test_a_cache_changes_no_token(models: list, way: str) -> None:
    for model in models:
        ids = prompts(rows=1 if way == "assisted" else 2)
        want = model.generate(ids, **SETTINGS, use_cache=False)
        given = {"input_ids": ids}
        if way == "static":
            given |= {"cache_implementation": "static", "disable_compile": True}
        elif way == "assisted":
            given |= {"assistant_model": model}
        elif way == "given":
            given |= {CACHE_NAME: DynamicCache(config=model.config)}
        elif way == "embeddings":
            given = {"inputs_embeds": model.get_input_embeddings()(ids)}
            want = want[:, ids.shape[1] :]
        assert torch.equal(model.generate(**given, **SETTINGS), want), type(model).__module__


def test_padding_on_the_left_changes_no_token(models: list) -> None:
    ids = prompts(rows=1)
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids], dim=1)
    mask = (torch.arange(10) >= 3).long()[None]
    for model in models:
        want = model.generate(ids, **SETTINGS, use_cache=False)[:, 7:]
        for use_cache in (True, False):
            got = model.generate(padded, attention_mask=mask, **SETTINGS, use_cache=use_cache)[:, 10:]
            assert torch.equal(got, want), (type(model).__module__, use_cache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_are_one_argument(models: list, name: str) -> None:
    ids = prompts()
    for model in models:
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
    """The warnings of the module that watches over the keywords, from now on."""
    lines: list[str] = []
    monkeypatch.setattr(sys.modules[warn_of_untested_release.__module__].logger, "warning_once", lines.append)
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
