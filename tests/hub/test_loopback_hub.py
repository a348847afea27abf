"""The Hub of the tests is spoken to by the unmodified huggingface_hub, and fails when told to."""

import json

import pytest


UPLOAD = """
import sys
from huggingface_hub import HfApi, hf_hub_download
api = HfApi()
print(api.whoami()["name"], api.whoami()["auth"]["accessToken"]["role"])
api.create_repo("someone/thing", private=True)
commit = api.upload_folder(repo_id="someone/thing", folder_path=sys.argv[1], commit_message="all of it")
assert api.model_info("someone/thing").sha == commit.oid
print(sorted(api.list_repo_files("someone/thing")))
print({f.path: f.lfs is not None for f in api.list_repo_tree("someone/thing", recursive=True)})
again = hf_hub_download("someone/thing", "sub/big.safetensors")
assert open(again, "rb").read() == open(sys.argv[1] + "/sub/big.safetensors", "rb").read()
api.delete_file("small.txt", "someone/thing")
try:
    hf_hub_download("someone/thing", "small.txt")
except Exception as error:
    print(type(error).__name__)
"""


def _folder(tmp_path):
    folder = tmp_path / "thing"
    (folder / "sub").mkdir(parents=True)
    (folder / "small.txt").write_text("few words")
    (folder / "sub" / "big.safetensors").write_bytes(bytes(range(256)) * 20_000)
    return folder


def test_files_go_up_and_come_down(hub, elsewhere, tmp_path):
    folder = _folder(tmp_path)
    shown = elsewhere(UPLOAD, folder).stdout.splitlines()
    assert shown[0] == "someone write"
    assert shown[1] == str([".gitattributes", "small.txt", "sub/big.safetensors"])
    assert "'sub/big.safetensors': True" in shown[2] and "'small.txt': False" in shown[2]
    assert shown[3] == "RemoteEntryNotFoundError"
    assert hub.files("someone/thing")["sub/big.safetensors"] == (folder / "sub" / "big.safetensors").read_bytes()
    assert [commit.message for commit in hub.commits("someone/thing")][0] == "all of it"
    assert hub.store.find("model", "someone/thing").private


@pytest.mark.parametrize("fault", [{"drop": True}, {"status": 503}, {"status": 429}])
def test_an_upload_outlives_a_failure(hub, elsewhere, tmp_path, fault):
    hub.fail("PUT /lfs/", **fault)
    elsewhere(UPLOAD, _folder(tmp_path))
    assert sum(request.startswith("PUT /lfs/") for request in hub.log) == 2
    assert len(hub.commits("someone/thing")) == 2  # the upload and the deletion


@pytest.mark.parametrize(
    ("token", "status"),
    [(None, 401), ("hf_unknown", 401), ("hf_reader", 403)],
)
def test_who_may_not_write_is_told(elsewhere, token, status):
    script = """
import json
from huggingface_hub import HfApi
try:
    HfApi().create_repo("someone/thing")
except Exception as error:
    print(json.dumps([type(error).__name__, error.response.status_code]))
"""
    assert json.loads(elsewhere(script, token=token).stdout)[1] == status


def test_a_commit_of_a_file_that_was_never_uploaded_is_refused_whole(hub):
    repository = hub.store.create("model", "someone/thing", private=False)
    lines = [
        {"key": "header", "value": {"summary": "half"}},
        {"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "w.safetensors", "oid": "0" * 64, "size": 1}},
    ]
    with pytest.raises(Exception, match="never uploaded"):
        hub.store.commit(repository, "main", "\n".join(map(json.dumps, lines)).encode())
    assert hub.commits("someone/thing") == [] and "a.txt" not in hub.files("someone/thing")
