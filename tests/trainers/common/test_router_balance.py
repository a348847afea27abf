"""The balancing switch against formulas written down in loops, in float64, on routing that transformers reports."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DbrxConfig, DbrxForCausalLM, TrainerCallback

from hf_moe_cpt.trainers.common.router_balance import (
    BIAS_FILE,
    RouterBalance,
    RouterBalanceArguments,
    bias_update,
    load_router_bias,
)
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from tests.helpers.cpt_runs import config
from tests.helpers.tiny_models import SIZES, tiny_model, tokenized
from tests.helpers.tiny_moes import moe_model, padded_batch


PENALISED = (
    "cpt_moe gpt_oss granitemoe jamba jetmoe llama4 mixtral olmoe qwen2_moe qwen3_moe qwen3_next qwen3_5_moe".split()
)
SORTED_BY_LOGITS = {"jetmoe", "llama4"}  # no experts module is told the choice


class Settings(RouterBalanceArguments):
    """The switch alone, with its defaults."""

    def __init__(self, **changes) -> None:
        vars(self).update(changes)


def routing(model: nn.Module, kind: str, batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer the logits that transformers reports, and the experts that its modules are called with."""
    chosen = []
    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    experts = [] if kind in SORTED_BY_LOGITS else experts
    hooks = [module.register_forward_pre_hook(lambda _, args: chosen.append(args[1])) for module in experts]
    logits = model.base_model(**batch, output_router_logits=True).router_logits
    for hook in hooks:
        hook.remove()
    if kind in SORTED_BY_LOGITS:
        chosen = [z.topk(1 if kind == "llama4" else 2).indices for z in logits]
    return [(z.reshape(-1, z.shape[-1]), index) for z, index in zip(logits, chosen, strict=True)]


def count(index: torch.Tensor, keep: list[bool], experts: int) -> list[int]:
    """How often each expert was chosen by the tokens that count, one by one."""
    counts = [0] * experts
    for row, is_kept in zip(index.tolist(), keep, strict=True):
        for expert in row:
            counts[expert] += is_kept
    return counts


def penalty_of(z: torch.Tensor, counts: list[int], keep: list[bool]) -> torch.Tensor:
    """E sum_i f_i P_i of one layer, as the formula is printed."""
    kept = z[torch.tensor(keep)]
    g = (kept - kept.max(-1, keepdim=True).values).exp()
    P = (g / g.sum(-1, keepdim=True)).sum(0) / len(kept)
    return sum(len(counts) * (count / sum(counts)) * P[expert] for expert, count in enumerate(counts))


def gradients(value: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    weights = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return {name: grad for name, grad in zip(weights, found, strict=True) if grad is not None}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert any(grad.abs().max() > 1e-6 for grad in want.values())
    for name in got.keys() | want.keys():
        none = torch.zeros_like(got.get(name, want.get(name)))
        pair = got.get(name, none), want.get(name, none)
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", PENALISED)
def test_the_penalty_of_every_family_is_the_formula_of_each_layer(kind):
    """Gradients too; and the model's own penalty is gone, though its configuration switches it on."""
    model, batch = moe_model(kind).double().train(), padded_batch()
    model.config.get_text_config().output_router_logits = True
    keep = batch["attention_mask"].flatten().bool().tolist()
    balance = RouterBalance(Settings(router_aux_loss_coef=0.7, router_z_loss_coef=0.3), model)
    with balance.observe(batch):
        out = model(**batch, labels=batch["input_ids"], **balance.switched_off)
    got = balance.added_to(torch.zeros((), dtype=torch.float64))
    layers = routing(model, kind, batch)
    assert len(layers) == len(balance.layers)
    want = sum(0.7 * penalty_of(z, count(index, keep, z.shape[-1]), keep) for z, index in layers)
    want = want + sum(0.3 * z[torch.tensor(keep)].exp().sum(-1).log().square().mean() for z, _ in layers)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert_same(gradients(got, model), gradients(want, model))
    if getattr(out, "lm_loss", None) is None:
        logits = model(**batch, **balance.switched_off).logits[:, :-1].flatten(0, 1)
        plain = nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())
        assert out.loss.item() == pytest.approx(plain.item(), rel=1e-5)


