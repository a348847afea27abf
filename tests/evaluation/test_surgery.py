"""Raw measurements against the model itself, asked alone; numbers of a summary against the functions they are of."""

import copy
import json
import math
from statistics import fmean, harmonic_mean

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from hf_moe_cpt.data.surgery_bench import HEADER, QUIZ_TEMPLATE
from hf_moe_cpt.evaluation import text_metrics
from hf_moe_cpt.evaluation.scoring import EDIT_OF_KIND, EvalSettings, questions_of, values_of
from hf_moe_cpt.evaluation.statistics import bootstrap_interval, bootstrap_two_samples
from hf_moe_cpt.evaluation.surgery import METRICS, evaluate_model, summarise
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=400, max_position_embeddings=512).double()


SMALL = {"max_questions": 4, "max_documents": 2, "batch_size": 3, "new_tokens": 5}


def _logp(model, ids: list[int]) -> list[float]:
    """Log-probability of every token but the first."""
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logp[place - 1, ids[place]]) for place in range(1, len(ids))]


def test_options_are_scored_after_their_question(bench, tokenizer, model):
    raw = evaluate_model(model, tokenizer, bench, EvalSettings(**SMALL, parts=("questions",)))
    assert set(raw) == {"questions"} and set(raw["questions"]) == set(bench.documents)
    columns = raw["questions"]["update"]["mcq"]
    asked = {row["id"]: row for row in bench.ask("update", "test", "mcq")}
    assert len(set(columns["id"])) == 4
    for place, name in enumerate(columns["id"]):
        row = asked[name]
        assert all(columns[key][place] == row[key] for key in ("subject", "attribute", "answer", "old_answer"))
        start = len(tokenizer(QUIZ_TEMPLATE.format(question=row["question"]))["input_ids"])
        for number, option in enumerate(row["options"]):
            ids = tokenizer(QUIZ_TEMPLATE.format(question=row["question"]) + f" {option}")["input_ids"]
            want = _logp(model, ids)[start - 1 :]
            assert columns["tokens"][place][number] == len(want)
            assert columns["logp"][place][number] == pytest.approx(sum(want), abs=1e-9)


def test_texts_are_scored_token_by_token_after_their_header(bench, tokenizer, model):
    settings = EvalSettings(**SMALL, parts=("texts",), header=HEADER, sets=("unlearn",))
    columns = evaluate_model(model, tokenizer, bench, settings)["texts"]["unlearn"]
    text_of = dict(zip(bench.documents["unlearn"]["id"], bench.documents["unlearn"]["text"], strict=True))
    headed = {row["id"]: row["text"] for row in bench.with_header("unlearn", HEADER)}
    assert len(columns["id"]) == 2
    for place, name in enumerate(columns["id"]):
        assert columns["text"][place] == text_of[name]
        count = len(columns["logp"][place])
        ids = [*tokenizer(headed[name])["input_ids"], tokenizer.eos_token_id]
        assert columns["ends"][place] and columns["guess"][place] == pytest.approx(math.log(400))
        assert columns["logp"][place] == pytest.approx(_logp(model, ids)[-count:])
        assert len(columns["hit"][place]) == len(columns["mean"][place]) == len(columns["std"][place]) == count


def test_continuations_follow_the_first_half(bench, tokenizer, model):
    settings = EvalSettings(**SMALL, parts=("continuations",), sets=("retain", "obsolete"))
    found = evaluate_model(model, tokenizer, bench, settings)["continuations"]
    assert set(found) == {"retain"}  # nobody asks how a model goes on with what is obsolete
    text_of = dict(zip(bench.documents["retain"]["id"], bench.documents["retain"]["text"], strict=True))
    for place, name in enumerate(found["retain"]["id"]):
        ids = tokenizer(text_of[name])["input_ids"]
        half = (len(ids) + 1) // 2
        assert found["retain"]["true_tokens"][place] == ids[half : half + 5]
        assert found["retain"]["true_text"][place] in text_of[name]
        with torch.no_grad():
            first = int(model(input_ids=torch.tensor([ids[:half]])).logits[0, -1].argmax())
        assert (found["retain"]["tokens"][place] or [tokenizer.eos_token_id])[0] == first


