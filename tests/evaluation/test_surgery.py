"""Raw measurements against the model itself, asked alone; numbers of a summary against loops over raw measurements."""

import copy
import json
import math
import random
import zlib
from statistics import fmean

import pytest
import torch

from hf_moe_cpt.data.surgery_bench import HEADER, QUIZ_TEMPLATE
from hf_moe_cpt.evaluation.scoring import EvalSettings
from hf_moe_cpt.evaluation.surgery import LABEL_WIDTH, METRICS, evaluate_model, summarise
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
        assert columns["logp"][place] == pytest.approx(_logp(model, tokenizer(headed[name])["input_ids"])[-count:])
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
    model.train()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    settings = EvalSettings(**SMALL, relearn_steps=2, relearn_every=1)
    raw = evaluate_model(model, tokenizer, bench, settings, model)
    assert list(raw) == ["questions", "texts", "continuations", "divergence", "robustness"]
    assert json.loads(json.dumps(raw)) == raw
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


FEW = 200


@pytest.fixture(scope="module")
def summary(raws) -> dict:
    return summarise(**raws, resamples=FEW)


def _get(summary: dict, side: str, metric: str, set_name: str) -> dict:
    (row,) = [
        row for row in summary["measures"] if (row["side"], row["metric"], row["set"]) == (side, metric, set_name)
    ]
    return row


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
                metric = "accuracy" if kind == "mcq" else f"accuracy_{kind}"
                assert _value(summary, side, metric, name) == pytest.approx(_accuracy(columns))
                assert _get(summary, side, metric, name)["n"] == len(columns["id"])
        names = {
            "mcq": "reliability",
            "paraphrase": "generalisation",
            "one_hop": "portability_one_hop",
            "inverse": "portability_inverse",
        }
        for kind, metric in names.items():
            asked = raw["questions"]["update"][kind]
            rows = [row for row, old in enumerate(asked["old_answer"]) if old is not None or kind == "inverse"]
            hit = [
                asked["hits"][row][asked["answer"][row]] / asked["tokens"][row][asked["answer"][row]] for row in rows
            ]
            assert _value(summary, side, metric, "update") == pytest.approx(fmean(hit))
        asked = raw["questions"]["update"]["mcq"]
        scores = []
        for row, old in enumerate(asked["old_answer"]):
            if old is not None:
                p_old, p_new = (
                    math.exp(asked["logp"][row][at] / asked["tokens"][row][at]) for at in (old, asked["answer"][row])
                )
                scores.append(p_old / (p_old + p_new))
        assert _value(summary, side, "conflict", "update") == pytest.approx(fmean(scores))


def test_measures_of_texts_by_hand(summary, raws):
    for side, raw in raws.items():
        for name, columns in raw["texts"].items():
            means = [fmean(logp) for logp in columns["logp"]]
            assert _value(summary, side, "loss", name) == pytest.approx(-fmean(means))
            assert _value(summary, side, "probability", name) == pytest.approx(fmean(map(math.exp, means)))
            assert _value(summary, side, "exact_memorisation", name) == pytest.approx(
                fmean(map(fmean, columns["hit"]))
            )
            strengths = []
            for hit in columns["hit"]:
                shortest = next(k for k in range(len(hit) + 1) if all(hit[k:]))
                strengths.append(1 - shortest / len(hit))
            assert _value(summary, side, "extraction_strength", name) == pytest.approx(fmean(strengths))
        gap = _value(summary, side, "loss", "unlearn") - _value(summary, side, "loss", "unseen")
        assert _value(summary, side, "loss_gap") == pytest.approx(gap)
    for side in ("after", "retrained"):
        for name, columns in raws[side]["divergence"].items():
            for metric, column in (("kl", columns["kl"]), ("agreement", columns["agrees"])):
                assert _value(summary, side, metric, name) == pytest.approx(fmean(x for row in column for x in row))


