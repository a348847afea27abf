"""The dictionary of the analysis against the pure functions on whole traces, and what cannot be compared."""

import json
import math

import pytest
import torch

from hf_moe_cpt.routing import metrics
from hf_moe_cpt.routing.compare import analyse_traces
from tests.helpers.routings import random_trace


DOMAINS = (None, "prose", "code")
V = 9


@pytest.fixture
def traces(tmp_path):
    return {name: random_trace(tmp_path / name, seed=seed) for seed, name in enumerate(("start", "later", "last"))}


@pytest.fixture
def found(traces):
    return analyse_traces(traces, min_occurrences=2, num_ranks=2)


def whole(trace, read) -> torch.Tensor:
    return torch.cat([read(shard) for shard in trace.shards])


def test_it_is_plain_json_with_the_promised_fields(found, traces):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert " ".join(found) == (
        "format checkpoints domains layers metrics vocabulary_specialization domain_specialization coactivation "
        "coactivation_change saturation top_tokens training expert_parallel skipped"
    )
    assert found["checkpoints"][1] == {"name": "later", "model": "random 1", "step": 1, "num_tokens": 75}
    assert found["domains"] == ["prose", "code"] and found["skipped"] == {} and found["training"] == []
    assert found["layers"] == [{"name": f"layers.{n}.experts", "num_experts": 5, "experts_per_token": 2} for n in "01"]


def test_metrics_equal_the_functions_on_whole_domains(found, traces):
    for name, trace in traces.items():
        for domain in DOMAINS:
            row = found["metrics"][name][domain or "all"]
            for layer in (0, 1):
                index = trace.top_k_index(layer, domain)
                load = metrics.expert_load(index, 5)
                assert row["load"][layer] == pytest.approx((load / load.sum()).tolist(), rel=1e-6)
                assert row["mri"][layer] == pytest.approx(float(metrics.max_routing_imbalance(index, 5)), rel=1e-6)
                assert row["mri_normalized"][layer] == pytest.approx(row["mri"][layer] * 5 / 2)
                assert row["load_entropy"][layer] == pytest.approx(float(metrics.load_entropy(load)))
                assert row["dead_experts"][layer] == int((load == 0).sum())
                shards = [shard for shard in trace.shards if domain in (None, shard.domain)]
                entropy = torch.cat([trace.entropy(shard, layer) for shard in shards]).double()
                assert row["router_entropy"][layer] == pytest.approx(float(entropy.mean()), rel=1e-12)
                probs = torch.cat([trace.probabilities(shard, layer) for shard in shards]).double()
                assert row["router_confidence"][layer] == pytest.approx(float(probs[:, 0].mean()), rel=1e-12)


def test_comparisons_equal_the_functions_on_whole_traces(found, traces):
    start = traces["start"]
    assert set(found["saturation"]) == set(found["coactivation_change"]) == {"later", "last"}
    for name, trace in traces.items():
        for layer in (0, 1):
            before, after = start.top_k_index(layer), trace.top_k_index(layer)
            pairs = metrics.expert_coactivation(after, 5)
            assert found["coactivation"][name][layer] == pairs.tolist()
            if name != "start":
                change = metrics.coactivation_change(metrics.expert_coactivation(before, 5), pairs)
                assert found["coactivation_change"][name][layer] == change
                for domain in DOMAINS:
                    want = metrics.router_saturation(
                        start.top_k_index(layer, domain), trace.top_k_index(layer, domain)
                    )
                    assert found["saturation"][name][domain or "all"][layer] == pytest.approx(want, rel=1e-12)
            for side, read in (("input", start.token_ids), ("output", start.next_token_ids)):
                ids, counter = whole(start, read), metrics.VocabularyCounter(V, 5)
                counter.add(ids, before)
                want = metrics.vocabulary_specialization(
                    ids, after, V, 5, favourite=metrics.favourite_experts(counter.counts)
                )
                assert found["vocabulary_specialization"][name][side][layer] == pytest.approx(want, rel=1e-12)
            for domain, row in zip(("prose", "code"), found["domain_specialization"][name][layer], strict=True):
                index = trace.top_k_index(layer, domain)
                assert row == pytest.approx([sum(e in row for row in index.tolist()) / len(index) for e in range(5)])


def test_top_tokens_by_hand(found, traces):
    ids, index = whole(traces["later"], traces["later"].token_ids), traces["later"].top_k_index(1)
    for expert, tokens in enumerate(found["top_tokens"]["later"][1]):
        shares = {token: (index[ids == token] == expert).any(-1).float().mean().item() for token in set(ids.tolist())}
        best = sorted((share for share in shares.values() if share), reverse=True)[:8]
        assert [entry["share"] for entry in tokens] == pytest.approx(best)
        for entry in tokens:
            assert shares[int(entry["token"])] == pytest.approx(entry["share"])
            assert entry["count"] == int((ids == int(entry["token"])).sum())