# ---- an optimizer step of a trainer ----

DOCUMENTS = tokenized(60, 1)


class Gradient(TrainerCallback):
    """Keeps the gradients of the first step as they come to the optimizer."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.found = {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def one_step(folder: Path, model: nn.Module, batch: int, accumulation: int, **changes) -> tuple[CPTTrainer, dict]:
    """A trainer after one step of 16 blocks of 16 tokens, and the gradients of it."""
    settings = {"packing": "concat", "replay_ratio": 0.0, "eval_on_start": False, "max_steps": 1, "max_grad_norm": 0.0}
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    keeper = Gradient()
    run = CPTTrainer(model, config(folder, **settings, **sizes, **changes), DOCUMENTS, callbacks=[keeper])
    run.train()
    return run, keeper.found


def mixtral() -> nn.Module:
    """Its configuration is changed after it was built, as a user does it: the model's own coefficient stays 0.001."""
    model = tiny_model("mixtral", output_router_logits=True).double()
    model.set_experts_implementation("eager")
    model.config.router_aux_loss_coef = 0.05
    return model


@pytest.mark.parametrize(
    ("batch", "accumulation"), [(4, 4), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((16, 1), (1, 16)))]
)
def test_the_penalty_enters_a_step_once_however_the_batch_is_split(tmp_path, batch, accumulation):
    """With a load that counts over the micro-batches so far; and in the direction of that of the whole batch.

    The gradient of the penalty is the difference of two runs.
    """
    run, with_it = one_step(tmp_path / "with", mixtral(), batch, accumulation)
    _, without = one_step(tmp_path / "without", mixtral(), batch, accumulation, router_balance="none")
    got = {name: with_it[name] - without[name] for name in with_it}
    blocks, model = torch.stack([torch.as_tensor(run.mixture[i]["input_ids"]) for i in range(16)]), mixtral().train()

    def penalty(parts: int) -> torch.Tensor:
        seen, total = None, 0.0
        for part in blocks.chunk(parts):
            layers = routing(model, "mixtral", {"input_ids": part})
            keep = [True] * part.numel()
            counts = [torch.tensor(count(index, keep, 4)) for _, index in layers]
            seen = counts if seen is None else [a + b for a, b in zip(seen, counts, strict=True)]
            total = total + sum(
                0.05 / parts * penalty_of(z, load.tolist(), keep) for (z, _), load in zip(layers, seen, strict=True)
            )
        return total

    assert_same(got, gradients(penalty(accumulation), model))
    whole = gradients(penalty(1), model)
    flat = [torch.cat([grads[name].flatten() for name in whole if "gate" in name]) for grads in (got, whole)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.9
    assert flat[0].norm() == pytest.approx(flat[1].norm().item(), rel=0.2)


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def test_checkpointing_counts_once_and_keeps_the_gradient(tmp_path):
    plain, want = one_step(tmp_path / "plain", mixtral(), 4, 4)
    again, got = one_step(tmp_path / "again", mixtral(), 4, 4, **CHECKPOINTED)
    assert_same(got, want)
    for key in ("aux_loss", "mri"):
        assert plain.state.log_history[0][key] == pytest.approx(again.state.log_history[0][key])


# ---- the bias ----


def test_the_bias_moves_against_the_load():
    """DeepSeek-V3, section 2.1.2: lowered where the load is above the mean, raised where it is below."""
    loads = torch.tensor([5, 2, 1, 0, 2])
    assert torch.equal(bias_update(loads, 0.25), torch.tensor([-0.25, 0.0, 0.25, 0.25, 0.0], dtype=torch.float64))


BIASED = {
    "deepseek_v3": "model.layers.1.mlp.gate.e_score_correction_bias",
    "glm4_moe": "model.layers.1.mlp.gate.e_score_correction_bias",
    "cpt_moe": "model.layers.1.mlp.gate.e_score_correction_bias",
}


def _biased(kind: str) -> nn.Module:
    return tiny_model("cpt_moe", router_type="bias_topk") if kind == "cpt_moe" else moe_model(kind)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "glm4_moe")) for kind in BIASED]
)
def test_biases_move_once_a_step_by_the_load_of_all_micro_batches(tmp_path, kind):
    model, loads = _biased(kind), []
    experts = model.get_submodule(BIASED[kind].replace("gate.e_score_correction_bias", "experts"))
    width = experts.num_experts

    def hear(module: nn.Module, args: tuple) -> None:
        if module.training:
            loads.append(torch.bincount(args[1].flatten(), minlength=width))

    experts.register_forward_pre_hook(hear)
    run, found = one_step(tmp_path / "run", model, 4, 4, save_strategy="steps", save_steps=1)
    bias = model.state_dict()[BIASED[kind]]
    load = sum(loads).double()
    torch.testing.assert_close(bias, (1e-3 * (load.mean() - load).sign()).float())
    assert len(loads) == 4 and bias.abs().max() > 0 and BIASED[kind] not in found
    assert run.state.log_history[0]["bias_range"] == pytest.approx(2e-3)
    run.evaluate(DOCUMENTS)
    assert torch.equal(model.state_dict()[BIASED[kind]], bias)

    again = CPTTrainer(_biased(kind), config(tmp_path / "run", **_of(run), max_steps=1), DOCUMENTS)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(again.model.state_dict()[BIASED[kind]], bias)