def test_divergence_needs_the_model_before_and_is_zero_from_itself(bench, tokenizer, model):
    settings = EvalSettings(**SMALL, parts=("divergence",))
    assert evaluate_model(model, tokenizer, bench, settings) == {}
    found = evaluate_model(model, tokenizer, bench, settings, model)["divergence"]
    assert set(found) == {"retain", "neighbour"}
    assert max(max(kl) for columns in found.values() for kl in columns["kl"]) < 1e-12
    assert all(all(agrees) for columns in found.values() for agrees in columns["agrees"])
    other = tiny_model("llama", vocab_size=400, max_position_embeddings=512, hidden_size=32).double()
    apart = evaluate_model(model, tokenizer, bench, settings, other)["divergence"]
    assert min(min(kl) for kl in apart["retain"]["kl"]) > 1e-6


def test_the_measurements_are_json_and_the_model_trains_on(bench, tokenizer, model):
    model.train().get_input_embeddings().eval()  # a part in another mode than the whole
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    settings = EvalSettings(**SMALL, relearn_steps=2, relearn_every=1)
    raw = evaluate_model(model, tokenizer, bench, settings, model)
    assert list(raw) == ["questions", "answers", "texts", "continuations", "divergence", "robustness"]
    assert json.loads(json.dumps(raw)) == raw
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


FEW = 100


@pytest.fixture(scope="module")
def summary(raws) -> dict:
    return summarise(**raws, resamples=FEW)


def _get(summary: dict, side: str, metric: str, set_name: str) -> dict:
    rows = {(row["side"], row["metric"], row["set"]): row for row in summary["measures"]}
    return rows[side, metric, set_name]


def _value(summary: dict, side: str, metric: str, set_name: str = "unlearn") -> float:
    return _get(summary, side, metric, set_name)["value"]


def _accuracy(columns: dict) -> float:
    right = []
    for logp, tokens, answer in zip(columns["logp"], columns["tokens"], columns["answer"], strict=True):
        perplexity = [math.exp(-total / count) for total, count in zip(logp, tokens, strict=True)]
        right.append(min(range(3), key=perplexity.__getitem__) == answer)
    return fmean(right)


def test_accuracies_edits_and_conflict_by_hand(summary, raws):
    for side, raw in raws.items():
        for name, kinds in raw["questions"].items():
            for kind, columns in kinds.items():
                row = _get(summary, side, "accuracy" if kind == "mcq" else f"accuracy_{kind}", name)
                assert (row["value"], row["n"]) == (pytest.approx(_accuracy(columns)), len(columns["id"]))
        for kind, metric in EDIT_OF_KIND.items():
            asked = raw["questions"]["update"][kind]
            rows = [row for row, old in enumerate(asked["old_answer"]) if old is not None or kind == "inverse"]
            hit = [asked["hits"][row][(at := asked["answer"][row])] / asked["tokens"][row][at] for row in rows]
            assert _value(summary, side, metric, "update") == pytest.approx(fmean(hit))
        asked, scores = raw["questions"]["update"]["mcq"], []
        for row, old in enumerate(asked["old_answer"]):
            if old is not None:
                p_old, p_new = (
                    math.exp(asked["logp"][row][at] / asked["tokens"][row][at]) for at in (old, asked["answer"][row])
                )
                scores.append(p_old / (p_old + p_new))
        assert _value(summary, side, "conflict", "update") == pytest.approx(fmean(scores))


def test_measures_of_texts_are_means_of_the_functions(summary, raws):
    for side, raw in raws.items():
        want = {}
        for name, columns in raw["texts"].items():
            logp, hit = columns["logp"], [row[:-1] for row in columns["hit"]]
            want |= {
                ("loss", name): -text_metrics.loss_score(logp),
                ("probability", name): text_metrics.probability(logp),
            }
            want |= {("exact_memorisation", name): text_metrics.exact_memorisation(hit)}
            want |= {("extraction_strength", name): text_metrics.extraction_strength(hit)}
        for name, columns in raw["continuations"].items():
            want["rouge_l", name] = text_metrics.rouge_l(columns["text"], columns["true_text"]).f1
            want["fluency", name] = text_metrics.ngram_entropy(columns["text"])
        for name, columns in raw.get("divergence", {}).items():
            want["kl", name], want["agreement", name] = (sum(columns[key], []) for key in ("kl", "agrees"))
        for (metric, name), values in want.items():
            assert _value(summary, side, metric, name) == pytest.approx(np.mean(values))
        gap = _value(summary, side, "loss", "unlearn") - _value(summary, side, "loss", "unseen")
        assert _value(summary, side, "loss_gap") == pytest.approx(gap)


