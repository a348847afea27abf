"""Traces of real models of many families against what their own routers returned, padding, kills, ranks, damage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe_cpt.routing.hooks import moe_layers
from hf_moe_cpt.routing.trace import RoutingTrace, TraceWriter, checksum_of_json, collect_routing
from tests.helpers.collection import SETTINGS, collect, texts
from tests.helpers.fresh_process import TWO_RANKS, launch, run_python
from tests.helpers.routings import random_trace
from tests.helpers.tiny_models import SIZES, VOCABULARY, tiny_model, tokenized
from tests.helpers.tiny_moes import BLOCKS, moe_model


E, K = 8, 2
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
EVEN = {"num_experts_per_tok": K, "moe_intermediate_size": 8}
GROUPS = {**EVEN, "n_routed_experts": E, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LOCAL = {"num_local_experts": E, "num_experts_per_tok": K}
PLAIN = {"layer_types": ["full_attention"] * 2, "head_dim": 8}
CONFIGS = {
    "afmoe": {**EVEN, **PLAIN, "num_experts": E, "num_dense_layers": 0},
    "deepseek_v2": {**GROUPS, **LATENT, "first_k_dense_replace": 0},
    "dots1": {**GROUPS, "first_k_dense_replace": 0, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": E, "moe_k": K, "moe_intermediate_size": 8, "moe_layer_start_index": 0},
    "flex_olmo": {"num_experts": E, "num_experts_per_tok": K},
    "glm4_moe": {**GROUPS, "first_k_dense_replace": 0, "head_dim": 8},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": E, "moe_topk": K, "head_dim": 8},
    "lfm2_moe": {**EVEN, "num_experts": E, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
    "minimax": {**LOCAL, **PLAIN},
    "phimoe": LOCAL,
    "qwen3_next": {**EVEN, **PLAIN, "num_experts": E, "shared_expert_intermediate_size": 8},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_trace_holds_the_largest_logits(kind, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "pad_token_id": 0, **CONFIGS[kind]})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, weight in model.named_parameters():  # the routers of some families start at 0
        if weight.shape[0] == E and weight.ndim == 2 and ("gate" in name or "router" in name):
            nn.init.normal_(weight, std=0.3)
    ids = torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    trace = collect_routing(model, [{"input_ids": row} for row in ids.tolist()], tmp_path, progress=False)
    assert [(layer.num_experts, layer.experts_per_token) for layer in trace.layers] == [(E, K)] * 2
    with torch.no_grad():
        recorded = getattr(model(ids, output_router_logits=True), "router_logits", None)
    if not recorded:
        pytest.skip(f"{type(model).__name__} of the transformers that is installed returns no router logits")
    assert len(recorded) == 2
    for layer, logits in enumerate(recorded):
        want = logits.reshape(-1, E).topk(K).indices.sort(-1).values
        assert torch.equal(trace.top_k_index(layer).long().sort(-1).values, want)


def routed_alone(model: nn.Module, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(logits, chosen experts) of every layer for one text without padding, from what goes in and out of routers."""
    seen = []
    handles = [layer.router.register_forward_hook(lambda *call: seen.append(call)) for layer in moe_layers(model)]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for router, (hidden_states, *_), output in seen:
        logits = nn.functional.linear(hidden_states.flatten(0, -2), router.weight, getattr(router, "bias", None))
        chosen = [part for part in output if not part.is_floating_point()]
        found.append((logits, chosen[0] if chosen else logits.topk(model.config.num_experts_per_tok).indices))
    return found


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def hooks_of(model: nn.Module) -> list[tuple[list[int], list[int]]]:
    return [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_family_is_traced_as_its_routers_chose(kind, tmp_path):
    model, documents = moe_model(kind).train(), tokenized(7, seed=3)
    model.get_input_embeddings().eval()  # a part in another mode than the whole
    hooks, modes = hooks_of(model), modes_of(model)
    trace = collect_routing(model, documents, tmp_path, batch_size=3, max_length=64, progress=False)
    assert modes_of(model) == modes and hooks_of(model) == hooks
    assert trace.domains == ("text",) and trace.num_tokens() == sum(map(len, documents["input_ids"]))
    (shard,) = trace.shards
    begin = 0
    for ids in documents["input_ids"]:
        end = begin + len(ids)
        assert trace.token_ids(shard)[begin:end].tolist() == ids
        assert trace.next_token_ids(shard)[begin:end].tolist() == [*ids[1:], -1]
        for layer, (logits, chosen) in enumerate(routed_alone(model.eval(), ids)):
            probs = logits.float().softmax(-1)
            got = trace.experts(shard, layer)[begin:end].long()
            assert torch.equal(got.sort(-1).values, chosen.sort(-1).values)
            torch.testing.assert_close(trace.probabilities(shard, layer)[begin:end], probs.gather(1, got).half())
            entropy = torch.special.entr(probs).sum(-1) / torch.tensor(float(logits.shape[-1])).log()
            torch.testing.assert_close(trace.entropy(shard, layer)[begin:end], entropy.half())
        begin = end
    shapes = [(layer.num_experts, layer.experts_per_token) for layer in trace.layers]
    k = model.config.num_experts_per_tok
    assert shapes == [(num_experts, k) for _, _, num_experts in BLOCKS[kind].values()]


def test_batch_size_and_padded_batches_change_nothing(tmp_path):
    model, documents = moe_model("olmoe"), tokenized(9, seed=5)
    traces = [collect_routing(model, documents, tmp_path / str(n), batch_size=n, progress=False) for n in (1, 4, 9)]
    longest = max(map(len, documents["input_ids"]))
    ids, mask = torch.zeros(9, longest, dtype=torch.int64), torch.zeros(9, longest, dtype=torch.int64)
    for place, row in enumerate(documents["input_ids"]):
        ids[place, longest - len(row) :] = torch.tensor(row)
        mask[place, longest - len(row) :] = 1  # padded on the left
    batches = [{"input_ids": ids[:5], "attention_mask": mask[:5]}, {"input_ids": ids[5:], "attention_mask": mask[5:]}]
    traces.append(collect_routing(model, batches, tmp_path / "batches", progress=False))
    for trace in traces[1:]:
        assert torch.equal(trace.token_ids(trace.shards[0]), traces[0].token_ids(traces[0].shards[0]))
        for layer in range(2):
            assert torch.equal(trace.top_k_index(layer), traces[0].top_k_index(layer))


def test_long_rows_are_cut_and_domains_limited(tmp_path):
    rows = [{"input_ids": list(range(1, 11))}, {"input_ids": list(range(11, 31))}]
    settings = {"max_length": 8, "tokens_per_domain": 15, "tokens_per_shard": 8, "probabilities": False}
    trace = collect_routing(moe_model("qwen3_moe"), {"a": rows, "b": rows[:1]}, tmp_path, progress=False, **settings)
    sizes = [(shard.domain, shard.num_tokens) for shard in trace.shards]
    assert sizes == [("a", 8), ("a", 2 + 5), ("b", 8), ("b", 2)]
    assert trace.token_ids(trace.shards[1]).tolist() == [9, 10, 11, 12, 13, 14, 15]
    assert trace.next_token_ids(trace.shards[1]).tolist() == [10, -1, 12, 13, 14, 15, -1]
    with pytest.raises(ValueError, match="holds no router probabilities: collect it again with probabilities=True"):
        trace.entropy(trace.shards[0], 0)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_killed_collection_goes_on_and_ends_the_same(tmp_path):
    whole = collect(tmp_path / "whole")
    assert len(whole.shards) == 5
    dead = run_python("-m", "tests.helpers.collection", str(tmp_path / "killed"), "2", check=False)
    assert dead.returncode == -9
    with pytest.raises(ValueError, match="trace.json is missing: call collect_routing again to complete the 2 shards"):
        RoutingTrace.open(tmp_path / "killed")
    first = tmp_path / "killed" / "shard_00000.safetensors"
    written = first.stat().st_mtime_ns
    collect(tmp_path / "killed")
    assert first.stat().st_mtime_ns == written
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_write_the_trace_of_one(tmp_path):
    collect(tmp_path / "one")
    launch(*TWO_RANKS, "-m", "tests.helpers.collection", str(tmp_path / "two"))
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_a_finished_trace_is_kept_and_a_damaged_shard_made_again(tmp_path):
    collect(tmp_path)
    before = files_of(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    collect(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == times
    (tmp_path / "shard_00001.safetensors").write_bytes(b"damage")
    collect(tmp_path)
    assert files_of(tmp_path) == before


def test_another_model_or_text_is_not_mixed_in(tmp_path):
    collect(tmp_path)
    trained = tiny_model("mixtral")
    with torch.no_grad():
        trained.model.norm.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"holds a trace with another weights \(.*name another folder"):
        collect_routing(trained, texts(), tmp_path, name="tiny", **SETTINGS)
    with pytest.raises(ValueError, match=r"holds a trace with another max_length \(24, now 9\)"):
        collect_routing(tiny_model("mixtral"), texts(), tmp_path, name="tiny", **SETTINGS | {"max_length": 9})
    other = texts() | {"code": tokenized(9, 2)}
    with pytest.raises(ValueError, match="was collected on other text than what came now for 'code'"):
        collect_routing(tiny_model("mixtral"), other, tmp_path, name="tiny", **SETTINGS)
    shorter = texts() | {"code": tokenized(9, 1).select(range(3))}
    with pytest.raises(ValueError, match="was collected on other text|shards and the text now makes"):
        collect_routing(tiny_model("mixtral"), shorter, tmp_path, name="tiny", **SETTINGS)


@pytest.mark.parametrize(
    "data, text",
    [
        ([], "The domain 'text' holds no tokens"),
        ({"prose": [{"input_ids": [1, 2]}], "code": [{"input_ids": []}]}, "The domain 'code' holds no tokens"),
        ({}, "data holds no domain"),
        ([{"words": "a"}], "Row 0 of 'text' has words: it needs input_ids, or text together with tokenizer"),
        ([{"text": "a"}], "Row 0 of 'text' has text: it needs input_ids, or text together with tokenizer"),
        ([{"input_ids": [1, VOCABULARY]}], rf"holds token id {VOCABULARY}, outside \[0, {VOCABULARY}\)"),
        ([{"input_ids": [1.5]}], "holds input_ids of type float64"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], r"has an attention_mask \(1, 1\) for input_ids \(2,\)"),
    ],
)
def test_bad_data_is_refused(data, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        collect_routing(moe_model("mixtral"), data, tmp_path, progress=False)


def test_models_without_a_mixture_are_refused(tmp_path):
    rows = [{"input_ids": [1, 2]}]
    with pytest.raises(ValueError, match="LlamaForCausalLM is a dense model: routing needs a mixture of experts"):
        collect_routing(tiny_model("llama"), rows, tmp_path, progress=False)
    hidden = tiny_model("llama")
    hidden.config.num_local_experts = 8
    with pytest.raises(ValueError, match="says num_local_experts=8, but its experts and routers were not found: look"):
        collect_routing(hidden, rows, tmp_path, progress=False)
    lost = moe_model("mixtral")
    for layer in lost.model.layers:
        layer.mlp.gate = nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"The router of model.layers.0.mlp.experts is not known: .*router_logits"):
        collect_routing(lost, rows, tmp_path, progress=False)
    for name in ("max_length", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            collect_routing(moe_model("mixtral"), rows, tmp_path, progress=False, **{name: 0})


def test_adapters_are_traced(tmp_path):
    peft = pytest.importorskip("peft")
    plain = collect(tmp_path / "plain")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp.gate"], lora_dropout=0.5)
    adapted = peft.get_peft_model(tiny_model("mixtral"), settings)  # an adapter begins as nothing
    trace = collect_routing(adapted, texts(), tmp_path / "adapted", **SETTINGS)
    for layer in range(2):
        assert torch.equal(trace.top_k_index(layer), plain.top_k_index(layer))
    assert json.loads((tmp_path / "adapted" / "trace.json").read_text())["format"] == 1


def test_what_is_written_is_read(tmp_path):
    trace = RoutingTrace.open(random_trace(tmp_path, shape=((5, 2), (300, 3))).folder)
    assert trace.domains == ("prose", "code")
    assert (trace.num_tokens(), trace.num_tokens("prose"), trace.num_tokens("code")) == (75, 50, 25)
    assert [(layer.num_experts, layer.experts_per_token) for layer in trace.layers] == [(5, 2), (300, 3)]
    stored = [load_file(tmp_path / shard.file) for shard in trace.shards]
    assert stored[0]["layer_000.experts"].dtype == np.uint8 and stored[0]["layer_001.experts"].dtype == np.uint16
    for shard, arrays in zip(trace.shards, stored, strict=True):
        assert torch.equal(trace.experts(shard, 1), torch.from_numpy(arrays["layer_001.experts"].astype(np.int16)))
        assert torch.equal(trace.entropy(shard, 0), torch.from_numpy(arrays["layer_000.entropy"]))
        assert torch.equal(trace.probabilities(shard, 1), torch.from_numpy(arrays["layer_001.probabilities"]))
    assert trace.top_k_index(0, "code").shape == (25, 2) and trace.top_k_index(1).shape == (75, 3)
    with pytest.raises(ValueError, match="has no domain 'math': choose from prose, code"):
        trace.top_k_index(0, "math")
    shards = [f"shard_{number:05d}.safetensors" for number in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*shards, "trace.json"]


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def cut_shard(folder: Path) -> None:
    cut_off(folder / "shard_00002.safetensors")


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda folder: flip_a_bit(folder / "shard_00001.safetensors", -1), "shard_00001.safetensors is damaged, its"),
        (cut_shard, "shard_00002.safetensors is damaged"),
        (lambda folder: (folder / "shard_00000.safetensors").unlink(), "shard_00000.safetensors cannot be read"),
        (lambda folder: (folder / "trace.json").unlink(), "no finished trace, trace.json is missing: collect one"),
        (lambda folder: cut_off(folder / "trace.json"), "trace.json cannot be used .JSONDecodeError"),
        (lambda folder: (folder / "trace.json").write_text("[]"), "trace.json must hold a JSON object, got list"),
        (lambda folder: change_index(folder, lambda index: index.update(shards=[])), "its checksum differs"),
        (lambda folder: change_index(folder, lambda index: index.update(format=2), True), "it has format 2"),
        (lambda folder: change_index(folder, leave_the_folder, True), "it names '../a.safetensors', which is no"),
        (lambda folder: change_index(folder, forget_a_layer, True), "does not hold what the index says, layer_001"),
    ],
)
def test_damage_is_named(damage, text, tmp_path):
    random_trace(tmp_path)
    damage(tmp_path)
    for verify in (True, False) if damage is cut_shard else (True,):
        with pytest.raises(ValueError, match=text if verify else "shard_00002.safetensors cannot be read"):
            RoutingTrace.open(tmp_path, verify=verify)


def change_index(folder: Path, change, sign: bool = False) -> None:
    path = folder / "trace.json"
    index = json.loads(path.read_text())
    change(index)
    if sign:
        index["checksum"] = checksum_of_json(index)
    path.write_text(json.dumps(index))


def leave_the_folder(index: dict) -> None:
    index["shards"][0]["file"] = "../a.safetensors"


def forget_a_layer(index: dict) -> None:
    index["description"]["layers"].pop()


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    trace = random_trace(tmp_path / "whole")
    writer = TraceWriter(tmp_path / "part", trace.description)
    writer.begin()
    arrays = load_file(trace.folder / trace.shards[0].file)
    with pytest.raises(ValueError, match="which its description does not ask for"):
        writer.write(0, "prose", {"token_ids": arrays["token_ids"]})
    writer.write(0, "prose", arrays)
    with pytest.raises(ValueError, match="lacks shard 1 of 2: call collect_routing again"):
        writer.finish(2)
    (tmp_path / "part" / "unfinished.json").write_text("{")
    with pytest.raises(ValueError, match="unfinished.json cannot be used .JSONDecodeError"):
        TraceWriter(tmp_path / "part", trace.description).begin()
