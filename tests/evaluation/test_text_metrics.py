"""Numbers about texts and questions by hand, against loops over the definitions, scipy, numpy and torch."""

import math
import zlib
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import entropy, gmean, hmean, ks_2samp, mannwhitneyu

import hf_moe_cpt.evaluation.text_metrics as tm
from hf_moe_cpt.evaluation.statistics import ratio_of_sums


SHORT = st.text("abc", max_size=8)


@given(SHORT, SHORT)
@settings(max_examples=80, deadline=None)
def test_lcs_of_short_strings_by_trying_all_subsequences(first, second):
    def subsequences(text):
        return {picked for size in range(len(text) + 1) for picked in combinations(text, size)}

    assert tm.lcs_length(first, second) == max(map(len, subsequences(first) & subsequences(second)))


def test_lcs_of_long_lists_against_the_table():
    generator = np.random.default_rng(0)
    for sizes in ((150, 90), (64, 64), (63, 65), (1, 200)):
        first, second = (generator.integers(0, 9, size).tolist() for size in sizes)
        table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        assert tm.lcs_length(first, second) == table[-1, -1]


def test_rouge_l_by_hand():
    # the example of Lin 2004, section 3, in which the order of the words decides
    reference = "police killed the gunman"
    got = tm.rouge_l(["police kill the gunman", "the gunman kill police", "The gunman police-killed"], [reference] * 3)
    np.testing.assert_allclose(got.f1, [3 / 4, 2 / 4, 2 / 4])
    got = tm.rouge_l(["a b c", "A... b", "x", "", "été"], ["a c d e f", "a, b", "y", "y", "été"])
    np.testing.assert_allclose(got.precision, [2 / 3, 1, 0, 0, 1])
    np.testing.assert_allclose(got.recall, [2 / 5, 1, 0, 0, 1])  # "été" has the word "t" only
    np.testing.assert_allclose(got.f1, [2 / (3 / 2 + 5 / 2), 1, 0, 0, 1])


def test_entropy_against_scipy_and_of_extremes():
    text = "It is so, it is so, it is not. It's so!"
    words = ["It", "is", "so", ",", "it", "is", "so", ",", "it", "is", "not", ".", "It", "'", "s", "so", "!"]
    parts = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
        parts.append(weight * entropy([grams.count(gram) for gram in set(grams)], base=2))
    np.testing.assert_allclose(tm.ngram_entropy([text]), [sum(parts) / 2], rtol=1e-12)
    got = tm.ngram_entropy([" ".join(map(str, range(18))), "no no no no no", "one", "", "two words"])
    np.testing.assert_allclose(got, [(2 / 3 * np.log2(17) + 4 / 3 * 4) / 2, 0, 0, 0, 0])
    assert not np.signbit(got).any()


def test_accuracy_and_conflict_in_their_forms():
    hits = [[1, 0, 1, 1], [0], [1, 1]]
    np.testing.assert_allclose(tm.token_accuracy(hits), [3 / 4, 0, 1])
    np.testing.assert_array_equal(tm.token_accuracy([3, 0, 2], [4, 1, 2]), tm.token_accuracy(hits))
    old, new = np.array([0.2, 0.5, 1e-3, 0.9]), np.array([0.2, 0.1, 0.4, 1e-9])
    np.testing.assert_allclose(tm.conflict_score(np.log(old), np.log(new)), old / (old + new), rtol=1e-12)
    old, new = np.array([-2000.0, -2000.0, -5000.0, 0.0]), np.array([-2001.0, -2000.0, -1.0, -5000.0])
    np.testing.assert_allclose(tm.conflict_score(old, new), expit(old - new), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(tm.conflict_score(old, new) + tm.conflict_score(new, old), 1)


SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=15)
LOGPS = [[-1.0, -5.0, -2.0, -4.0, -3.0], [-0.5], [-1.0, -2.0]]