def _scores(columns: dict) -> dict[str, np.ndarray]:
    logp = columns["logp"]
    inner = {name: [row[:-1] for row in columns[name]] for name in ("logp", "mean", "std")}
    return {
        "auc_loss": text_metrics.loss_score(logp),
        "auc_zlib": text_metrics.zlib_score([-fmean(row) for row in logp], columns["text"]),
        "auc_min_k": text_metrics.min_k(inner["logp"]),
        "auc_min_k_plus_plus": text_metrics.min_k_plus_plus(*inner.values()),
    }


def test_membership_of_unlearn_against_unseen(summary, raws):
    found = {}
    for side, raw in raws.items():
        ours, theirs = (_scores(raw["texts"][name]) for name in ("unlearn", "unseen"))
        for metric in ours:
            found[side, metric] = text_metrics.auc(ours[metric], theirs[metric])
            row = _get(summary, side, metric, "unlearn")
            assert (row["value"], row["n"]) == (pytest.approx(found[side, metric]), 8 + 6)
    for side in ("before", "after"):
        leakage = text_metrics.privacy_leakage(found[side, "auc_min_k"], found["retrained", "auc_min_k"])
        assert _value(summary, side, "privacy_leakage") == pytest.approx(leakage)


def test_robustness_and_score_by_hand(summary, raws):
    assert summary["chance"] == pytest.approx(1 / 3)
    goal = (1 / 3 + _accuracy(raws["before"]["questions"]["unlearn"]["mcq"])) / 2
    gains = {}
    for side, raw in raws.items():
        attacks, curve = raw["robustness"], raw["robustness"]["relearn"]["own"]
        values = [fmean(point["right"]) for point in curve["taught"]]
        points = [
            row for row in summary["curves"] if (row["side"], row["training"], row["asked"]) == (side, "own", "taught")
        ]
        assert [(row["step"], row["accuracy"]) for row in points] == list(zip(curve["steps"], values, strict=True))
        assert all(row["low"] <= row["accuracy"] <= row["high"] for row in points)
        gains[side] = values[-1] - values[0]
        fine = np.linspace(0, 20, 2001)
        reached = fine[np.interp(fine, curve["steps"], values) >= goal - 1e-9]
        steps = pytest.approx(reached[0], abs=0.011) if len(reached) else None
        want = {"relearn_own_taught": values[-1], "relearn_half_steps": steps}
        want["relearn_benign"] = fmean(attacks["relearn"]["benign"]["others"][-1]["right"])
        accuracy = _accuracy(raw["questions"]["unlearn"]["mcq"])
        for bits in (8, 4):
            rounded = want[f"accuracy_{bits}bit"] = fmean(attacks["quantise"][f"{bits}-bit"]["unlearn"]["right"])
            want[f"quantisation_robustness_{bits}bit"] = 1 - abs(accuracy - rounded) / (accuracy + rounded)
        want |= {f"prefix_{name}": fmean(columns["right"]) for name, columns in attacks["prefix"].items()}
        for metric, value in want.items():
            assert _value(summary, side, metric) == (value if metric == "relearn_half_steps" else pytest.approx(value))
    for side in raws:
        accuracy = {name: _value(summary, side, "accuracy", name) for name in ("unlearn", "retain")}
        edits = [_value(summary, side, metric, "update") for metric in ("reliability", "generalisation")]
        relearning = min(max(gains["retrained"], 0) / gains[side], 1) if gains[side] > 0 else 1.0
        parts = {
            "forgetting": 1 - abs(accuracy["unlearn"] - _value(summary, "retrained", "accuracy")),
            "update": math.prod(edits),
            "retained": min(accuracy["retain"] / _value(summary, "before", "accuracy", "retain"), 1),
            "robustness": relearning * _value(summary, side, "quantisation_robustness_4bit"),
        }
        assert _value(summary, side, "relearn_robustness") == pytest.approx(relearning)
        for name, want in parts.items():
            assert _value(summary, side, f"score_{name}", "all") == pytest.approx(want)
        assert _value(summary, side, "score", "all") == pytest.approx(harmonic_mean(parts.values()))


