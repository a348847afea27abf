"""`hf-moe-cpt push`: what is published loads where the package is not, what fails publishes nothing and says why."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_moe_cpt.scripts.push import main as push
from tests.helpers.hub_checkpoints import fingerprint
from tests.hub.conftest import NOT_ALLOWED


LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
name, out = sys.argv[1:3]
revision = sys.argv[3] if len(sys.argv) > 3 else "main"
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=True)
tokens = torch.arange(24).view(2, 12)
found = {"logits": model(input_ids=tokens).logits.detach(),
         "generated": model.generate(tokens[:1], max_new_tokens=4, do_sample=False)}
model.save_pretrained(out + ".again")
again = AutoModelForCausalLM.from_pretrained(out + ".again", trust_remote_code=True).eval()
assert torch.equal(again(input_ids=tokens).logits, found["logits"])
torch.save(found, out)
assert not {"hf_moe_cpt", "triton"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    "method", ["cpt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("quickstart", "rainbowpo", "surgery"))]
)
def test_a_published_run_loads_without_the_package_bit_for_bit(method, request, hub, command, elsewhere, tmp_path):
    fixture = "quickstart_model" if method == "quickstart" else "finished"
    folder = request.getfixturevalue(fixture)
    folder = folder if method == "quickstart" else folder[method]
    before = fingerprint(folder)
    shown = command("push", folder, f"someone/{method}", "--license", "apache-2.0", "--dataset_name", "me/texts")
    assert "published" in shown.stdout
    assert fingerprint(folder) == before  # local files untouched
    published = hub.files(f"someone/{method}")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "modeling_cpt_moe.py"} <= set(published)
    assert not [name for name in published if name.endswith((".bin", ".pt", ".pth")) or "checkpoint-" in name]
    card = published["README.md"].decode()
    assert "model-index:" in card and "license: apache-2.0" in card and "- me/texts" in card
    for plot in (line.rpartition("(")[2].rstrip(")") for line in card.splitlines() if line.startswith("![")):
        assert published[plot].startswith(b"<svg")
    assert len(hub.commits(f"someone/{method}")) == 1  # all or nothing

    out = tmp_path / "out.pt"
    elsewhere(LOAD, f"someone/{method}", out)
    got = torch.load(out)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__module__ == "hf_moe_cpt.modeling.modeling_cpt_moe"
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(model(input_ids=tokens).logits, got["logits"])
    assert torch.equal(model.generate(tokens[:1], max_new_tokens=4, do_sample=False), got["generated"])


def test_a_dry_run_prints_files_and_card_and_publishes_nothing(folder, hub, command):
    shown = command("push", folder, "someone/tiny", "--dry_run", token=None).stdout
    assert "model.safetensors" in shown and "## How to load" in shown
    assert "left at home: 'training_args.bin' (no kind that is published)" in shown
    assert 'from_pretrained("someone/tiny", trust_remote_code=True)' in shown
    assert hub.store.repositories == {} and hub.log == []


def test_private_only_if_asked_and_shards_to_a_branch(folder, hub, command, elsewhere, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    command("push", folder, "someone/open")
    assert not hub.store.find("model", "someone/open").private
    assert sum(name.endswith(".safetensors") for name in hub.files("someone/open")) > 1
    command("push", folder, "someone/closed", "--private", "--revision", "trial")
    repository = hub.store.find("model", "someone/closed")
    assert repository.private
    assert "config.json" in repository.at("trial").files and "config.json" not in repository.at("main").files
    elsewhere(LOAD, "someone/closed", tmp_path / "out.pt", "trial")


def test_two_revisions_of_the_code_serve_one_process(folder, hub, command, elsewhere):
    command("push", folder, "someone/twice")
    first = hub.store.find("model", "someone/twice").branches["main"]
    code = folder / "modeling_cpt_moe.py"
    code.write_text(code.read_text() + "\nREVISION = 2\n")
    command("push", folder, "someone/twice")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(24).view(2, 12)
models = [AutoModelForCausalLM.from_pretrained("someone/twice", revision=r, trust_remote_code=True).eval()
          for r in (sys.argv[1], "main")]
assert hasattr(sys.modules[type(models[1]).__module__], "REVISION")
assert not hasattr(sys.modules[type(models[0]).__module__], "REVISION")
assert torch.equal(*(model(input_ids=tokens).logits for model in models))
"""
    elsewhere(script, first)


def test_where_the_package_is_its_kernels_serve_the_remote_class(folder, hub, command, elsewhere):
    command("push", folder, "someone/tiny")
    script = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