def _lcs(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + _lcs(first[1:], second[1:])
    return max(_lcs(first[1:], second), _lcs(first, second[1:]))


def test_continuations_by_hand(summary, raws):
    columns = raws["after"]["continuations"]["retain"]
    found = []
    for text, true in zip(columns["text"], columns["true_text"], strict=True):
        ours, theirs = text.lower().split(), true.lower().split()
        found.append(2 * _lcs(ours, theirs) / (len(ours) + len(theirs)))
    assert _value(summary, "after", "rouge_l", "retain") == pytest.approx(fmean(found))
    bits = []
    for text in columns["text"]:
        words, terms = text.split(), []
        for n, weight in ((2, 2 / 3), (3, 4 / 3)):
            grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
            shares = [grams.count(gram) / len(grams) for gram in set(grams)]
            terms.append(weight * -sum(share * math.log2(share) for share in shares))
        bits.append(fmean(terms))
    assert _value(summary, "after", "fluency", "retain") == pytest.approx(fmean(bits))


def _auc(members: list[float], others: list[float]) -> float:
    return fmean((a > b) + (a == b) / 2 for a in members for b in others)


def _scores(columns: dict) -> dict[str, list[float]]:
    def lowest(values: list[float]) -> float:
        return fmean(sorted(values)[: max(1, int(0.4 * len(values) + 1e-9))])

    normal = [
        [(p - m) / s for p, m, s in zip(*row, strict=True)]
        for row in zip(columns["logp"], columns["mean"], columns["std"], strict=True)
    ]
    return {
        "auc_loss": [fmean(logp) for logp in columns["logp"]],
        "auc_zlib": [
            sum(logp) / len(zlib.compress(text.encode()))
            for logp, text in zip(columns["logp"], columns["text"], strict=True)
        ],
        "auc_min_k": [lowest(logp) for logp in columns["logp"]],
        "auc_min_k_plus_plus": [lowest(row) for row in normal],
    }


def test_membership_by_hand(summary, raws):
    found = {}
    for side, raw in raws.items():
        ours, theirs = (_scores(raw["texts"][name]) for name in ("unlearn", "unseen"))
        for metric in ours:
            found[side, metric] = _auc(ours[metric], theirs[metric])
            assert _value(summary, side, metric) == pytest.approx(found[side, metric])
            assert _get(summary, side, metric, "unlearn")["n"] == 8 + 6
    for side in ("before", "after"):
        auc, oracle = found[side, "auc_min_k"], found["retrained", "auc_min_k"]
        assert _value(summary, side, "privacy_leakage") == pytest.approx(100 * ((1 - auc) / (1 - oracle) - 1))


def test_robustness_and_score_by_hand(summary, raws):
    chance = 1 / 3
    assert summary["chance"] == pytest.approx(chance)
    goal = (chance + _accuracy(raws["before"]["questions"]["unlearn"]["mcq"])) / 2
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
        assert _value(summary, side, "relearn_own_taught") == pytest.approx(values[-1])
        assert _value(summary, side, "relearn_benign") == pytest.approx(
            fmean(attacks["relearn"]["benign"]["others"][-1]["right"])
        )
        steps = next(
            (step / 100 for step in range(2001) if _at(step / 100, curve["steps"], values) >= goal - 1e-9), None
        )
        got = _value(summary, side, "relearn_half_steps")
        assert (got is None) == (steps is None) and (steps is None or got == pytest.approx(steps, abs=0.011))
        accuracy = _accuracy(raw["questions"]["unlearn"]["mcq"])
        for bits in (8, 4):
            rounded = fmean(attacks["quantise"][f"{bits}-bit"]["unlearn"]["right"])
            assert _value(summary, side, f"accuracy_{bits}bit") == pytest.approx(rounded)
            want = 1 - abs(accuracy - rounded) / (accuracy + rounded)
            assert _value(summary, side, f"quantisation_robustness_{bits}bit") == pytest.approx(want)
        for name, columns in attacks["prefix"].items():
            assert _value(summary, side, f"prefix_{name}") == pytest.approx(fmean(columns["right"]))
    for side in raws:
        accuracy = {name: _value(summary, side, "accuracy", name) for name in ("unlearn", "retain")}
        relearning = min(max(gains["retrained"], 0) / gains[side], 1) if gains[side] > 0 else 1.0
        parts = {
            "forgetting": 1 - abs(accuracy["unlearn"] - _value(summary, "retrained", "accuracy")),
            "update": _value(summary, side, "reliability", "update")
            * _value(summary, side, "generalisation", "update"),
            "retained": min(accuracy["retain"] / _value(summary, "before", "accuracy", "retain"), 1),
            "robustness": relearning * _value(summary, side, "quantisation_robustness_4bit"),
        }
        assert _value(summary, side, "relearn_robustness") == pytest.approx(relearning)
        for name, want in parts.items():
            assert _value(summary, side, f"score_{name}", "all") == pytest.approx(want)
        assert _value(summary, side, "score", "all") == pytest.approx(4 / sum(1 / part for part in parts.values()))


def _at(step: float, steps: list[int], values: list[float]) -> float:
    """The broken line through the points."""
    place = max(number for number, begin in enumerate(steps[:-1]) if begin <= step)
    share = (step - steps[place]) / (steps[place + 1] - steps[place])
    return values[place] + share * (values[place + 1] - values[place])


def test_intervals_are_those_of_drawing_subjects(raws):
    """Against a bootstrap written out, with random numbers of its own."""
    summary = summarise(**raws, confidence=0.8, resamples=2000)
    draw = random.Random(3)
    losses: dict[str, list[float]] = {}
    for name in ("unlearn", "unseen"):
        columns = raws["after"]["texts"][name]
        for subject, logp in zip(columns["subject"], columns["logp"], strict=True):
            losses.setdefault(f"{name} {subject}", []).append(-fmean(logp))

    def resampled(name: str) -> float:
        groups = [values for key, values in losses.items() if key.startswith(f"{name} ")]
        return fmean(value for _ in groups for value in draw.choice(groups))

    samples = {
        "loss": sorted(resampled("unlearn") for _ in range(4000)),
        "loss_gap": sorted(resampled("unlearn") - resampled("unseen") for _ in range(4000)),
    }
    for metric, values in samples.items():
        row = _get(summary, "after", metric, "unlearn")
        spread = values[-1] - values[0]
        assert row["low"] == pytest.approx(values[400], abs=0.04 * spread)
        assert row["high"] == pytest.approx(values[3600], abs=0.04 * spread)


def test_every_number_lies_in_its_interval_and_is_json(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["sides"] == ["before", "after", "retrained"] and len(summary["measures"]) > 200
    for row in summary["measures"]:
        assert row["metric"] in METRICS
        if row["value"] is not None and not row["metric"].startswith(("score", "relearn_", "quant", "privacy")):
            assert row["low"] <= row["value"] <= row["high"]  # a statistic that is a mean, or nearly so


def test_over_forgetting_is_flagged_and_only_then(raws):
    assert summarise(**raws, resamples=FEW)["warnings"] == []
    damaged = copy.deepcopy(raws["after"])
    damaged["texts"]["unlearn"]["logp"] = [[p - 9 for p in logp] for logp in damaged["texts"]["unlearn"]["logp"]]
    warnings = summarise(raws["before"], damaged, raws["retrained"], resamples=FEW)["warnings"]
    assert len(warnings) == 5 and all(line.startswith("after is over-forgotten: ") for line in warnings)
    assert "the loss on unlearn lies above that on unseen texts by " in warnings[0] and "retrained: " in warnings[0]
    assert "membership AUC (min_k) is 0.000 [0.000, 0.000], below 1/2" in warnings[3]
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
    "questions": (
        lambda raw: raw["robustness"].clear(),
        "after: no attack was made: there are no questions about unlearn",
    ),
}


@pytest.mark.parametrize("remove, line", MISSING.values(), ids=MISSING)
def test_what_is_missing_is_told_and_the_rest_is_there(raws, remove, line):
    raw = copy.deepcopy(raws["after"])
    remove(raw)
    found = summarise(raws["before"], raw, raws["retrained"], resamples=FEW)
    assert any(text.startswith(line) for text in found["missing"])
    whole = summarise(**raws, resamples=FEW)
    kept = {(row["side"], row["set"], row["metric"]) for row in found["measures"]}
    values = {(row["side"], row["set"], row["metric"]): row["value"] for row in whole["measures"]}
    assert kept < values.keys() and ("after", "retain", "accuracy") in kept
    for row in found["measures"]:
        if row["side"] != "after" or not row["metric"].startswith("score"):
            assert row["value"] == values[row["side"], row["set"], row["metric"]]


def test_a_missing_set_is_told(raws):
    small = {side: copy.deepcopy(raw) for side, raw in raws.items()}
    for raw in small.values():
        for part in ("questions", "texts", "continuations"):
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


def test_one_subject_has_no_interval(raws):
    raw = {"texts": {"unlearn": {name: column[:2] for name, column in raws["after"]["texts"]["unlearn"].items()}}}
    (row,) = [row for row in summarise(after=raw)["measures"] if row["metric"] == "loss"]
    assert row["value"] is not None and row["low"] is None and row["high"] is None and row["n"] == 2


def test_questions_with_other_numbers_of_options_are_scored(raws):
    raw = copy.deepcopy(raws["after"])
    asked = raw["questions"]["retain"]["mcq"]
    for name in ("logp", "tokens", "hits"):
        asked[name][0] = [*asked[name][0], asked[name][0][0]]
    asked["logp"][0][3] -= 50.0
    assert _value(summarise(after=raw, resamples=2), "after", "accuracy", "retain") == pytest.approx(
        _accuracy(raws["after"]["questions"]["retain"]["mcq"])
    )


def test_each_metric_is_explained():
    for name, metric in METRICS.items():
        assert metric.name == name and 0 < len(metric.label) <= LABEL_WIDTH
        assert metric.formula and metric.source and metric.goal
    assert len({metric.label for metric in METRICS.values()}) == len(METRICS)