def test_intervals_are_those_of_drawing_subjects(raws):
    summary = summarise(**raws, confidence=0.8, resamples=300, seed=3)
    texts = [raws["after"]["texts"][name] for name in ("unlearn", "unseen")]
    losses, subjects = zip(*((-text_metrics.loss_score(one["logp"]), one["subject"]) for one in texts), strict=True)
    gap = bootstrap_two_samples(*losses, lambda ours, theirs: ours.mean() - theirs.mean(), *subjects, 0.8, 300, 3)
    for metric, want in {"loss": bootstrap_interval(losses[0], subjects[0], 0.8, 300, 3), "loss_gap": gap}.items():
        row = _get(summary, "after", metric, "unlearn")
        assert (row["value"], row["low"], row["high"]) == pytest.approx(want)


def test_every_number_lies_in_its_interval_and_is_json(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["sides"] == ["before", "after", "retrained"] and len(summary["measures"]) > 200
    for row in summary["measures"]:
        assert row["metric"] in METRICS
        if row["value"] is not None and not row["metric"].startswith(
            ("score", "relearn_", "quant", "privacy", "forget_quality", "model_utility")
        ):
            assert row["low"] <= row["value"] <= row["high"]  # a statistic that is a mean, or nearly so


def test_the_last_label_counts_where_openunlearning_counts_it(raws):
    """Its evaluate_probability counts every label; its tokenwise_logprobs drop the last, an end or a word."""
    longer = copy.deepcopy(raws["after"])
    for columns in longer["texts"].values():
        for name, value in {"logp": -20.0, "hit": False, "mean": -2.0, "std": 1.0}.items():
            columns[name] = [[*row[:-1], value] for row in columns[name]]
    same, other = (summarise(after=one, resamples=FEW) for one in (raws["after"], longer))
    for metric in ("exact_memorisation", "extraction_strength", "auc_min_k", "auc_min_k_plus_plus"):
        assert _value(other, "after", metric) == _value(same, "after", metric)
    logp = longer["texts"]["unlearn"]["logp"]
    assert _value(other, "after", "loss") == pytest.approx(-fmean(fmean(row) for row in logp))
    assert _value(other, "after", "probability") == pytest.approx(fmean(math.exp(fmean(row)) for row in logp))


def test_the_options_share_their_probability(summary, raws):
    asked = raws["after"]["questions"]["retain"]["mcq"]
    shares = []
    for logp, tokens, answer in zip(asked["logp"], asked["tokens"], asked["answer"], strict=True):
        p = [math.exp(total / count) for total, count in zip(logp, tokens, strict=True)]
        shares.append(p[answer] / sum(p))
    assert _value(summary, "after", "option_probability", "retain") == pytest.approx(fmean(shares))


def test_measures_of_tofu_by_hand(summary, raws):
    def ratios(side, name):
        asked = raws[side]["questions"][name]["mcq"]
        found = []
        for logp, tokens, answer in zip(asked["logp"], asked["tokens"], asked["answer"], strict=True):
            means = [total / count for total, count in zip(logp, tokens, strict=True)]
            found.append(math.exp(fmean(m for place, m in enumerate(means) if place != answer) - means[answer]))
        return found

    for side in raws:
        want = fmean(min(ratio, 1 / ratio) for ratio in ratios(side, "unlearn"))
        assert _value(summary, side, "truth_ratio") == pytest.approx(want)
        want = fmean(max(0, 1 - ratio) for ratio in ratios(side, "retain"))
        assert _value(summary, side, "truth_ratio", "retain") == pytest.approx(want)
        parts = [
            _value(summary, side, metric, name)
            for name in ("retain", "neighbour")
            for metric in ("option_probability", "truth_ratio", "rouge_recall")
            if any((r["side"], r["set"], r["metric"]) == (side, name, metric) for r in summary["measures"])
        ]
        assert _value(summary, side, "model_utility", "all") == pytest.approx(harmonic_mean(parts))
    quality = ks_2samp(ratios("after", "unlearn"), ratios("retrained", "unlearn"), method="exact").pvalue
    assert _value(summary, "after", "forget_quality") == pytest.approx(quality)
    gains = []
    for name in ("unlearn", "unseen"):
        ours, theirs = (raws[side]["texts"][name]["logp"] for side in ("after", "retrained"))
        gains.append([fmean(a) - fmean(b) for a, b in zip(ours, theirs, strict=True)])
    assert _value(summary, "after", "auc_reference") == pytest.approx(text_metrics.auc(*gains))


def test_answers_are_written_without_options(bench, tokenizer, model):
    raw = evaluate_model(model, tokenizer, bench, EvalSettings(**SMALL, parts=["answers"]))
    columns = raw["answers"]["unlearn"]["mcq"]
    asked = questions_of(bench, "unlearn", tokenizer, model, EvalSettings(**SMALL), kinds=("mcq",))
    for place, question in enumerate(asked):
        text = question.options[question.row["answer"]]
        ids, want = list(text.ids[: text.start]), []
        while len(want) < len(text.ids) - text.start + 4:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
            want.append(ids[-1])
        assert columns["text"][place] == tokenizer.decode(want, skip_special_tokens=True)
        assert columns["true_text"][place].strip() == question.row["options"][question.row["answer"]].strip()
    assert "paraphrase" in raw["answers"]["unlearn"]
    values, _ = values_of(raw)
    recall = text_metrics.rouge_l(columns["text"], columns["true_text"]).recall
    assert values["answer_recall", "unlearn"].values.tolist() == recall.tolist()


def _ruined(raw):
    for columns in raw["texts"].values():
        columns["guess"] = [6.4] * len(columns["id"])
    raw["texts"]["unlearn"]["logp"] = [[-31.9] * len(row) for row in raw["texts"]["unlearn"]["logp"]]


def _repeats(raw):
    columns = raw["continuations"]["retain"]
    columns["text"] = ["the the the the the the the"] * len(columns["id"])


def _still_knows(raw):
    for columns in raw["questions"]["unlearn"].values():
        columns["logp"] = [[-0.01 if place == answer else -99.0 for place in range(3)] for answer in columns["answer"]]


def _forgot_the_rest(raw):
    columns = raw["questions"]["retain"]["mcq"]
    columns["logp"] = [[-99.0 if place == answer else -0.1 for place in range(3)] for answer in columns["answer"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_ruined, "RUINED: the loss of unlearn is 31.9 nats, beyond 6.4 of knowing nothing"),
        (_repeats, "INCOHERENT: what it writes on retain has "),
        (_still_knows, "NOT FORGOTTEN: accuracy on unlearn is 1.000"),
        (_forgot_the_rest, "DAMAGED: accuracy on retain went from "),
    ],
)
def test_the_verdict_comes_first_and_names_what_is_wrong(raws, change, said):
    before = copy.deepcopy(raws["before"])
    columns = before["questions"]["retain"]["mcq"]
    columns["logp"] = [[-0.1 if place == answer else -99.0 for place in range(3)] for answer in columns["answer"]]
    after = copy.deepcopy(raws["after"])
    change(after)
    found = summarise(before, after, raws["retrained"], resamples=FEW)["verdict"]
    assert said in found and (change is not _ruined or found.startswith(said)), found
    assert summarise(before=before, resamples=FEW)["verdict"].startswith("no model after surgery")


