"""transformers' Auto classes know `cpt_moe` in either order of import; the hooks behind it come and go."""

import inspect
import pickle
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_moe_cpt
from hf_moe_cpt.registration import _AfterImport, _ModelClassOnUse, _run_after_import
from tests.helpers.fresh_process import run_python


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = hf_moe_cpt.CptMoeConfig.from_preset("sb-granular-tiny", num_hidden_layers=1, vocab_size=64)
    hf_moe_cpt.CptMoeForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_moe_cpt; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import hf_moe_cpt",
    ],
    ids=["package first", "transformers first"],
)
def test_checkpoint_loads_in_either_order_of_import(imports: str, checkpoint: Path) -> None:
    program = f"{imports}; print(type(AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})))"
    assert "hf_moe_cpt.modeling.modeling_cpt_moe.CptMoeForCausalLM" in run_python("-c", program).stdout


@pytest.mark.parametrize(
    "auto_class, name",
    [
        (AutoModel, "CptMoeModel"),
        (AutoModelForCausalLM, "CptMoeForCausalLM"),
        (AutoModelForSequenceClassification, "CptMoeForSequenceClassification"),
    ],
)
def test_auto_classes_build_our_classes(auto_class: type, name: str) -> None:
    config = AutoConfig.for_model("cpt_moe", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    assert type(config) is hf_moe_cpt.CptMoeConfig
    assert type(auto_class.from_config(config)) is getattr(hf_moe_cpt, name)
    assert auto_class._model_mapping[hf_moe_cpt.CptMoeConfig] is getattr(hf_moe_cpt, name)


def test_place_holder_looks_like_a_model_class_and_can_be_pickled() -> None:
    holder = _ModelClassOnUse("CptMoeForCausalLM", hf_moe_cpt.CptMoeConfig)
    assert holder.__name__ == "CptMoeForCausalLM"
    assert not holder.__module__.startswith("transformers.")
    again = pickle.loads(pickle.dumps(holder))
    assert again.from_pretrained == hf_moe_cpt.CptMoeForCausalLM.from_pretrained


def test_action_runs_once_right_after_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_to_wait_for.py").write_text("def f():\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    _run_after_import("module_to_wait_for", lambda: seen.append(sys.modules["module_to_wait_for"].f()))
    assert seen == []
    import module_to_wait_for

    assert seen == [7]
    assert "return 7" in inspect.getsource(module_to_wait_for)
    assert not any(isinstance(finder, _AfterImport) and "wait_for" in finder.module_name for finder in sys.meta_path)
    _run_after_import("module_to_wait_for", lambda: seen.append(8))
    assert seen == [7, 8]


def test_a_module_that_is_missing_stays_missing() -> None:
    seen = []
    _run_after_import("module_that_nobody_wrote", lambda: seen.append(1))
    with pytest.raises(ModuleNotFoundError, match="module_that_nobody_wrote"):
        import module_that_nobody_wrote  # noqa: F401
    assert seen == []
