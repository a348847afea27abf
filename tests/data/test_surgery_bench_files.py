"""What is saved comes back equal, loads with `datasets` alone through its card, and damage is named."""

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml

from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.data.surgery_bench_schema import DOCUMENT_FEATURES, QUESTION_FEATURES, as_dataset
from hf_moe_cpt.data.surgery_bench_world import SETS


@pytest.fixture(scope="module")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(seed=4, num_subjects=30, kinds=("person", "rule"), forms=("article", "quiz"))


@pytest.fixture(scope="module")
def saved(bench: SurgeryBench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.save(tmp_path_factory.mktemp("bench") / "folder")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for path in saved.rglob("*"):
        if path.is_file():
            target = tmp_path / "copy" / path.relative_to(saved)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy"


def assert_same(first: datasets.DatasetDict, second: datasets.DatasetDict) -> None:
    assert list(first) == list(second)
    for name in first:
        assert first[name].features == second[name].features and list(first[name]) == list(second[name])


def test_load_returns_what_was_saved(bench, saved):
    loaded = SurgeryBench.load(saved)
    assert_same(loaded.documents, bench.documents)
    assert_same(loaded.questions, bench.questions)
    assert loaded.version == bench.version and loaded.settings == bench.settings
    assert loaded.before_corpus()["id"] == bench.before_corpus()["id"]


def test_settings_in_the_folder_make_the_same_rows_again(bench, saved):
    settings = json.loads((saved / "bench.json").read_text())["settings"]
    assert_same(SurgeryBench.generate(**settings).documents, bench.documents)


def test_datasets_loads_the_folder_through_its_card(bench, saved, tmp_path):
    documents = datasets.load_dataset(str(saved), "documents", cache_dir=str(tmp_path))
    questions = datasets.load_dataset(str(saved), "questions", cache_dir=str(tmp_path))
    assert_same(documents, bench.documents)
    assert_same(questions, bench.questions)
    assert datasets.get_dataset_config_names(str(saved)) == ["documents", "questions"]


def test_a_set_without_rows_is_left_out_of_the_card_and_comes_back_empty(tmp_path):
    bench = SurgeryBench.generate(num_subjects={"unlearn": 3}, kinds=("person",), forms=("quiz",))
    folder = bench.save(tmp_path / "small")
    assert_same(SurgeryBench.load(folder).documents, bench.documents)
    loaded = datasets.load_dataset(str(folder), "documents", cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["unlearn", "retain"]


def test_the_parts_are_ordinary_dataset_dicts(bench, tmp_path):
    bench.documents.save_to_disk(str(tmp_path / "documents"))
    assert_same(datasets.load_from_disk(str(tmp_path / "documents")), bench.documents)
    bench.questions["test"].to_json(str(tmp_path / "test.jsonl"))
    again = datasets.Dataset.from_json(
        str(tmp_path / "test.jsonl"), features=QUESTION_FEATURES, cache_dir=str(tmp_path)
    )
    assert list(again) == list(bench.questions["test"])


def front_matter(folder: Path) -> dict:
    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(text)


def test_the_card_has_what_the_hub_reads(saved):
    card = front_matter(saved)
    assert card["license"] == "apache-2.0" and card["language"] == ["en"] and card["size_categories"] == ["1K<n<10K"]
    assert {"machine-unlearning", "knowledge-editing", "synthetic"} <= set(card["tags"])
    assert set(card["task_categories"]) == {"text-generation", "multiple-choice"}
    documents, questions = card["configs"]
    assert documents["default"] is True and [file["split"] for file in documents["data_files"]] == list(SETS)
    assert [file["split"] for file in questions["data_files"]] == ["validation", "test"]
    for file in (*documents["data_files"], *questions["data_files"]):
        assert (saved / file["path"]).is_file()


def test_the_card_tells_people_what_they_need(bench, saved):
    text = (saved / "README.md").read_text()
    for heading in ("Construction", "Fields", "Intended use", "Limits", "How to load"):
        assert f"\n## {heading}\n" in text
    for column in (*DOCUMENT_FEATURES, *QUESTION_FEATURES):
        assert f"`{column}`" in text
    assert (
        f"| unlearn | to be forgotten; subjects of its own | {len(bench.documents['unlearn'])} | 6 | 96, 96, 96, "
        in text
    )
    assert f"Version {bench.version}" in text and '"seed": 4' in text
    assert bench.documents["unlearn"][0]["text"].split("\n")[0] in text


def test_size_and_license_follow_the_data(bench, tmp_path):
    folder = bench.save(tmp_path / "named", license="cc0-1.0")
    assert front_matter(folder)["license"] == "cc0-1.0"


def test_a_folder_with_something_in_it_is_not_overwritten(bench, saved, tmp_path):
    with pytest.raises(ValueError, match="exists and is not an empty folder: name a new one"):
        bench.save(saved)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file exists and is not an empty folder"):
        bench.save(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert SurgeryBench.load(bench.save(tmp_path / "empty")).settings.seed == 4


def test_nothing_is_not_saved(tmp_path):
    empty = datasets.DatasetDict({name: as_dataset([], DOCUMENT_FEATURES) for name in SETS})
    none = datasets.DatasetDict({name: as_dataset([], QUESTION_FEATURES) for name in ("validation", "test")})
    with pytest.raises(ValueError, match="holds no documents: there is nothing to save"):
        SurgeryBench(empty, none).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folders_that_are_no_bench_are_refused(tmp_path, copy):
    with pytest.raises(ValueError, match=r"bench\.json cannot be read: name a folder that SurgeryBench\.save wrote"):
        SurgeryBench.load(tmp_path)
    (copy / "bench.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="does not describe a SurgeryBench"):
        SurgeryBench.load(copy)
    (copy / "bench.json").write_text('{"format"')
    with pytest.raises(ValueError, match=r"bench\.json is damaged"):
        SurgeryBench.load(copy)


def test_damaged_parts_are_named(copy):
    path = copy / "documents" / "update.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"update\.parquet cannot be read \(.*write the folder again"):
        SurgeryBench.load(copy)
    table = pq.read_table(copy / "documents" / "unlearn.parquet")
    pq.write_table(table.slice(1), path)
    with pytest.raises(ValueError, match=r"update\.parquet has 11 rows, bench\.json says 12"):
        SurgeryBench.load(copy)
    pq.write_table(table.drop_columns(["text"]), path)
    with pytest.raises(ValueError, match=r"update\.parquet has the columns .*: a bench has \['id', 'subject'"):
        SurgeryBench.load(copy)
    path.unlink()
    with pytest.raises(ValueError, match=r"update\.parquet cannot be read"):
        SurgeryBench.load(copy)