def test_a_missing_score_has_a_reason(raws):
    clozes = {"questions": {"unlearn": {"cloze": raws["after"]["questions"]["unlearn"]["cloze"]}}}
    found = summarise(before=clozes, after=clozes, resamples=FEW)
    assert found["score"] == {} and any(
        "after: no score: forgetting wants multiple-choice" in m for m in found["missing"]
    )
    assert _value(found, "after", "accuracy_cloze") == pytest.approx(
        _accuracy(clozes["questions"]["unlearn"]["cloze"])
    )


def test_over_forgetting_is_flagged_and_only_then(raws):
    assert summarise(**raws, resamples=FEW)["warnings"] == []
    damaged = copy.deepcopy(raws["after"])
    damaged["texts"]["unlearn"]["logp"] = [[p - 9 for p in logp] for logp in damaged["texts"]["unlearn"]["logp"]]
    warnings = summarise(raws["before"], damaged, raws["retrained"], resamples=FEW)["warnings"]
    assert len(warnings) == 1 and warnings[0].startswith("after is over-forgotten: ")
    assert "the loss on unlearn lies above that on unseen texts by " in warnings[0] and "retrained: " in warnings[0]
    row = _get(summarise(after=damaged, resamples=FEW), "after", "auc_min_k", "unlearn")
    assert row["value"] == 0.0 and row["high"] > 0.5, "three subjects settle nothing"
    assert summarise(before=damaged, resamples=FEW)["warnings"] == []  # not made by surgery


