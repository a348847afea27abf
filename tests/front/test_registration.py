"""transformers' Auto classes know `cpt_moe` in either order of import; the hooks behind it come and go."""

import inspect
import pickle
import pkgutil
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_moe_cpt
from hf_moe_cpt.registration import _ModelClassOnUse, _run_after_import
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


def test_no_finder_of_ours_is_asked_for_modules_of_others() -> None:
    program = "import sys; before = list(sys.meta_path); import hf_moe_cpt; print(sys.meta_path == before)"
    assert run_python("-c", program).stdout.strip() == "True"


def test_experts_are_registered_whatever_is_imported_first_and_without_triton() -> None:
    look = "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known; print('hf_moe_cpt' in known)"
    for first in ("import hf_moe_cpt.kernels.experts_interface", "import sys; sys.modules['triton'] = None"):
        assert run_python("-c", f"{first}; import hf_moe_cpt; {look}").stdout.strip() == "True"
