"""The deduplicated exchange against experts that nobody dealt, in float64: outputs, every gradient, 1 to 4 ranks.

Among the ranks is one without a token, and among the choices of another case some that leave ranks without work.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_moe_cpt.kernels import expert_parallel
from hf_moe_cpt.kernels.experts import plain_experts
from hf_moe_cpt.kernels.routing import combine_rows
from hf_moe_cpt.modeling.modeling_cpt_moe import plain_sinkhorn_plan, sinkhorn_plan
from tests.helpers.expert_layers import DEVICE
from tests.helpers.forked_ranks import on_ranks
from tests.helpers.tolerances import assert_matches, relative_rms_error


pytestmark = pytest.mark.skipif(expert_parallel.EPImplementationInterface is None, reason="transformers before 5.23")
E, K, H, WIDTH = 8, 3, 16, 8
TOKENS = (13, 0, 7, 5)  # of each rank
EXACT = 1e-13  # float64


class Experts(nn.Module):
    """Experts first to last of E, as the definition runs them; others' ids add nothing."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.num_experts = last - first
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("up", (E, 2 * WIDTH, H)), ("down", (E, H, WIDTH))):
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(weight[first:last].clone()))

    def forward(self, tokens: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return plain_experts(tokens, index, gates, self.up, self.down, "silu")


def batch(rank: int, lonely: bool) -> list[torch.Tensor]:
    """Tokens, choices, gates, and what outputs are multiplied by. lonely: one token that all ranks send to rank 0."""
    generator = torch.Generator().manual_seed(7 + rank)
    rows = 1 if lonely else TOKENS[rank]
    x, pull = torch.randn(2, rows, H, generator=generator, dtype=torch.float64)
    index = torch.rand(rows, E, generator=generator).topk(K).indices
    index = torch.arange(2).expand(rows, 2) if lonely else index
    return [x, index, torch.rand(index.shape, generator=generator, dtype=torch.float64), pull]


def gradients(run, experts: nn.Module, given: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and the gradients of tokens, gates and weights."""
    x, index, gates, pull = given
    x, gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    y = run(x, index, gates)
    (y * pull).sum().backward()
    weights = {name: weight.grad.clone() for name, weight in experts.named_parameters()}
    return {"y": y.detach(), "tokens": x.grad, "gates": gates.grad, **weights}


def dealt() -> tuple[Experts, expert_parallel.DeduplicatedEP]:
    """This rank's experts and their exchange."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = dist.init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    experts = Experts(rank * E // ranks, (rank + 1) * E // ranks)
    return experts, expert_parallel.DeduplicatedEP(experts, mesh["ep"], mesh["tp"])


def step_of_rank(lonely: bool, recomputed: bool, everywhere: bool) -> tuple[dict[str, torch.Tensor], int]:
    """What a rank gets, and how many exchanges its step took."""
    experts, exchange = dealt()
    if everywhere:
        expert_parallel.MOST_SPARED, exchange.most_tokens = 1.0, max(TOKENS)

    def again(*args: torch.Tensor) -> torch.Tensor:
        options = {"use_reentrant": False, "context_fn": expert_parallel.keep_exchanges}
        return checkpoint(exchange, *args, **options)

    with CommDebugMode() as counted:
        found = gradients(again if recomputed else exchange, experts, batch(dist.get_rank(), lonely))
    return found, sum(counted.get_comm_counts().values())


CASES = {
    "alone": (1, False, False, False),
    "two": (2, False, False, False),
    "four, recomputed": (4, False, True, False),
    "all to one": (4, True, False, False),
    "all to all": (4, False, False, True),
    "all to all, recomputed": (2, False, True, True),
}


@pytest.mark.parametrize("ranks, lonely, recomputed, everywhere", CASES.values(), ids=CASES)
def test_exchange_matches_undistributed_experts(ranks, lonely, recomputed, everywhere, tmp_path):
    found = on_ranks(ranks, tmp_path / "ranks", step_of_rank, lonely, recomputed, everywhere)
    whole = Experts(0, E)
    summed = {}
    for rank, (got, exchanges) in enumerate(found):
        whole.zero_grad()
        want = gradients(whole, whole, batch(rank, lonely))
        for name in ("y", "tokens", "gates"):
            assert got[name].shape == want[name].shape
            assert not want[name].numel() or relative_rms_error(got[name], want[name]) < EXACT, name
        summed = {name: summed.get(name, 0) + want[name] for name in ("up", "down")}
        # counts, labels, rows and back; then back, rows and gates: recomputation adds none
        assert exchanges == (6 if everywhere else 7)
    for name, want in summed.items():
        assert relative_rms_error(torch.cat([got[name] for got, _ in found]), want) < EXACT


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_definition_matches_undistributed_experts(ranks):
    whole, parts = Experts(0, E), [Experts(rank * E // ranks, (rank + 1) * E // ranks) for rank in range(ranks)]
    x, index, gates, _ = zip(*(batch(rank, False) for rank in range(ranks)), strict=True)
    rows = []

    def run(rank, tokens, *labels):
        rows.append(len(tokens))
        return parts[rank](tokens, *labels)

    got = expert_parallel.plain_expert_parallel(x, index, gates, run, E // ranks)
    for mine, tokens, chosen, gate in zip(got, x, index, gates, strict=True):
        assert not len(tokens) or relative_rms_error(mine, whole(tokens, chosen, gate)) < EXACT
    owners = [{rank for rank in (row // (E // ranks)).tolist()} for chosen in index for row in chosen]
    assert sum(rows) == sum(map(len, owners))  # once to each rank, however many of its experts were chosen


def test_sums_of_copies_and_copies_are_adjoint():
    places = torch.tensor([[0, 2], [-1, -1], [1, -1]])  # of three tokens on two ranks; the second travels nowhere
    token = torch.tensor([0, 2, 0])
    x, copies = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    there = expert_parallel._Copies.apply(x, token, places, False)
    back = expert_parallel._Copies.apply(copies, token, places, True)
    assert torch.allclose((there * copies).sum(), (x * back).sum())


def test_the_kernel_of_a_gpu_adds_up_the_same_copies():
    places = torch.tensor([[0, 2], [-1, -1], [1, -1]], dtype=torch.int32)
    copies = torch.randn(3, 20)
    got = combine_rows(copies.to(DEVICE), places.view(-1).to(DEVICE), None, 2)
    assert_matches("sums", got, expert_parallel._add_up(copies, places))


def kernels_of_rank() -> dict[str, torch.Tensor]:
    """The step of a rank whose experts, Qwen3-MoE's, run in our kernels; keys with a / are of all experts."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = dist.init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    torch.manual_seed(1)
    experts = {}
    for name, held, implementation in (("whole", E, "eager"), ("mine", E // ranks, "hf_moe_cpt")):
        config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=WIDTH, num_experts=held)
        config._experts_implementation = implementation
        experts[name] = Qwen3MoeExperts(config)
    for weight, mine in zip(experts["whole"].parameters(), experts["mine"].parameters(), strict=True):
        nn.init.normal_(weight)
        mine.data.copy_(weight.data[rank * E // ranks : (rank + 1) * E // ranks])
    found: dict[str, torch.Tensor] = {}
    experts["mine"]._is_expert_parallel = True
    exchange = expert_parallel.DeduplicatedEP(experts["mine"], mesh["ep"], mesh["tp"])
    for mark, run, part in (("", exchange, experts["mine"]), ("/", experts["whole"], experts["whole"])):
        given = [value if number == 1 else value.float() for number, value in enumerate(batch(2 * rank, False))]
        found |= {name + mark: value for name, value in gradients(run, part, given).items()}
    return found


def test_kernels_run_the_experts_of_a_rank(tmp_path):
    found = on_ranks(2, tmp_path / "ranks", kernels_of_rank)
    for name in ("y", "tokens", "gates"):
        assert_matches(name, found[0][name], found[0][f"{name}/"])
    for name in ("gate_up_proj", "down_proj"):
        want = sum(rank[f"{name}/"] for rank in found)
        assert_matches(name, torch.cat([rank[name] for rank in found]), want)


def test_sinkhorn_plan_of_ranks_is_that_of_all_tokens(tmp_path):
    logits = 3 * torch.randn(7, 4, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, True, False, True])

    def rows_of_rank() -> torch.Tensor:
        mine = slice(0, 2) if dist.get_rank() == 0 else slice(2, 7)
        return sinkhorn_plan(logits[mine], 3, mask[mine], over_all_ranks=True)

    got = torch.cat(on_ranks(2, tmp_path / "ranks", rows_of_rank))
    assert relative_rms_error(got, plain_sinkhorn_plan(logits, 3, mask)) < EXACT