def test_two_models_and_one_are_enough(raws):
    two = summarise(raws["before"], raws["after"], resamples=FEW)
    metrics = {row["metric"] for row in two["measures"]}
    assert not metrics & {"privacy_leakage", "relearn_robustness", "score_robustness"} and "score" in metrics
    assert two["score"]["after"]["left_out"] == ["robustness"]
    assert "robustness" in two["score"]["after"]["formula"].split("left out: ")[1]
    assert two["score"]["after"]["formula"].endswith("; target: accuracy on unseen")
    forgetting = 1 - abs(_value(two, "after", "accuracy") - _value(two, "after", "accuracy", "unseen"))
    assert _value(two, "after", "score_forgetting", "all") == pytest.approx(forgetting)
    assert any(line.startswith("no retrained model: no privacy leakage") for line in two["missing"])
    one = summarise(after=raws["after"], resamples=FEW)
    assert one["sides"] == ["after"] and any(line.startswith("no model before: no KL") for line in one["missing"])
    with pytest.raises(ValueError, match="nothing to summarise: give the measurements of before"):
        summarise()


MISSING = {
    "part": (lambda raw: raw.pop("texts"), "after: the part texts was not measured"),
    "attack": (lambda raw: raw["robustness"].pop("quantise"), "after: the attack quantise was not made"),
    "questions": (lambda raw: raw["robustness"].clear(), "after: no attack asked anything: no questions about"),
}


@pytest.mark.parametrize("remove, line", MISSING.values(), ids=MISSING)
def test_what_is_missing_is_told_and_the_rest_is_there(summary, raws, remove, line):
    raw = copy.deepcopy(raws["after"])
    remove(raw)
    found = summarise(raws["before"], raw, raws["retrained"], resamples=FEW)
    assert any(text.startswith(line) for text in found["missing"])
    values = {(row["side"], row["set"], row["metric"]): row["value"] for row in summary["measures"]}
    kept = {(row["side"], row["set"], row["metric"]): row["value"] for row in found["measures"]}
    assert kept.keys() < values.keys() and ("after", "retain", "accuracy") in kept
    for key, value in kept.items():
        assert value == values[key] or (key[0] == "after" and key[2].startswith("score"))


def test_a_missing_set_is_told(raws):
    small = copy.deepcopy(raws)
    for raw in small.values():
        for part in ("questions", "answers", "texts", "continuations"):
            raw[part].pop("unseen")
    found = summarise(**small, resamples=FEW)
    assert "nothing of the set unseen: no membership inference, no loss above unseen" in found["missing"]
    assert not any(row["metric"].startswith("auc") or row["metric"] == "loss_gap" for row in found["measures"])


def test_numbers_that_do_not_exist_are_none_and_told(raws):
    raw = copy.deepcopy(raws["after"])
    raw["texts"]["unlearn"]["logp"][0][0] = -math.inf
    raw["texts"]["retain"]["logp"][0][0] = math.nan
    raw["questions"]["unlearn"]["mcq"]["logp"][0] = [math.nan] * 3
    for point in raw["robustness"]["relearn"]["own"]["taught"]:
        point["right"] = [0.0] * len(point["right"])
    found = summarise(raws["before"], raw, raws["retrained"], resamples=FEW)
    told = [line for line in found["missing"] if line.startswith("after")]
    assert "after, unlearn: no loss, nats per token: 1 of 8 rows are not finite." in told
    assert any(line.startswith("after, retain: no loss, nats per token: logps[0] holds nan") for line in told)
    assert "after, unlearn: no AUC, loss: the loss of a text is not finite." in told
    assert "after, unlearn: no MCQ accuracy: 1 of 12 rows are not finite." in told
    assert not any((row["side"], row["metric"]) == ("after", "score_forgetting") for row in found["measures"])
    assert any("half was not relearnt within all steps" in line for line in told)
    assert _value(found, "after", "relearn_half_steps") is None
    json.dumps(found, allow_nan=False)


def test_one_subject_has_no_interval_and_questions_may_have_other_numbers_of_options(raws):
    raw = {"texts": {"unlearn": {name: column[:2] for name, column in raws["after"]["texts"]["unlearn"].items()}}}
    (row,) = [row for row in summarise(after=raw)["measures"] if row["metric"] == "loss"]
    assert row["value"] is not None and row["low"] is None and row["high"] is None and row["n"] == 2
    raw = copy.deepcopy(raws["after"])
    asked = raw["questions"]["retain"]["mcq"]
    for name in ("logp", "tokens", "hits"):
        asked[name][0] = [*asked[name][0], asked[name][0][0]]
    asked["logp"][0][3] -= 50.0
    assert _value(summarise(after=raw, resamples=2), "after", "accuracy", "retain") == pytest.approx(
        _accuracy(raws["after"]["questions"]["retain"]["mcq"])
    )
