"""The output folder of a surgery evaluation: whose it is, what is finished in it, and a model's files."""

import pytest

from hf_moe_cpt.evaluation.resumable import SurgeryEvalFolder, checksum_of_files


def test_a_part_is_found_again_and_only_then(tmp_path):
    folder = SurgeryEvalFolder(tmp_path / "run", {"sets": ("unlearn",), "seed": 0})
    folder.check()
    folder.claim()
    assert folder.read("before", "texts") is None
    folder.write("before", "texts", {"unlearn": {"logp": [[-1.5]]}})
    again = SurgeryEvalFolder(tmp_path / "run", {"sets": ["unlearn"], "seed": 0})
    again.check()
    assert again.read("before", "texts") == {"unlearn": {"logp": [[-1.5]]}} and again.read("after", "texts") is None


def test_folders_of_others_and_of_other_settings_are_refused(tmp_path):
    folder = SurgeryEvalFolder(tmp_path / "run", {"seed": 0})
    folder.claim()
    with pytest.raises(ValueError, match="was made with seed=0, and now it is 1: name another folder"):
        SurgeryEvalFolder(tmp_path / "run", {"seed": 1}).check()
    with pytest.raises(ValueError, match="is not empty and this tool did not write it"):
        SurgeryEvalFolder(tmp_path, {"seed": 0}).check()


def test_other_weights_in_a_models_folder_are_noticed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = checksum_of_files(str(tmp_path))
    assert first == checksum_of_files(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert first != checksum_of_files(str(tmp_path))
    assert checksum_of_files("someone/a-model-on-the-hub") is None
