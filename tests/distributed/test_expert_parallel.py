"""31 experts on 2 and 4 ranks, which no number of ranks divides: the step of one process, and whole checkpoints."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_moe_cpt.arguments import ParallelArguments, parallel_options
from hf_moe_cpt.kernels.cross_entropy import fuse_head
from hf_moe_cpt.kernels.expert_parallel import overlap_shared_experts
from hf_moe_cpt.model_arguments import ModelArguments
from hf_moe_cpt.modeling.modeling_cpt_moe import experts_per_rank, with_padding
from hf_moe_cpt.trainers.common.distributed import ShardedModelCallback, keep_own_gradients
from tests.distributed.jobs import HAS_EP, OURS, STEPS
from tests.helpers import cpt_runs
from tests.helpers.forked_ranks import on_ranks
from tests.helpers.rank_runs import open_model, save_model
from tests.helpers.tiny_models import VOCABULARY
from tests.helpers.tiny_moes import CONFIGS
from tests.helpers.tolerances import relative_rms_error


pytestmark = pytest.mark.skipif(not HAS_EP, reason="expert parallelism needs transformers 5.23 and torch 2.13")
CELLS = [(num_ranks, name) for num_ranks, steps in STEPS.items() for name in steps]
SHORT = {"fsdp_size": 2, "ep_size": 2, "fsdp_mixed_precision": True, **OURS}
DEALT = {2: [16, 15], 4: [8, 8, 8, 7]}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks, name", CELLS, ids=[name for _, name in CELLS])
def test_a_step_is_that_of_one_process_and_what_is_saved_is_whole(results_of, num_ranks, name):
    job, ranks = STEPS[num_ranks][name], results_of(num_ranks)[name]["ranks"]
    limit = 3e-2 if job.get("bf16") else 4e-6
    for rank in ranks:
        assert rank["errors"].keys() >= {"logits", "model.layers.0.mlp.experts.down_proj", "lm_head.weight"}
        assert max(rank["errors"].values()) < limit, rank["errors"]
        assert rank["is_saved_whole"]  # without padding and to the bit
    held, parts = [rank["experts"] for rank in ranks], DEALT[job["sizes"]["ep_size"]]
    copies = len(ranks) // len(parts)
    if job["sizes"].get("dp_replicate_size", 1) == copies:  # every copy holds every expert
        assert held == parts * copies
    else:  # the ranks of a copy share its experts once more
        assert held == [8, 8, 8, 7] and sum(held) == 31
    assert sum(ranks[0]["tokens"]) == 4 * 16 * 3  # no pair is lost, none goes to padding
    assert len(ranks[0]["tokens"]) == len(parts)


def test_padding_adds_zeros_and_passes_gradients():
    weight = torch.randn(3, 2, 4, requires_grad=True)
    padded = with_padding(weight, 5)
    assert padded.shape == (5, 2, 4)
    assert torch.equal(padded[:3], weight) and not padded[3:].any()
    padded.square().sum().backward()
    assert relative_rms_error(weight.grad, 2 * weight.detach()) < 1e-7
    assert with_padding(weight, 3) is weight


@pytest.mark.parametrize("num_ranks, parts", [(1, [31]), (2, [16, 15]), (4, [8, 8, 8, 7]), (8, [4] * 7 + [3])])
def test_parts_differ_by_one_expert_at_most(num_ranks, parts):
    dealt = experts_per_rank(31, num_ranks)
    assert [min(dealt, 31 - first) for first in range(0, 31, dealt)] == parts


def test_a_rank_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"5 experts on ep_size=4 ranks, 2 on each .* choose a smaller ep_size"):
        experts_per_rank(5, 4)


def test_the_style_is_known_to_transformers():
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    from hf_moe_cpt.modeling.configuration_cpt_moe import PADDED_SHARD, CptMoeConfig

    assert PADDED_SHARD in CptMoeConfig.base_model_ep_plan.values()
    assert PADDED_SHARD in ALL_PARALLEL_STYLES


def dealt_and_whole(folder, kind, parallel):
    """A model of a family whose experts are dealt to the ranks by our exchange, and the same on each rank."""
    path = folder / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[kind]()).save_pretrained(path)  # of the first rank
    dist.barrier()
    training = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    asked = parallel_options(ParallelArguments(**parallel), training)
    return AutoModelForCausalLM.from_pretrained(path, **asked), AutoModelForCausalLM.from_pretrained(path)


def step_and_answers(folder, kind):
    """Errors of a step with shared experts beside the transfer, whether answers agree, blocks that overlap."""
    dealt, whole = dealt_and_whole(folder, kind, {"ep_size": dist.get_world_size()})
    blocks, own, rank = overlap_shared_experts(dealt), keep_own_gradients(dealt), dist.get_rank()
    assert own == len([part for part in dealt.modules() if hasattr(part, "_exchange")]) > 0
    rows = torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(5))
    for model, mine in ((dealt, rows.chunk(dist.get_world_size())[rank]), (whole, rows)):
        for _ in range(2):  # the gradients of micro-batches add up
            model.train()(input_ids=mine, labels=mine).loss.backward()
    pairs = zip(dealt.named_parameters(), whole.parameters(), strict=True)
    errors = {name: relative_rms_error(mine.grad.full_tensor(), other.grad) for (name, mine), other in pairs}
    prompt = rows[rank : rank + 1, : 4 + 3 * rank]  # of another length on each rank
    told = [
        model.eval().generate(prompt, max_new_tokens=6 - 2 * rank, do_sample=False, synced_gpus=model is dealt)
        for model in (dealt, whole)
    ]
    return errors, told[0].equal(told[1]), blocks


def fused_step(folder, sizes):
    """Errors of a loss and its gradients that the fused head of a dealt model computed; whether without logits."""
    path, rank = folder / "model", dist.get_rank()
    dealt, whole = open_model(path, sizes), open_model(path, None)
    fuse_head(dealt)
    rows = torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(5))
    mine = rows.chunk(dist.get_world_size())[rank]
    for _ in range(2):  # the first pass learns what the model does to its logits
        dealt.zero_grad()
        out = dealt.train()(input_ids=mine, labels=mine)
        out.loss.backward()
    whole.train()(input_ids=rows, labels=rows).loss.backward()
    pairs = zip(dealt.named_parameters(), whole.parameters(), strict=True)
    errors = {name: relative_rms_error(mine.grad.full_tensor(), other.grad) for (name, mine), other in pairs}
    loss = whole(input_ids=mine, labels=mine).loss
    return {**errors, "loss": relative_rms_error(out.loss, loss)}, out.logits is None


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2, **OURS}], ids=["FSDP2", "EP"])
def test_the_head_of_a_dealt_model_is_fused(sizes, tmp_path):
    save_model(tmp_path)
    for errors, is_without_logits in on_ranks(2, tmp_path / "ranks", fused_step, tmp_path, sizes):
        assert max(errors.values()) < 4e-6, errors
        assert is_without_logits


@pytest.mark.slow
@pytest.mark.parametrize("kind, overlaps", [("qwen2_moe", 2), ("deepseek_v3", 1)])
def test_models_of_others_train_and_answer(kind, overlaps, tmp_path):
    """Five experts of one family on two ranks are padded; a family that calls shared experts last has them beside."""
    for errors, agrees, blocks in on_ranks(2, tmp_path / "ranks", step_and_answers, tmp_path, kind):
        assert max(errors.values()) < 4e-6, errors
        assert agrees and blocks == overlaps


def adapted_run(folder, targets, sharded):
    """Losses of a run of an adapter on some layers, and its weights as they are saved; or why it is refused."""
    out = folder / f"out {dist.get_world_size()}"
    torch.manual_seed(0)
    model = open_model(folder / "model", sharded)
    adapter = ModelArguments("model", use_peft=True, lora_target_modules=targets, lora_dropout=0.0)
    try:
        trainer = cpt_runs.trainer(out, adapter.adapted(model), per_device_train_batch_size=8 // dist.get_world_size())
    except ValueError as error:
        return str(error), None
    trainer.train()
    trainer.save_model(out)
    return cpt_runs.logged(trainer.state.log_history, "lm_loss"), load_file(out / "adapter_model.safetensors")


@pytest.mark.slow
def test_an_adapter_of_other_layers_trains_as_in_one_process_and_of_experts_is_refused(tmp_path):
    save_model(tmp_path)
    sharded, attention = {"fsdp_size": 2, "ep_size": 2, **OURS}, ["q_proj", "v_proj"]
    losses, weights = on_ranks(1, tmp_path / "one", adapted_run, tmp_path, attention, None)[0]
    for got, saved in on_ranks(2, tmp_path / "two", adapted_run, tmp_path, attention, sharded):
        assert got == pytest.approx(losses, rel=1e-6) and len(got) == 6
        assert saved.keys() == weights.keys()
        assert all(relative_rms_error(saved[name], weight) < 1e-4 for name, weight in weights.items())
    for refusal, _ in on_ranks(2, tmp_path / "refused", adapted_run, tmp_path, ["experts"], sharded):
        assert "mlp.experts are dealt to ranks and have an adapter: adapt other layers" in refusal


def gates_of_rank(folder):
    """The gates that experts of a dealt model under bfloat16 are given in a training step."""
    model, given = open_model(folder / "model", SHORT), []
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    ShardedModelCallback().on_train_begin(args, None, None, model=model)
    exchange = model.model.layers[0].mlp.experts._exchange
    forward = exchange.experts_forward
    exchange.experts_forward = lambda rows, ids, gates: (given.append(gates.detach()), forward(rows, ids, gates))[1]
    rows = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(input_ids=rows, labels=rows).loss
    loss.backward()
    return given[0]


@pytest.mark.slow
def test_gates_are_not_rounded(tmp_path):
    """As on one device, where autocast leaves them in float32."""
    save_model(tmp_path)
    for gates in on_ranks(2, tmp_path / "ranks", gates_of_rank, tmp_path):
        assert gates.dtype == torch.float32 and not gates.equal(gates.bfloat16().float())