def test_scores_by_hand():
    np.testing.assert_allclose(tm.loss_score(LOGPS), [-3, -0.5, -1.5])
    np.testing.assert_allclose(tm.min_k(LOGPS), [-4.5, -0.5, -2])  # floor(2.0), 1 at least, floor(0.8) -> 1
    np.testing.assert_allclose(tm.min_k(LOGPS, k=1), tm.loss_score(LOGPS))
    np.testing.assert_allclose(tm.min_k([[-1.0, -2.0, -3.0, -4.0]]), [-4])  # floor(1.6)
    np.testing.assert_allclose(tm.min_k([np.arange(-100.0, 0)], k=0.29), [-86])  # 29 of them, though 0.29 * 100 < 29
    texts = ["a" * 500, "the quick brown fox"]
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    np.testing.assert_allclose(tm.zlib_score([30.0, 40.0], texts), [-30 / sizes[0], -40 / sizes[1]])
    mean, std = [[-2.0, -2.0, -2.0, -2.0, -2.0], [-1.0], [0.0, -2.0]], [[1.0, 2.0, 0.5, 4.0, 1.0], [0.0], [1.0, 1.0]]
    got = tm.min_k_plus_plus(LOGPS, mean, std)
    np.testing.assert_allclose(got, [(-1.5 - 1.0) / 2, 0.5 / 1e-3, -1.0])
    same = tm.min_k_plus_plus(LOGPS, [np.zeros(len(row)) for row in LOGPS], [np.ones(len(row)) for row in LOGPS])
    np.testing.assert_allclose(same, tm.min_k(LOGPS))
    shares = [[0.5, 0.25, 0.9], [1.0], [1e-200, 1e-200]]
    got = tm.probability([np.log(row) for row in shares])
    np.testing.assert_allclose(got, [gmean(row) for row in shares], rtol=1e-12)
    assert tm.probability([[-1.0, -np.inf], [0.0, 1e-7]]).tolist() == [0.0, 1.0]


@given(SCORES, SCORES)
@settings(max_examples=60, deadline=None)
def test_auc_of_all_pairs_and_of_scipy(members, others):
    pairs = [(a > b) + (a == b) / 2 for a in members for b in others]
    assert tm.auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
    statistic = mannwhitneyu(members, others).statistic
    assert tm.auc(members, others) == pytest.approx(statistic / len(members) / len(others))
    assert tm.auc(others, members) == pytest.approx(1 - tm.auc(members, others))
    assert tm.auc(tm.loss_score([[-1.0], [-np.inf]]), tm.loss_score([[-2.0, -np.inf]])) == 0.75


def test_leakage_its_sides_and_steps_between_measurements():
    assert tm.privacy_leakage(1.0, 0.5) == -100  # not forgotten at all
    assert tm.privacy_leakage(0.5, 0.5) == 0
    assert tm.privacy_leakage(0.0, 0.5) == 100  # over-forgotten
    assert tm.privacy_leakage(0.7, 0.6) == pytest.approx(100 * ((1 - 0.7) - (1 - 0.6)) / (1 - 0.6))
    assert math.isnan(tm.privacy_leakage(0.7, 1.0))
    assert [tm.is_over_forgotten(value) for value in (0.0, 0.499, 0.5, 1.0)] == [True, True, False, False]
    steps, values = [0, 5, 10, 20], [0.25, 0.5, 0.4, 1.0]
    assert [tm.steps_until(steps, values, goal) for goal in (0.1, 0.25, 0.5, 1.0)] == [0, 0, 5, 20]
    assert tm.steps_until(steps, values, 0.375) == pytest.approx(np.interp(0.375, values[:2], steps[:2]))
    assert tm.steps_until(steps, values, 0.7) == pytest.approx(np.interp(0.7, values[2:], steps[2:]))
    assert tm.steps_until(steps, values, 1.01) is None
    assert tm.steps_until([0], [0.3], 0.4) is None


@given(SCORES, SCORES)
@settings(max_examples=60, deadline=None)
def test_the_test_of_kolmogorov_and_smirnov_is_scipys(ours, theirs):
    assert tm.ks_pvalue(ours, theirs) == pytest.approx(ks_2samp(ours, theirs, method="exact").pvalue, abs=1e-12)


def test_truth_ratio_is_that_of_geometric_means():
    true, wrong = [0.5, 0.2], [[0.1, 0.4], [0.3]]
    got = tm.truth_ratio(np.log(true), [np.log(row) for row in wrong])
    np.testing.assert_allclose(got, [gmean(row) / p for row, p in zip(wrong, true, strict=True)])


TEXTS = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5)


def test_by_hand():
    hits = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1, 1], [0], [1]]
    np.testing.assert_allclose(tm.exact_memorisation(hits), [1, 1 / 2, 3 / 4, 3 / 5, 0, 1])
    np.testing.assert_allclose(tm.extraction_strength(hits), [1, 1 / 2, 1 / 4, 2 / 5, 1, 1])


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_shortest_beginning_is_found_by_trying_all(texts):
    shortest = [next((k for k in range(len(hits)) if all(hits[k:])), len(hits) - 1) for hits in texts]
    expected = [1 - k / len(hits) for k, hits in zip(shortest, texts, strict=True)]
    np.testing.assert_allclose(tm.extraction_strength(texts), expected)


