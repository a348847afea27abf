"""Two gloo processes: penalties equal one process with the whole batch; so do tensor and expert parallelism."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging.version import Version
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_moe_cpt  # noqa: F401  registers the model type in the spawned processes too
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from tests.helpers.tolerances import relative_rms_error


pytestmark = pytest.mark.slow


PLANS = {"tensor parallel": {"tp_size": 2}, "expert parallel": {"fsdp_size": 2, "ep_size": 2}}
ATTENTION = {
    "biases, norms of heads": {"qkv_bias": True, "qk_norm": "head", "num_key_value_heads": 2},
    "all biases, norms of projections": {"attention_bias": True, "qk_norm": "projection", "num_key_value_heads": 2},
}
PLANS |= {name: {"tp_size": 2} for name in ATTENTION}
if "ep_size" not in inspect.signature(DistributedConfig).parameters:  # before transformers 5.23
    del PLANS["expert parallel"]
if Version(torch.__version__) < Version("2.13"):  # torch 2.11 cannot gather the gradient of a packed shard
    PLANS.clear()


def penalised_model(load_scope: str) -> CptMoeForCausalLM:
    """The balance loss outweighs the rest, so that its scope shows."""
    torch.manual_seed(0)
    config = CptMoeConfig.from_preset(
        "pb-granular-tiny", vocab_size=64, num_hidden_layers=2, router_aux_loss_coef=10.0, load_scope=load_scope
    )
    return CptMoeForCausalLM(config).train()


def batch() -> torch.Tensor:
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(3))


def router_gradients(model: CptMoeForCausalLM) -> torch.Tensor:
    return torch.stack([layer.mlp.gate.weight.grad for layer in model.model.layers])


def gradients_of_a_half(rank: int, load_scope: str) -> torch.Tensor:
    """As data-parallel training does: each rank its rows, num_items over all ranks, gradients summed."""
    model, rows = penalised_model(load_scope), batch()
    mine = rows[2 * rank : 2 * rank + 2]
    model(input_ids=mine, labels=mine, num_items_in_batch=rows[:, 1:].numel()).loss.backward()
    gradients = router_gradients(model)
    dist.all_reduce(gradients)
    return gradients


def uneven_evaluation_ends(rank: int) -> bool:
    """Rank 0 evaluates one batch, rank 1 three: a collective in evaluation would hang."""
    model, rows = penalised_model("global").eval(), batch()
    return all(model(input_ids=rows, labels=rows, output_router_logits=True).aux_loss > 0 for _ in range(1 + 2 * rank))


def logits_and_gradients(model: CptMoeForCausalLM) -> dict[str, torch.Tensor]:
    """Of one training step on the whole batch, penalties included; gradients of the first layer, gathered."""
    rows = batch()
    out = model.train()(input_ids=rows, labels=rows)
    out.loss.backward()
    layer = model.model.layers[0]
    parameters = {
        "router": layer.mlp.gate.weight,
        "experts": layer.mlp.experts.gate_up_proj,
        "shared": layer.mlp.shared_experts.down_proj.weight,
        "query": layer.self_attn.q_proj.weight,
        **{name: value for name, value in layer.self_attn.named_parameters() if value.dim() == 1},
    }
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | whole


def sharded(folder: str, **sizes: int) -> dict[str, torch.Tensor]:
    config = DistributedConfig(**sizes)
    return logits_and_gradients(AutoModelForCausalLM.from_pretrained(folder, distributed_config=config))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {scope: gradients_of_a_half(rank, scope) for scope in ("global", "rank")}
    results["uneven"] = uneven_evaluation_ends(rank)
    for plan, sizes in PLANS.items():
        results[plan] = sharded(f"{folder}/{plan if plan in ATTENTION else 'plain'}", **sizes)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("two_ranks")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_experts": 8}
    for name, fields in {"plain": {}, **ATTENTION}.items():
        model = CptMoeForCausalLM(CptMoeConfig.from_preset("pb-granular-tiny", **sizes, **fields))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")  # gloo on the CPU, also where there is one GPU for two ranks
        mp.spawn(worker, args=(str(folder),), nprocs=2)
    names = {"plain", *ATTENTION}
    want = {name: logits_and_gradients(AutoModelForCausalLM.from_pretrained(folder / name)) for name in names}
    return [torch.load(folder / f"rank{rank}.pt") | {"single": want} for rank in range(2)]


def test_counts_over_all_ranks_give_the_gradients_of_one_process(results: list[dict]) -> None:
    model, rows = penalised_model("global"), batch()
    model(input_ids=rows, labels=rows, num_items_in_batch=rows[:, 1:].numel()).loss.backward()
    want = router_gradients(model)
    for result in results:
        assert relative_rms_error(result["global"], want) < 2e-6
        assert relative_rms_error(result["rank"], want) > 1e-2  # the scope matters here


def test_evaluation_has_no_collective(results: list[dict]) -> None:
    assert [result["uneven"] for result in results] == [True, True]


@pytest.mark.parametrize("plan", PLANS)
def test_parallel_plans_compute_the_same(plan: str, results: list[dict]) -> None:
    for result in results:
        single = result["single"][plan if plan in ATTENTION else "plain"]
        errors = {name: relative_rms_error(result[plan][name], want) for name, want in single.items()}
        assert max(errors.values()) < 4e-6, errors