def _of(run: CPTTrainer) -> dict:
    names = "packing replay_ratio eval_on_start per_device_train_batch_size gradient_accumulation_steps max_grad_norm"
    return {name: getattr(run.args, name) for name in names.split()} | {"save_strategy": "steps", "save_steps": 1}


def test_biases_in_half_precision_and_of_an_adapter_are_kept(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["o_proj"])
    first, second = (peft.get_peft_model(_biased("deepseek_v3").to(torch.bfloat16), lora) for _ in range(2))
    run, _ = one_step(tmp_path / "run", first, 4, 1, save_strategy="steps", save_steps=1)
    (bias,) = run.balance.biases().values()
    assert bias.dtype == torch.float32 and bias.abs().max() == pytest.approx(1e-3)
    other = _biased("deepseek_v3")
    assert (tmp_path / "run" / "checkpoint-1" / BIAS_FILE).is_file()
    load_router_bias(other, tmp_path / "run" / "checkpoint-1")
    assert torch.equal(other.state_dict()[BIASED["deepseek_v3"]], bias)
    again = CPTTrainer(second, config(tmp_path / "run", **_of(run), max_steps=1), DOCUMENTS)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(found, bias) for found in again.balance.biases().values())


# ---- what is decided, and refused ----


def _dbrx(weight: float) -> nn.Module:
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32, "vocab_size": SIZES["vocab_size"]}
    ffn = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": weight}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4}
    return DbrxForCausalLM(DbrxConfig(**sizes, attn_config=attention, ffn_config=ffn, output_router_logits=True))