def test_expert_parallel_estimate(found):
    for name, row in found["metrics"].items():
        estimate = found["expert_parallel"][name]
        assert estimate["num_ranks"] == 2
        for layer, load in enumerate(row["all"]["load"]):
            usual = max(sum(load[:3]), sum(load[3:]))
            assert estimate["contiguous"]["max_load"][layer] == pytest.approx(usual)
            assert estimate["contiguous"]["slowdown"][layer] == pytest.approx(2 * usual)
            placement = estimate["suggested"]["placement"][layer]
            sums = [sum(load[e] for e in range(5) if placement[e] == rank) for rank in (0, 1)]
            assert estimate["suggested"]["max_load"][layer] == pytest.approx(max(sums))
            assert max(sums) <= usual + 1e-12


class _Names:
    """A tokenizer that decodes id 3 to half a character."""

    def decode(self, ids: list[int]) -> str:
        return "\ufffd" if ids == [3] else f" word{ids[0]}"

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"raw{token}" for token in ids]


def test_tokens_carry_names_and_curves_pass_through(traces):
    curve = metrics.imbalance_curve("run", [1, 2], [[0.5, 0.4]], ideal=0.4)
    found = analyse_traces(traces, tokenizer=_Names(), min_occurrences=1, training=[curve], average="ids")
    names = {entry["token"] for layer in found["top_tokens"]["start"] for tokens in layer for entry in tokens}
    assert names == {f" word{token}" for token in range(V) if token != 3} | {"raw3"}
    assert found["training"] == [curve]
    assert found["vocabulary_specialization"]["last"]["average"] == "ids"


def test_threads_and_chunks_change_nothing(found, traces, monkeypatch):
    assert analyse_traces(traces, min_occurrences=2, num_ranks=2, workers=1) == found
    monkeypatch.setattr(metrics, "CHUNK_TOKENS", 4)
    assert analyse_traces(traces, min_occurrences=2, num_ranks=2) == found


def test_one_expert_a_token_and_no_probabilities_are_skipped_with_a_reason(tmp_path):
    trace = random_trace(tmp_path, shape=((4, 1),), probabilities=False, domains=(("a", 1), ("a", 1)))
    found = analyse_traces({"only": trace})
    assert found["coactivation"] is None and found["coactivation_change"] is None and found["saturation"] == {}
    assert found["metrics"]["only"]["a"]["router_entropy"] is None
    assert found["metrics"]["only"]["all"]["router_confidence"] is None
    assert found["vocabulary_specialization"]["only"]["output"] == [None]  # no token follows another
    assert found["skipped"] == {
        "coactivation": "Each token visits a single expert (K = 1), so no two experts share a token.",
        "router_entropy": "The traces of only were collected without router probabilities.",
        "saturation": "There is one checkpoint only: saturation compares a later one with the first.",
    }


def test_layers_of_many_and_different_sizes(tmp_path):
    traces = {name: random_trace(tmp_path / name, shape=((300, 3), (4, 2)), seed=i) for i, name in enumerate("ab")}
    found = analyse_traces(traces)
    assert [len(load) for load in found["metrics"]["a"]["all"]["load"]] == [300, 4]
    assert found["expert_parallel"]["b"]["num_ranks"] == 4
    want = metrics.router_saturation(traces["a"].top_k_index(0), traces["b"].top_k_index(0))
    assert found["saturation"]["b"]["all"][0] == pytest.approx(want) and not math.isnan(want)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"shape": ((5, 2),)}, "b has 1 MoE layers of 5 experts, 2 a token, a has 2 MoE layers of 5 experts, 2 a to"),
        ({"shape": ((5, 2), (5, 3))}, "only checkpoints of one architecture compare"),
        ({"tokenizer": "other"}, "b has another tokenizer than a: only checkpoints that share one compare"),
        ({"vocab_size": 12}, "b has 12 embeddings, a 9: only checkpoints that share a tokenizer compare"),
        ({"text_seed": 8}, "b was traced on other text than a, or on the same text cut in another way"),
        ({"domains": (("prose", 30), ("prose", 20), ("maths", 25))}, "b was traced on other text than a"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, text, tmp_path):
    start = random_trace(tmp_path / "a", tokenizer="one")
    other = random_trace(tmp_path / "b", **{"tokenizer": "one"} | change)
    with pytest.raises(ValueError, match=text):
        analyse_traces({"a": start, "b": other})


@pytest.mark.parametrize(
    "names, settings, text",
    [
        ("", {}, "No trace was given"),
        ("a", {"average": "mean"}, "average='mean' is unknown"),
        ("a", {"num_ranks": 9}, r"num_ranks=9 must lie in \[1, 5\]"),
        ("a", {"workers": 0}, "workers=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(names, settings, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        analyse_traces({name: random_trace(tmp_path / name) for name in names}, **settings)
    with pytest.raises(ValueError, match="A domain is called 'all', which stands for all domains"):
        analyse_traces({"a": random_trace(tmp_path / "all", domains=(("all", 9),))})