cls = get_class_from_dynamic_module("modeling_cpt_moe.CptMoeForCausalLM", "someone/tiny")
import hf_moe_cpt
assert cls.__module__.startswith("transformers_modules.")
tokens = torch.arange(24).view(2, 12)
plain = cls.from_pretrained("someone/tiny", experts_implementation="eager").eval()
ours = cls.from_pretrained("someone/tiny", experts_implementation="hf_moe_cpt").eval()
assert ours.config._experts_implementation == "hf_moe_cpt"
torch.testing.assert_close(ours(input_ids=tokens).logits, plain(input_ids=tokens).logits)
"""
    elsewhere(script, package=True)


@pytest.mark.parametrize(
    ("upload", "commit"),
    [
        pytest.param({"drop": True}, {"status": 409}, id="409"),
        pytest.param({"status": 503}, {"drop": True}, id="503", marks=pytest.mark.slow),
    ],
)
def test_what_passes_is_tried_again(folder, hub, command, upload, commit):
    hub.fail("PUT /lfs/", **upload)
    hub.fail("POST .*/commit/", **commit)
    command("push", folder, "someone/tiny")
    assert len(hub.commits("someone/tiny")) == 1
    assert hub.files("someone/tiny")["config.json"] == (folder / "config.json").read_bytes()


def test_an_interrupted_upload_goes_on_where_it_was(folder, hub, command):
    hub.fail("POST .*/commit/", status=400)
    refused = command("push", folder, "someone/tiny", check=False)
    assert refused.returncode == 2 and "the Hub refused the upload to 'someone/tiny' (400" in refused.stderr
    assert set(hub.files("someone/tiny")) == {".gitattributes"}  # nothing that claims to be a model
    sent = sum(line.startswith("PUT /lfs/") for line in hub.log)
    assert sent > 0
    command("push", folder, "someone/tiny")
    assert sum(line.startswith("PUT /lfs/") for line in hub.log) == sent  # nothing is sent twice
    assert "model.safetensors" in hub.files("someone/tiny")


@pytest.mark.parametrize(("token", "name", "message"), NOT_ALLOWED)
def test_who_and_where_are_told_in_one_line(folder, hub, command, token, name, message):
    hub.store.create("dataset", "someone/rows", private=False)
    refused = command("push", folder, name, token=token, check=False)
    assert refused.returncode == 2 and message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert all(kind == "dataset" for kind, _ in hub.store.repositories)


def _lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _hide_in_checkpoint(folder: Path) -> None:
    (folder / "checkpoint-6").mkdir()
    (folder / "config.json").rename(folder / "checkpoint-6" / "config.json")


def _change(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _place_a_shard_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')


def _link_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / "model.safetensors", 4000), "model.safetensors' is corrupt or cut short"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 1000), "model.safetensors' is corrupt or cut"),
        (_lose_a_shard, "lacks the tensor 'a'"),
        (lambda f: (f / "config.json").write_text('{"model_type": "cpt_moe"}'), "has no auto_map"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "holds only pytorch_model.bin: save"),
        (_hide_in_checkpoint, "is no checkpoint: it holds no config.json (but 'checkpoint-6' inside does"),
        (lambda f: [path.unlink() for path in f.glob("token*")], "holds no tokenizer"),
        (lambda f: (f / "configuration_cpt_moe.py").unlink(), "lacks configuration_cpt_moe.py"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be used (JSONDecodeError"),
        (
            lambda f: (f / "LICENSE").write_text("hf_" + "x" * 34),
            "LICENSE' holds what looks like a Hub token (line 1)",
        ),
        (lambda f: _change(f, lambda w: w.pop("lm_head.weight")), "lm_head.weight is not in its weights"),
        (
            lambda f: _change(f, lambda w: w["model.norm.weight"].fill_(math.nan)),
            "model.norm.weight holds values that",
        ),
        (lambda f: _change(f, lambda w: w.update({"model.norm.weight": torch.ones(7)})), "has the shape (7,), its"),
        (_place_a_shard_outside, "in '../secret.safetensors': allowed are safetensors files beside it"),
        (_link_the_weights, "model.safetensors' is a link, and nothing is published through one"),
        (lambda f: (f / "README.md").write_text("---\nlicense: mit\n---\nMine."), "README.md lacks library_name"),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_a_folder_that_would_not_load_is_refused_before_a_request(folder, damage, message, monkeypatch):
    damage(folder)
    monkeypatch.setattr("hf_moe_cpt.scripts.push.publish", None)  # calling it would fail otherwise
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        push([str(folder), "someone/tiny"])
    assert "\n" not in str(refused.value)


def test_a_card_that_somebody_wrote_is_published_as_it_is_unless_the_hub_refuses_it(folder, hub, command):
    head = "library_name: transformers\npipeline_tag: text-generation\nmodel-index:\n- name: x\n  results:\n"
    (folder / "README.md").write_text(f"---\n{head}  - task: {{}}\n---\n# Mine\n")
    refused = command("push", folder, "someone/tiny", check=False)
    assert refused.returncode == 2 and "README.md" in refused.stderr
    assert "config.json" not in (hub.files("someone/tiny") if hub.store.repositories else {})
    text = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# Mine\n"
    (folder / "README.md").write_text(text)
    command("push", folder, "someone/tiny")
    assert hub.files("someone/tiny")["README.md"].decode() == text
