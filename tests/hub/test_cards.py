"""Cards: each number is in a file of the run, no section is empty, the metadata is what the Hub reads."""

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_moe_cpt.hub.cards import CardOverrides, build_card, check_metadata, count_parameters, is_generated
from hf_moe_cpt.scripts.card import main
from tests.helpers.example_cards import RUNS
from tests.helpers.source_tree import PROJECT
from tests.hub.conftest import log_of


def _results(text: str) -> dict[str, float]:
    results = ModelCard(text).data.eval_results or []
    return {result.metric_type: result.metric_value for result in results}


@pytest.mark.parametrize(
    ("method", "measures"),
    [
        ("cpt", {"new_loss", "replay_loss", "forgetting", "adaptation"}),
        ("rainbowpo", {"loss", "rewards/accuracies", "rewards/margins"}),
        ("surgery", {"unlearn_ce", "obsolete_ce", "update_ce", "retain_ce", "retain_kl", "neighbour_kl"}),
    ],
)
def test_numbers_are_those_of_the_run(finished, method, measures):
    folder = finished[method]
    text = build_card(folder).text
    saved = json.loads((folder / "all_results.json").read_text())
    found = _results(text)
    assert measures <= found.keys()
    for name, value in found.items():
        key = name if name in saved else f"eval_{name}"
        assert value == pytest.approx(saved[key], rel=1e-5)
        assert f"| {saved[key]:.4g} |" in text
    check_metadata(text)


@pytest.mark.parametrize("method", ["cpt", "rainbowpo", "surgery"])
def test_no_section_is_empty_and_nothing_is_left_of_the_template(finished, method):
    text = build_card(finished[method], CardOverrides(repository="someone/x")).text
    sections = re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]
    assert len(sections) >= 6 and all(section.strip() for section in sections)
    assert not re.search(r"\{\{ |\{%|\bNone\b|\bnan\b|Undefined|undefined", text)
    assert re.search(r'from_pretrained\("someone/x", trust_remote_code=True\)', text)
    assert text.count("```") % 2 == 0 and "\n\n\n" not in text
    assert not re.search(r"/tmp|/root|/work|/home", text)  # nothing of the machine's folders


def test_a_section_without_facts_is_left_out(finished, tmp_path: Path):
    source = finished["cpt"]
    for name in ("config.json", "model.safetensors", "cpt_state.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    text = build_card(tmp_path).text
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Training", "Architecture", "How to load", "Intended use and limits", "Citation"]
    assert "model-index" not in text
    check_metadata(text)


def test_what_a_card_quotes_is_text(folder):
    """Names and facts of other people end no line, no table, no string of Python, and are no HTML or link."""
    nasty = 'a"); import os; ("<script>x</script> | [b](http://c) `d`\n## e'
    run = json.loads((folder / "training_run.json").read_text())
    run |= {"device": nasty, "versions": {nasty: nasty}, "arguments": run["arguments"] | {"cpt_schedule": nasty}}
    (folder / "training_run.json").write_text(json.dumps(run | {"started_from": nasty}))
    for name, changes in {"config.json": {"router_type": nasty}, "cpt_state.json": {"phase": nasty}}.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    text = build_card(folder, CardOverrides(title=nasty, datasets=[nasty], base_model=nasty)).text
    assert "## e" not in text.splitlines() and not re.search(r"(?<![`\\])<script>(?!x</script> \| \[b)", text)
    body = text.partition("\n---\n")[2]
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", re.sub(r"\\.", "", body), flags=re.DOTALL)
    assert not re.search(r"<\w|\]\(http://c", outside)
    loading = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    calls = [node for node in ast.walk(ast.parse(loading)) if isinstance(node, ast.Import)]
    assert calls == []  # only "from ... import"
    columns = {line.count("|") - line.count("\\|") for line in re.findall(r"^\| .*$", text, re.MULTILINE)}
    assert columns <= {3, 4, 5}
    check_metadata(text)


def test_the_start_is_step_0_of_the_log(finished):
    text = build_card(finished["cpt"]).text
    first = next(entry for entry in log_of(finished["cpt"]) if "eval_new_loss" in entry)
    assert first["step"] == 0
    assert f"| held-out new text | {first['eval_new_loss']:.4g} |" in text


def test_what_the_owner_tells_goes_into_the_metadata(finished):
    told = CardOverrides("me/x", ("me/texts", "some files"), "mit", ("en", "de"), "org/base", "A title", ("code",))
    data = ModelCard(build_card(finished["cpt"], told).text).data
    assert (data.license, data.language, data.datasets) == ("mit", ["en", "de"], ["me/texts"])
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("org/base", "finetune")
    assert {"code", "moe", "continual-pre-training"} <= set(data.tags)


def test_a_parent_on_disk_is_no_base_model(finished):
    text = build_card(finished["rainbowpo"]).text
    assert "base_model" not in text


def test_parameters_are_counted_from_the_headers(finished):
    model = AutoModelForCausalLM.from_pretrained(finished["cpt"])
    assert count_parameters(finished["cpt"]) == model.num_parameters()


def test_the_command_prints_writes_and_spares_what_somebody_wrote(folder, capsys):
    (folder / "README.md").unlink(missing_ok=True)
    main([str(folder), "--print"])
    assert "## How to load" in capsys.readouterr().out and not (folder / "README.md").exists()
    main([str(folder), "--repository", "me/x"])
    text = (folder / "README.md").read_text()
    assert is_generated(text) and '"me/x"' in text
    assert all((folder / path).is_file() for path in re.findall(r"!\[.*\]\((.*)\)", text))
    main([str(folder)])  # over its own
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="was written by somebody: keep it, or replace it with --overwrite"):
        main([str(folder)])
    main([str(folder), "--overwrite"])
    assert is_generated((folder / "README.md").read_text())


def test_folders_that_tell_too_little_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither config.json nor adapter_config.json"):
        build_card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"does not say which method made it .* choose one of cpt, rainbowpo"):
        build_card(tmp_path)
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"trainer_state.json must hold a JSON object, got list"):
        build_card(tmp_path, method="cpt")
    with pytest.raises(ValueError, match=r"lacks library_name and pipeline_tag in its head"):
        check_metadata("# Mine\n")


def test_the_examples_in_the_docs_are_cards_that_the_hub_takes():
    cards = sorted((PROJECT / "docs" / "cards").glob("*/README.md"))
    assert {path.parent.name for path in cards} == {*RUNS, "data"}
    for path in cards:
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "data":
            check_metadata(text)
            assert _results(text)
        assert all((path.parent / plot).is_file() for plot in re.findall(r"!\[.*\]\((.*)\)", text))
