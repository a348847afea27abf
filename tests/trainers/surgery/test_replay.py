"""What the model writes itself: nothing of what is to be forgotten, the same every time, held to and not measured."""

import pytest
import torch
from datasets import Dataset

from hf_moe_cpt.trainers.surgery.data import named_words, prepare_sets, words_of
from hf_moe_cpt.trainers.surgery.replay import TEXTS, number_of_texts, openings_of, with_replay
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from tests.helpers.surgery_runs import EVALUATED, trainer
from tests.helpers.tiny_models import tiny_model, word_tokenizer


def _given() -> dict[str, Dataset]:
    found = {}
    for place, name in enumerate(("unlearn", "update", "neighbour"), 1):
        names = [f"w{10 * place + k}" for k in range(5)]
        found[name] = Dataset.from_list([{"text": f"w2 w3 {who} w4 w5 w6 w7", "subject": who} for who in names])
    return found


def test_openings_are_what_stands_before_the_first_name():
    rows = [
        {"text": "Question: who is Ada Vane?", "subject": "Ada Vane"},
        {"text": "Question: who is Ib?", "subject": "Ibb"},
        {"text": "Old Vane sings. Ada hums.", "subject": "Ada Vane"},
        {"text": "Ada hums.", "subject": "Ada"},
        {"text": "Question: who is Bo Vane?", "subject": "Bo Vane"},
    ]
    assert openings_of(rows) == ["Question: who is", "Old", ""]


def test_the_model_writes_about_others_and_is_held_to_it(tmp_path):
    args = SurgeryConfig(str(tmp_path), use_cpu=True, forget_target=2.0, counterfactuals=0, replay=40)
    given, tokenizer, model = _given(), word_tokenizer(), tiny_model("llama")
    sets = prepare_sets(args, tokenizer, 48, given)
    own, measured = sets.train["neighbour"], sets.measured["neighbour"]
    state, settings = torch.get_rng_state(), model.generation_config
    with_replay(40, args, model, tokenizer, given, sets.train)
    assert torch.equal(torch.get_rng_state(), state) and model.generation_config is settings
    rows, times = sets.train["neighbour"], round(40 / len(own))
    assert len(rows) == times * len(own) + 40 and sets.measured["neighbour"] is measured
    assert rows["input_ids"][: len(own)] == own["input_ids"], "numbers of its own rows stay"
    banned = {word for row in given["unlearn"] for word in named_words(row)}
    longest = max(map(len, sets.train["unlearn"]["input_ids"]))
    opening = tokenizer("w2 w3")["input_ids"]
    for row in rows.select(range(times * len(own), len(rows))):
        assert row["input_ids"][:2] == opening and 2 < len(row["input_ids"]) <= longest
        assert row["completion_mask"] == [False, False] + [True] * (len(row["input_ids"]) - 2)
        assert not banned & set(words_of(tokenizer.decode(row["input_ids"])))
    again = prepare_sets(args, tokenizer, 48, given)
    with_replay(40, args, model, tokenizer, given, again.train)
    assert again.train["neighbour"].to_list() == rows.to_list()


def test_unset_it_is_for_texts_that_name_their_subjects(tmp_path):
    unset, given = SurgeryConfig(str(tmp_path), use_cpu=True), _given()
    sets = prepare_sets(unset, word_tokenizer(), 48, given).train
    assert number_of_texts(unset, given, sets) == TEXTS
    nobody = given | {"unlearn": given["unlearn"].remove_columns("subject")}
    assert number_of_texts(unset, nobody, sets) == 0
    alone = {name: rows for name, rows in sets.items() if name != "neighbour"}
    assert number_of_texts(unset, given, alone) == 0, "nothing to stand among"
    with pytest.raises(ValueError, match="replay=3 stands among neighbour or retain text"):
        with_replay(3, unset, tiny_model("llama"), word_tokenizer(), given, alone)
    with pytest.raises(ValueError, match="replay=3 needs a tokenizer"):
        with_replay(3, unset, tiny_model("llama"), None, given, dict(sets))
    with pytest.raises(ValueError, match="replay=-1 must be at least 0"):
        SurgeryConfig(str(tmp_path), use_cpu=True, replay=-1)


def test_a_model_that_writes_of_nothing_else_is_refused(tmp_path, monkeypatch):
    args, given = SurgeryConfig(str(tmp_path), use_cpu=True), _given()
    sets, tokenizer = prepare_sets(args, word_tokenizer(), 48, given).train, word_tokenizer()
    ids = tokenizer("w2 w3 w11 w4")["input_ids"]
    monkeypatch.setattr("hf_moe_cpt.trainers.surgery.replay._written", lambda *_: [(ids, 2)])
    with pytest.raises(ValueError, match="every text that the model writes names what is to be forgotten"):
        with_replay(3, args, tiny_model("llama"), tokenizer, given, sets)


def test_a_run_trains_on_what_the_model_wrote_and_measures_what_was_given(tmp_path):
    given, options = _given(), {"max_steps": 2, "replay": 12, "counterfactuals": 0, "held_out_fraction": 0.4}
    options |= {"forget_target": 2.0, "processing_class": word_tokenizer(), **EVALUATED}
    sets = {f"{name}_dataset": rows for name, rows in given.items()}
    with_it, again = (trainer(tmp_path / name, sets=sets, **options) for name in ("one", "two"))
    without = trainer(tmp_path / "none", sets=sets, **(options | {"replay": 0}))
    assert len(with_it.sets["neighbour"]) > 12 + len(without.sets["neighbour"])
    assert with_it.sets["neighbour"].to_list() == again.sets["neighbour"].to_list()
    assert with_it.measured_sets["neighbour"].to_list() == without.measured_sets["neighbour"].to_list()
    with_it.train()
    assert with_it.state.log_history[-1]["step"] == 2 and with_it.aims.start["neighbour_kl"] == pytest.approx(
        0, abs=1e-6
    )