DECISIONS = {
    "the configuration's": (lambda: tiny_model("mixtral", router_aux_loss_coef=0.02), {}, "aux", 0.02),
    "DBRX's": (lambda: _dbrx(0.05), {}, "aux", 0.05),
    "JetMoE's": (lambda: moe_model("jetmoe"), {}, "aux", 0.01),
    "chosen by nobody": (lambda: tiny_model("mixtral"), {}, "aux", 0.01),
    "none in the configuration": (lambda: tiny_model("mixtral", router_aux_loss_coef=0.0), {}, "aux", 0.01),
    "too large": (lambda: tiny_model("mixtral", router_aux_loss_coef=0.9), {}, "aux", 0.01),
    "given": (lambda: tiny_model("mixtral"), {"router_balance": "aux", "router_aux_loss_coef": 0.5}, "aux", 0.5),
    "given as 0": (lambda: tiny_model("mixtral"), {"router_aux_loss_coef": 0.0}, "none", 0.0),
    "none": (lambda: moe_model("deepseek_v3"), {"router_balance": "none"}, "none", 0.0),
    "bias": (lambda: moe_model("deepseek_v3"), {}, "bias", 0.0),
    "sinkhorn": (lambda: tiny_model("cpt_moe sinkhorn"), {}, "sinkhorn", 0.0),
    "ours": (lambda: tiny_model("cpt_moe", router_aux_loss_coef=0.3), {}, "aux", 0.3),
    "ours without": (lambda: tiny_model("cpt_moe", router_aux_loss_coef=0.0), {}, "none", 0.0),
    "dense": (lambda: tiny_model("llama"), {}, "none", 0.0),
    "frozen": (lambda: moe_model("deepseek_v3").requires_grad_(False), {}, "none", 0.0),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_what_auto_means_for_a_model(name):
    build, changes, way, coefficient = DECISIONS[name]
    balance = RouterBalance(Settings(**changes), build())
    assert (balance.decision.way, balance.decision.coefficient) == (way, coefficient)
    shown = {"aux": f"router_aux_loss_coef={coefficient:g}", "bias": "router_bias_update_rate=0.001"}
    assert shown.get(way, "") in str(balance)


REFUSED = {
    "penalty of 0": ({"router_balance": "aux", "router_aux_loss_coef": 0.0}, "mixtral", "balances nothing"),
    "both": ({"router_balance": "bias", "router_aux_loss_coef": 0.1}, "deepseek_v3", "set one of the two"),
    "both, unsaid": (
        {"router_aux_loss_coef": 0.1},
        "deepseek_v3",
        "router_balance='aux' alone, and the routers of DeepseekV3ForCausalLM are balanced by bias",
    ),
    "penalty beside a bias": ({"router_balance": "aux"}, "deepseek_v3", "set bias, auto or none"),
    "bias without one": ({"router_balance": "bias"}, "mixtral", "have neither a correction bias nor a plan"),
    "no plan": ({"router_balance": "sinkhorn"}, "mixtral", "set aux, auto or none"),
    "dense": ({"router_balance": "aux"}, "llama", "no routers of LlamaForCausalLM are known"),
    "unknown": ({"router_balance": "loss"}, "mixtral", "choose one of auto, aux, bias, sinkhorn, none"),
    "scope": ({"load_scope": "node"}, "mixtral", "choose one of global, rank"),
    "negative": ({"router_z_loss_coef": -1.0}, "mixtral", "must be a finite number, at least 0"),
    "unread": ({"load_scope": "rank"}, "deepseek_v3", "is read with router_balance='aux' alone"),
    "kept": ({"router_balance": "bias", "freeze": ["router"]}, "deepseek_v3", "which this run keeps fixed"),
    "still": ({"router_balance": "bias", "router_bias_update_rate": 0.0}, "deepseek_v3", "moves nothing"),
    "reentrant": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "mixtral",
        '"use_reentrant": False',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line_before_anything_is_computed(tmp_path, name):
    changes, kind, text = REFUSED[name]
    model = tiny_model(kind) if kind in ("mixtral", "llama") else moe_model(kind)
    with pytest.raises(ValueError, match=text) as error:
        CPTTrainer(model, config(tmp_path, replay_ratio=0.0, **changes), DOCUMENTS)
    assert "\n" not in str(error.value)


class _Unknown(nn.Module):
    """A mixture of experts in a form that nobody has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny_model("mixtral").config


def test_a_mixture_whose_routers_nobody_finds_says_how_to_go_on():
    with pytest.raises(ValueError, match="num_local_experts=4.*router_balance=.none."):
        RouterBalance(Settings(), _Unknown())
    assert RouterBalance(Settings(router_balance="none"), _Unknown()).decision.way == "none"
