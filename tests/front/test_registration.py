"""transformers' Auto classes know `cpt_moe` in either order of import; the hooks behind it come and go."""

import inspect
import pickle
import pkgutil
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import hf_moe_cpt
from hf_moe_cpt.registration import _ModelClassOnUse, _run_after_import


CLASSIFYING = (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, *CLASSIFYING])
def test_auto_classes_build_our_classes(auto_class: type) -> None:
    name = auto_class.__name__.replace("AutoModelFor", "CptMoeFor").replace("AutoModel", "CptMoeModel")
    config = AutoConfig.for_model("cpt_moe", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    assert type(config) is hf_moe_cpt.CptMoeConfig
    assert type(auto_class.from_config(config)) is getattr(hf_moe_cpt, name)
    assert auto_class._model_mapping[hf_moe_cpt.CptMoeConfig] is getattr(hf_moe_cpt, name)
    hf_moe_cpt.register_kernels()  # again: nothing changes
    assert ALL_EXPERTS_FUNCTIONS["hf_moe_cpt"].__module__ == "hf_moe_cpt.kernels.experts_interface"


def test_place_holder_looks_like_a_model_class_and_can_be_pickled() -> None:
    holder = _ModelClassOnUse("CptMoeForCausalLM", hf_moe_cpt.CptMoeConfig)
    assert holder.__name__ == "CptMoeForCausalLM"
    assert not holder.__module__.startswith("transformers.")
    again = pickle.loads(pickle.dumps(holder))
    assert again.from_pretrained == hf_moe_cpt.CptMoeForCausalLM.from_pretrained


def test_action_runs_once_right_after_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waited_for").mkdir()
    (tmp_path / "waited_for" / "inner.py").write_text("def f():\n    return 7\n")
    (tmp_path / "waited_for" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    _run_after_import("waited_for.inner", lambda: seen.append(sys.modules["waited_for.inner"].f()))
    _run_after_import("waited_for.missing", lambda: seen.append(1))
    _run_after_import("package_that_nobody_wrote.inner", lambda: seen.append(1))
    import waited_for

    assert seen == [] and [found.name for found in pkgutil.iter_modules(waited_for.__path__)] == ["inner"]
    import waited_for.inner

    assert seen == [7]
    assert "return 7" in inspect.getsource(waited_for.inner)
    with pytest.raises(ModuleNotFoundError, match="waited_for.missing"):
        import waited_for.missing  # noqa: F401
    _run_after_import("waited_for.inner", lambda: seen.append(8))
    assert seen == [7, 8]
