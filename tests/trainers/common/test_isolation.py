"""Documents of a packed row and what a model makes of them: the probe, and training as if each document were alone.

Held against transformers' own forward of each document by itself, and against logits before and after a change.
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AttentionInterface

from hf_moe_cpt.data.packing import PackedDataset, stack_blocks
from hf_moe_cpt.trainers.common import isolation
from hf_moe_cpt.trainers.common.isolation import find_isolation
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from tests.helpers.cpt_runs import config, logged
from tests.helpers.tiny_models import VOCABULARY, tiny_model, tokenized
from tests.helpers.tiny_moes import CONFIGS, moe_model


RECURRENT = ("granitemoehybrid", "jamba hybrid", "nemotron_h", "qwen3_5_moe", "qwen3_next")
METHOD_OF = {
    **dict.fromkeys([*CONFIGS, "glm4_moe", "jetmoe", "mixtral", "cpt_moe", "cpt_moe sinkhorn"], "positions"),
    "gpt_oss": "masks",
    "gpt_oss sliding": "masks",
    **dict.fromkeys(RECURRENT, "padded"),  # without the kernels that take lengths
}


def varlen_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs):
    """Causal attention as kernels for flattened rows do it: it knows documents by their lengths alone."""
    ends = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = [
        nn.functional.scaled_dot_product_attention(
            *(states[:, :, begin:end] for states in (query, key, value)), is_causal=True, scale=scaling
        )
        for begin, end in zip(ends[:-1], ends[1:], strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def model_of(kind: str):
    if kind != "varlen":
        return moe_model(kind)
    AttentionInterface.register("varlen", varlen_attention)
    return tiny_model("llama", attn_implementation="varlen")


def leak_of(model, isolation) -> float:
    """The largest change of a logit of the second of two documents when the first changes."""
    documents = [[1 + i % 40 for i in range(9)], [3 * i % 45 + 1 for i in range(7)]]
    logits = []
    for first in (documents[0], [token + 2 for token in documents[0]]):
        data = Dataset.from_dict({"input_ids": [first, documents[1]] * 2})
        packing = "padded" if isolation is not None and isolation.method == "padded" else "document"
        batch = stack_blocks([PackedDataset(data, 16, packing)[i] for i in range(2)])
        batch.pop("labels")
        with torch.no_grad():
            found = model.eval()(**(batch if isolation is None else isolation(batch)), use_cache=False).logits
        logits.append(found[1, :7] if packing == "padded" else found.reshape(2, 16, -1)[:, 9:])
    return float((logits[0] - logits[1]).abs().max())


@pytest.mark.parametrize("kind, method", [*METHOD_OF.items(), ("varlen", "lengths")])
def test_what_is_chosen_keeps_documents_apart(kind, method):
    model = model_of(kind)
    assert (leak_of(model, None) > 1e-5) == (method != "positions")  # the fault: position_ids alone
    isolation = find_isolation(model, 64)
    assert isolation.method == method, str(isolation)
    assert leak_of(model, isolation) == 0.0


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_what_is_chosen_is_the_same_where_a_model_would_add_its_own_penalty(kind):
    model = model_of(kind)
    model.config.output_router_logits = True
    assert find_isolation(model, 64).method == METHOD_OF[kind]


@pytest.mark.parametrize("kind", [*METHOD_OF, "varlen"])
def test_a_batch_has_the_loss_of_its_documents_alone(tmp_path, kind):
    data, old = tokenized(12, 1), tokenized(9, 2)
    run = CPTTrainer(model_of(kind), config(tmp_path, replay_ratio=0.5, max_steps=1), data, old)
    batch = next(iter(run.get_train_dataloader()))
    nats, num_tokens = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    run.model.eval()
    for row, source in enumerate(batch["source"].tolist()):
        filled = batch["attention_mask"][row].sum() if "attention_mask" in batch else None
        ids = batch["input_ids"][row, :filled]
        begins = [0] if filled is not None else (batch["position_ids"][row] == 0).nonzero()[:, 0].tolist()
        for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
            with torch.no_grad():
                logits = run.model(ids[None, begin:end], use_cache=False).logits[0, :-1]
            nats[source] += nn.functional.cross_entropy(logits.double(), ids[begin + 1 : end], reduction="sum")
            num_tokens[source] += end - begin - 1
    assert num_tokens.min() > 0
    run.model.training = True  # alone: in training, routers that balance see more than a document
    with torch.no_grad():
        run.compute_loss(run.model, batch)
    want = dict(zip(("lm_loss/new", "lm_loss/replay"), (nats / num_tokens).tolist(), strict=True))
    want["lm_loss"] = float(nats.sum() / num_tokens.sum())
    assert run.source_losses.pop() == pytest.approx(want, rel=1e-5)


def test_the_probe_leaves_the_model_as_it_was():
    model = get_peft_model(tiny_model("mixtral"), LoraConfig(target_modules=["q_proj"], r=2, lora_dropout=0.5)).train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert find_isolation(model, 64).seen == {"positions": "moved by 0.0e+00"}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [pytest.param("gpt_oss", marks=pytest.mark.slow), "qwen3_next", "varlen"])
def test_runs_train_evaluate_and_say_how(tmp_path, kind):
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": True}
    run = CPTTrainer(
        model_of(kind),
        config(tmp_path, **settings, replay_ratio=0.0, gradient_checkpointing_kwargs={"use_reentrant": False}),
        tokenized(30, 1),
        eval_dataset=tokenized(9, 2),
    )
    run.train()
    assert all(
        0 < loss < 2 * torch.tensor(VOCABULARY).log() for loss in logged(run.state.log_history, "eval_new_loss")
    )
    assert len(logged(run.state.log_history, "lm_loss/new")) == 2
    how = {"gpt_oss": "packed rows, by masks", "qwen3_next": "one document a row, padded", "varlen": "by lengths"}
    assert how[kind] in str(run.isolation)
    assert run.args.packing == ("padded" if kind == "qwen3_next" else "document")


def test_documents_that_run_across_are_not_probed(tmp_path):
    run = CPTTrainer(moe_model("qwen3_next"), config(tmp_path, replay_ratio=0.0, packing="concat"), tokenized(30, 1))
    assert run.isolation is None and run.args.packing == "concat"


def test_flash_attention_that_waits_on_the_cpu_is_handed_lengths():
    def no_kernel(*args, **kwargs):
        raise RuntimeError("no kernel for the CPU")

    AttentionInterface.register("flash_elsewhere", no_kernel)
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_elsewhere"  # whose name transformers would look up
    isolation = find_isolation(model, 64)
    assert isolation.method == "lengths" and "flash_elsewhere does not run on the CPU" in str(isolation)
    assert model.config._attn_implementation == "flash_elsewhere"
    assert find_isolation(model, 64, ["positions", "masks"]).method == "padded"


@pytest.mark.parametrize("leaks, kept", [(False, "eager"), (True, "sdpa")])
def test_shards_get_another_attention_on_the_gpu_if_documents_stay_apart(monkeypatch, leaks, kept):
    model = tiny_model("mixtral")
    found = find_isolation(model, 64)
    leaky = isolation.Isolation(model, "padded" if leaks else "positions", {})
    monkeypatch.setattr(isolation, "is_sharded", lambda model: True)
    monkeypatch.setattr(isolation, "choose_attention", lambda model, *_: model.set_attn_implementation("eager"))
    monkeypatch.setattr(isolation, "find_isolation", lambda *_: leaky)
    isolation.AttentionOfShards(found, 64).on_train_begin(None, None, None, model=model)
    assert model.config._attn_implementation == kept
