"""Upcycling and conversion take a Hub id: no more is fetched than they need, and what is missing is said."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from hf_moe_cpt.hub.checkpoint_io import CheckpointReader
from hf_moe_cpt.hub.upcycle import upcycle
from tests.helpers.hub_checkpoints import biased, logits_of, model_of, saved
from tests.helpers.tolerances import assert_matches


FROM_THE_HUB = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from hf_moe_cpt.hub.convert import convert
from hf_moe_cpt.hub.upcycle import upcycle
from hf_moe_cpt.scripts.upcycle import main

root, api, found = Path(sys.argv[1]), HfApi(), {}
for folder in sorted((root / "published").iterdir()):
    api.create_repo(f"someone/{folder.name}")
    found[folder.name] = api.upload_folder(repo_id=f"someone/{folder.name}", folder_path=folder).oid
main(["someone/qwen2", "--to", "switch", "--router_init", "zero", "--output_dir", str(root / "upcycled")])
convert("someone/olmoe", root / "converted", "cpt_moe", revision=found["olmoe"])
refused = json.loads(sys.argv[2])
for source, revision in refused:
    try:
        upcycle(source, root / "never", "switch", revision=revision)
    except (ValueError, OSError) as error:
        found[f"{source}@{revision}"] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""
REFUSED = {
    ("someone/nothing", None): ("ValueError", "'someone/nothing' is no folder here and no repository on the Hub that"),
    ("someone/gated", None): ("ValueError", "'someone/gated' is gated: accept its conditions on the Hub, then log in"),
    ("someone/broken", None): ("ConnectionError", "the Hub answered with status 501 for 'someone/broken': try again"),
    ("someone/cut", None): ("ConnectionError", "the connection to the Hub broke while fetching 'someone/cut' ("),
    ("someone/qwen2", "nowhere"): ("ValueError", "'someone/qwen2' has no revision 'nowhere': name a branch, a tag or"),
    ("someone/gpt2", None): ("ValueError", "someone/gpt2 is of type 'gpt2': dense models of llama, mistral, qwen2,"),
    ("someone/card", None): ("ValueError", "'someone/card' is no checkpoint (no config.json): name a folder of one"),
    ("someone/pickled", None): ("ValueError", "model.safetensors is missing: someone/pickled is no whole checkpoint"),
    ("someone/half", None): ("ValueError", "model-00002-of-00002.safetensors is missing: someone/half is no whole"),
}


def publish(root: Path) -> None:
    """What will be uploaded: whole and broken repositories, with files that nobody needs."""
    dense = saved(biased(model_of("qwen2")), root / "qwen2", max_shard_size=12_000)
    (dense / "tokenizer_config.json").write_text("{}")
    (dense / "pytorch_model.bin").write_bytes(b"the same weights again")
    (dense / "consolidated.safetensors").write_bytes(b"and again")
    (dense / "original").mkdir()
    (dense / "original" / "model.safetensors").write_bytes(b"and once more")
    saved(model_of("olmoe"), root / "olmoe")
    saved(model_of("gpt2"), root / "gpt2")
    (root / "card").mkdir()
    (root / "card" / "README.md").write_text("no model yet")
    saved(model_of("llama"), root / "pickled")
    (root / "pickled" / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    saved(model_of("llama"), root / "cut")
    half = saved(model_of("llama"), root / "half", max_shard_size=16_000)
    (half / "model-00002-of-00002.safetensors").unlink()


@pytest.mark.slow
def test_a_hub_id_is_as_good_as_a_folder(hub, elsewhere, tmp_path: Path) -> None:
    publish(tmp_path / "published")
    hub.fail("someone/gated", status=403, times=9, headers={"X-Error-Code": "GatedRepo"})
    hub.fail("someone/broken", status=501, times=9)
    hub.fail("someone/cut/resolve/.*safetensors$", drop=True, times=9)
    hub.fail("someone/qwen2/resolve/.*model-00002", status=503, times=1)  # passes when it is asked again
    done = elsewhere(FROM_THE_HUB, tmp_path, json.dumps(list(REFUSED)), package=True)
    found = json.loads(done.stdout.splitlines()[-1])

    dense = tmp_path / "published" / "qwen2"
    assert_matches("upcycled", logits_of(tmp_path / "upcycled"), logits_of(dense))
    assert (tmp_path / "upcycled" / "tokenizer_config.json").is_file()
    record = json.loads((tmp_path / "upcycled" / "upcycling.json").read_text())
    assert (record["dense"], record["dense_revision"]) == ("someone/qwen2", found["qwen2"])
    assert AutoConfig.from_pretrained(tmp_path / "converted").qk_norm == "projection"
    assert_matches("converted", logits_of(tmp_path / "converted"), logits_of(tmp_path / "published" / "olmoe"))

    fetched = [request for request in hub.log if request.startswith("GET") and "/resolve/" in request]
    assert [request for request in fetched if "qwen2" in request and "model-00001-of" in request]
    unneeded = ("pytorch_model.bin", "consolidated", "original", "gpt2/resolve/main/model")
    assert not [request for request in fetched if any(name in request for name in unneeded)]
    assert not [request for request in fetched if "gpt2" in request and request.endswith(".safetensors")]

    for (source, revision), (kind, text) in REFUSED.items():
        got_kind, got = found[f"{source}@{revision}"]
        assert got_kind == kind and text in got and "\n" not in got, (source, revision, got_kind, got)
    assert not (tmp_path / "never").exists()


def test_without_the_hub_it_says_so(tmp_path: Path) -> None:
    """This process is offline."""
    with pytest.raises(ConnectionError, match="'someone/thing' is no folder here, and the Hub cannot be reached"):
        upcycle("someone/thing", tmp_path / "moe", "switch")
    assert list(tmp_path.iterdir()) == []


def test_a_revision_is_for_repositories(tmp_path: Path) -> None:
    dense = saved(model_of("llama"), tmp_path / "dense")
    with pytest.raises(ValueError, match="--revision 'v1' is for repositories on the Hub, and .*dense' is not one"):
        CheckpointReader(dense, "v1")
    with pytest.raises(ValueError, match="'a/b/c' is no checkpoint .*: name a folder of one, or a Hub id"):
        CheckpointReader("a/b/c")
