"""An output folder: whose it is, what is finished in it, files that appear whole, and a model's files."""

import pytest

from hf_moe_cpt.evaluation.resumable import ResumableFolder, checksum_of_files, read_shard


def _folder(root, **settings):
    return ResumableFolder(root, "settings.json", settings)


def test_what_is_finished_is_found_again_and_only_then(tmp_path):
    folder = _folder(tmp_path / "run", sets=("unlearn",), seed=0)
    folder.claim()
    assert folder.read("work/before/texts.json") is None
    folder.write("work/before/texts.json", {"unlearn": {"logp": [[-1.5]]}})
    again = _folder(tmp_path / "run", sets=["unlearn"], seed=0)
    again.claim()
    assert again.read("work/before/texts.json") == {"unlearn": {"logp": [[-1.5]]}}
    assert again.read("work/after/texts.json") is None


def test_missing_rows_are_made_and_finished_ones_are_not(tmp_path):
    folder, made = _folder(tmp_path), []

    def load():
        return lambda place, progress: made.append(place) or [{"place": place}]

    folder.make_rows("stage", {"a.jsonl": 1, "b.jsonl": 1}, load, "row")
    (tmp_path / "a.jsonl").unlink()
    folder.make_rows("stage", {"a.jsonl": 1, "b.jsonl": 1, "c.jsonl": 1}, load, "row")
    assert made == [0, 1, 0, 2] and read_shard(tmp_path / "c.jsonl") == [{"place": 2}]
    for text in ('{"place": 3}\n', (tmp_path / "c.jsonl").read_text().replace("2", "3"), "", "[1]\n"):
        (tmp_path / "c.jsonl").write_text(text)
        with pytest.raises(ValueError, match="c.jsonl cannot be used .*: remove it, and it is made again"):
            read_shard(tmp_path / "c.jsonl")
    folder.make_rows("stage", {"a.jsonl": 1, "b.jsonl": 1}, lambda: pytest.fail("weights were read"), "row")


def test_folders_of_others_and_of_other_settings_are_refused(tmp_path):
    _folder(tmp_path / "run", seed=0, scale={"steps": 4}).claim()
    with pytest.raises(ValueError, match="was made with seed=0, and now it is 1: name another folder"):
        _folder(tmp_path / "run", seed=1, scale={"steps": 4}).check()
    with pytest.raises(ValueError, match="was made with steps=4, and now it is 5: name another folder"):
        _folder(tmp_path / "run", seed=0, scale={"steps": 5}).check()
    with pytest.raises(ValueError, match="is not empty and this tool did not write it"):
        _folder(tmp_path, seed=0).check()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".settings.json.1234").write_text("{")  # while it wrote its settings
    _folder(tmp_path / "killed", seed=0).check()


def test_other_weights_in_a_models_folder_are_noticed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = checksum_of_files(str(tmp_path))
    assert first == checksum_of_files(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert first != checksum_of_files(str(tmp_path))
    assert checksum_of_files("someone/a-model-on-the-hub") is None