@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_every_question_as_a_loop_finds_it(questions, options, seed):
    generator = np.random.default_rng(seed)
    losses, answers = generator.integers(0, 3, (questions, options)), generator.integers(0, options, questions)
    expected = []
    for row, answer in zip(losses.tolist(), answers.tolist(), strict=True):
        lowest = [place for place, loss in enumerate(row) if np.exp(loss) == min(map(np.exp, row))]
        expected.append(1 / len(lowest) if answer in lowest else 0)
    np.testing.assert_allclose(tm.mcq_correct(losses, answers), expected)
    by_answer = sum(tm.mcq_correct(losses, np.full(questions, place)) for place in range(options))
    np.testing.assert_allclose(by_answer, 1)  # an answer for each question, whatever it is
    assert tm.mcq_correct([[2.0, 1.0, np.inf], [1.0, 2.0, 3.0]], [1, 0]).tolist() == [1, 1]


def test_texts_and_tokens_of_real_distributions():
    generator = torch.Generator().manual_seed(0)
    kl, agrees = [], []
    for length in (1, 4, 7):
        before, now = (torch.randn(length, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        before, now = before.log_softmax(-1), now.log_softmax(-1)
        kl.append(torch.nn.functional.kl_div(now, before, log_target=True, reduction="none").sum(-1))
        agrees.append(before.argmax(-1) == now.argmax(-1))
    assert ratio_of_sums(tm.kl_totals(kl)) == pytest.approx(float(torch.cat(kl).mean()), rel=1e-12)
    assert ratio_of_sums(tm.agreement_totals(agrees)) == pytest.approx(float(torch.cat(agrees).double().mean()))
    assert tm.kl_totals(kl)[:, 1].tolist() == [1, 4, 7]
    np.testing.assert_allclose(tm.kl_totals([[-1e-7, 1e-7]]), [[0, 2]], atol=1e-12)  # rounding


def test_ratios_of_attacks_and_parts_of_the_score():
    assert tm.relearning_robustness(0.4, 0.1) == pytest.approx(0.25)
    assert tm.relearning_robustness(0.1, 0.4) == 1  # learns slower than one that never knew
    assert [tm.relearning_robustness(*pair) for pair in ((0.0, 0.4), (-0.2, -0.1), (0.0, 0.0))] == [1, 1, 1]
    assert tm.relearning_robustness(0.4, 0.0) == tm.relearning_robustness(0.4, -0.1) == 0
    assert tm.quantisation_stability(0.21, 0.83) == pytest.approx(1 - 0.62 / 1.04)
    assert tm.quantisation_stability(0.83, 0.21) == tm.quantisation_stability(0.21, 0.83)
    assert [tm.quantisation_stability(*pair) for pair in ((0.5, 0.5), (0, 0), (0, 0.3), (0.3, 0))] == [1, 1, 0, 0]
    assert tm.forgetting_part(0.5, 0.3) == tm.forgetting_part(0.1, 0.3) == pytest.approx(0.8)
    assert tm.forgetting_part(1, 0) == 0 and tm.forgetting_part(0.3, 0.3) == 1
    assert tm.update_part(0.9, 0.5) == pytest.approx(0.45)
    assert [tm.retained_part(*pair) for pair in ((0.4, 0.8), (0.9, 0.8), (0.0, 0.8), (0.2, 0.0))] == [0.5, 1, 0, 1]
    assert tm.robustness_part(0.5, 0.8) == pytest.approx(0.4)


def test_the_score_is_the_harmonic_mean_of_what_was_measured():
    parts = {"forgetting": 0.9, "update": 0.45, "retained": 1.0, "robustness": 0.4}
    assert tm.surgery_score(parts) == pytest.approx(hmean(list(parts.values())))
    assert tm.surgery_score({"forgetting": 0.9, "retained": 0.5}) == pytest.approx(hmean([0.9, 0.5]))
    assert tm.surgery_score({**parts, "update": 0}) == 0  # nothing makes up for it
    assert tm.score_formula(parts) == (
        "harmonic mean of (forgetting: 1 - |accuracy on unlearn - target|, update: reliability x generalisation, "
        "retained: min(retain after / retain before, 1), robustness: R x Q)"
    )
    told = tm.score_formula(("retained", "forgetting"))
    assert told.endswith("; not measured and left out: update, robustness") and "reliability" not in told


LOSSES = [[1.0, 2.0]]
REFUSED = {
    "one string": (lambda: tm.rouge_l("a b", ["a"]), "predictions must be a sequence of at least one string"),
    "none": (lambda: tm.rouge_l([], []), "predictions must be a sequence of at least one string"),
    "texts": (lambda: tm.rouge_l(["a"], ["a", "b"]), "references has 2 rows and the other columns 1: give one"),
    "a number": (lambda: tm.rouge_l(["a", 3], ["a", "b"]), r"predictions\[1\] must be a string, got int"),
    "more hits than tokens": (lambda: tm.token_accuracy([1, 3], [1, 2]), "hits holds 3 at question 1, whose answer"),
    "no tokens": (lambda: tm.token_accuracy([0], [0]), "tokens holds 0: an answer has at least 1 token"),
    "counts alone": (lambda: tm.token_accuracy([3, 2]), r"hits\[0\] must be \(n,\)"),
    "answers differ": (lambda: tm.conflict_score([-1.0], [-1.0, -2.0]), "new_logp has 2 rows and the other columns 1"),
    "infinite": (lambda: tm.conflict_score([-np.inf], [-1.0]), "old_logp holds -inf at place 0: every value must"),
    "k of percent": (lambda: tm.min_k(LOGPS, k=40), r"k=40 must lie in \(0, 1\]"),
    "k of none": (lambda: tm.min_k(LOGPS, k=0), r"k=0 must lie in \(0, 1\]"),
    "other tokens": (lambda: tm.min_k_plus_plus(LOGPS, LOGPS[:2], LOGPS), "mean has other numbers of tokens"),
    "spread below 0": (lambda: tm.min_k_plus_plus([[-1.0]], [[-1.0]], [[-1.0]]), "std holds -1: a standard deviation"),
    "mean of logps": (lambda: tm.zlib_score([-30.0], ["a"]), "mean_nll holds -30: a negative log-probability"),
    "texts missing": (lambda: tm.zlib_score([3.0, 3.0], ["a"]), "texts has 1 rows and the other columns 2"),
    "no others": (lambda: tm.auc([1.0], []), r"others must be \(N,\) with at least one row"),
    "no number": (lambda: tm.auc([np.nan], [1.0]), "members holds nan"),
    "percent": (lambda: tm.privacy_leakage(50, 0.5), r"auc=50 must lie in \[0, 1\]"),
    "losses instead": (lambda: tm.probability([[0.0], [0.5]]), "logps holds 0.5: a log-probability is at most 0"),
    "no log": (lambda: tm.probability([[0.0], [np.nan]]), r"logps\[1\] holds nan at place 0: no value may be NaN"),
    "empty text": (lambda: tm.exact_memorisation([[1], []]), r"hits\[1\] must be \(n,\) with at least one token"),
    "no text": (lambda: tm.extraction_strength([]), "hits must be a sequence of texts"),
    "counts": (lambda: tm.exact_memorisation([[0, 1, 2]]), r"hits\[0\] holds 2: for each token it is 1 \(yes\) or 0"),
    "one option": (lambda: tm.mcq_correct([[1.0]], [0]), r"\(questions, options\) with two options or more, got"),
    "ragged": (lambda: tm.mcq_correct([[1.0, 2.0], [1.0]], [0, 0]), "option_losses must be numbers in rows of one"),
    "no loss": (lambda: tm.mcq_correct([[1.0, np.nan]], [0]), "option_losses holds nan at place 1: no value"),
    "too high": (lambda: tm.mcq_correct(LOSSES * 2, [0, 2]), "answers holds 2 at question 1: .* integer from 0 to 1"),
    "answer below": (lambda: tm.mcq_correct(LOSSES, [-1]), "answers holds -1 at question 0"),
    "half an answer": (lambda: tm.mcq_correct(LOSSES, [0.5]), "answers holds 0.5"),
    "no answers": (lambda: tm.mcq_correct(LOSSES * 3, [0]), "answers has 1 rows and the other columns 3"),
    "kl": (lambda: tm.kl_totals([[0.1], [0.2, -0.5]]), "kl holds -0.5: a KL divergence is at least 0"),
    "agreement": (lambda: tm.agreement_totals([[0.5]]), r"agrees\[0\] holds 0.5"),
    "disorder": (lambda: tm.steps_until([0, 5, 5], [0.1, 0.2, 0.3], 0.2), r"steps must ascend, got \[0.0, 5.0, 5.0\]"),
    "lengths": (lambda: tm.steps_until([0, 5], [0.1], 0.2), "values has 1 rows and the other columns 2"),
    "no gain": (lambda: tm.relearning_robustness(float("nan"), 0.1), "gain=nan must be finite"),
    "below 0": (lambda: tm.quantisation_stability(-0.1, 0.1), "before=-0.1 and after=0.1 must be at least 0"),
    "no part": (lambda: tm.surgery_score({}), "parts of the score are forgetting, update, retained, robustness"),
    "another part": (lambda: tm.surgery_score({"speed": 1.0}), r"at least one, got \['speed'\]"),
    "part in percent": (lambda: tm.surgery_score({"forgetting": 90}), r"forgetting=90 must lie in \[0, 1\]"),
    "no accuracy": (lambda: tm.forgetting_part(float("nan"), 0.3), r"accuracy=nan must lie in \[0, 1\]"),
    "loss": (lambda: tm.retained_part(after=2.3, before=0.5), r"after=2.3 must lie in \[0, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("call, text", REFUSED.values(), ids=REFUSED)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
