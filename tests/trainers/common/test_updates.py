"""Updates that arrive, in all three trainers: the optimizer by the weights' type, what is lost, what decays, warm-up.

Compared with torch's AdamW, with float32 runs, and with what each family's configuration says its parameters are.
"""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, JambaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_moe_cpt.optim import adamw
from hf_moe_cpt.optim.adamw import StochasticAdamW
from hf_moe_cpt.optim.schedules import learning_rate_at
from hf_moe_cpt.trainers.common.updates import lost_share
from tests.helpers import cpt_runs, preference_runs, surgery_runs
from tests.helpers.tiny_models import CONFIGS, tiny_model
from tests.helpers.tiny_moes import moe_model


TRAINERS = {"cpt": cpt_runs.trainer, "rainbowpo": preference_runs.trainer, "surgery": surgery_runs.trainer}


@pytest.fixture(autouse=True)
def by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps by the definition: the interpreter runs the kernel slowly, and tests/optim holds the two together."""
    monkeypatch.setattr(adamw, "IS_INTERPRETED", False)


def half(kind: str = "llama") -> nn.Module:
    return tiny_model(kind).to(torch.bfloat16)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_takes_the_optimizer_that_the_weights_need(name: str, tmp_path: Path, caplog) -> None:
    if name == "rainbowpo":
        folder = preference_runs.saved_model(tmp_path)
        models = {dtype: LlamaForCausalLM.from_pretrained(folder, dtype=dtype) for dtype in ("float32", "bfloat16")}
    else:
        models = {"float32": tiny_model("llama"), "bfloat16": half()}
    made = {}
    for dtype, model in models.items():
        run = TRAINERS[name](tmp_path / dtype, model, adam_beta2=0.9, seed=7)
        made[dtype] = run.create_optimizer()
    assert type(made["float32"]) is torch.optim.AdamW and made["float32"].defaults["fused"]
    assert type(made["bfloat16"]) is StochasticAdamW
    assert made["bfloat16"].defaults["betas"] == (0.9, 0.9) and made["bfloat16"].defaults["seed"] == 7
    assert [group["weight_decay"] for group in made["bfloat16"].param_groups] == [run.args.weight_decay, 0.0]
    assert "are lost" not in caplog.text
    run = TRAINERS[name](tmp_path / "named", models["bfloat16"], optim="adamw_torch", learning_rate=1e-6)
    with caplog.at_level(logging.WARNING):
        assert type(run.create_optimizer()) is torch.optim.AdamW
    assert "optim=adamw_torch rounds to the nearest: on these bfloat16 weights at least" in caplog.text
    assert "learning_rate=1e-06 are lost" in caplog.text


@pytest.mark.parametrize("rate", [2e-5, 1e-4])
def test_lost_share_is_what_a_first_step_of_torchs_adamw_leaves_alone(rate: float) -> None:
    """The first step of Adam changes every weight by the rate."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((0.02 * torch.randn(4000, generator=generator)).to(torch.bfloat16))
    told, before = lost_share([weight], rate), weight.detach().clone()
    weight.grad = torch.where(torch.rand(4000, generator=generator) < 0.5, 1.0, -1.0).to(torch.bfloat16)
    torch.optim.AdamW([weight], lr=rate, weight_decay=0.0).step()
    assert 0 < told < 1
    assert told == pytest.approx((weight == before).float().mean().item(), abs=0.02)
    assert lost_share([weight.float()], rate) == 0.0


UNDECAYED = {  # ends of names, beside norms and biases
    "mixtral": {"embed_tokens.weight", "mlp.gate.weight"},
    "olmoe": {"embed_tokens.weight", "mlp.gate.weight"},
    "qwen2_moe": {"embed_tokens.weight", "mlp.gate.weight", "mlp.shared_expert_gate.weight"},
    "gpt_oss": {"embed_tokens.weight", "mlp.router.weight", "self_attn.sinks"},
    "deepseek_v3": {"embed_tokens.weight", "mlp.gate.weight"},
    "granitemoe": {"embed_tokens.weight", "router.weight"},
    "jamba": {"embed_tokens.weight", "router.weight", "mamba.A_log", "mamba.D"},
    "cpt_moe": {"embed_tokens.weight", "mlp.gate.weight"},
}


@pytest.mark.parametrize("kind", UNDECAYED)
def test_matrices_decay_and_nothing_else(kind: str, tmp_path: Path) -> None:
    if kind == "jamba":
        config = moe_model(kind).config.to_dict() | {"attn_layer_period": 2, "attn_layer_offset": 1}
        config.pop("layers_block_type", None), config.pop("layer_types", None)
        model = AutoModelForCausalLM.from_config(JambaConfig(**config))  # a layer of attention and one without
    else:
        model = tiny_model(kind) if kind in CONFIGS else moe_model(kind)
    decayed = cpt_runs.trainer(tmp_path, model, packing="concat").get_decay_parameter_names(model)
    spared = {name for name, _ in model.named_parameters()} - set(decayed)
    own = {name for name in spared if not any(word in name for word in ("norm", "bias"))}
    missing = {end for end in UNDECAYED[kind] if not any(name.endswith(end) for name in own)}
    extra = {name for name in own if not any(name.endswith(end) for end in UNDECAYED[kind])}
    assert (missing, extra) == (set(), set())
    assert all(model.get_parameter(name).ndim > 1 for name in decayed)
    assert any("experts" in name for name in decayed) and any("q_" in name or "qkv" in name for name in decayed)


@pytest.mark.parametrize("name", TRAINERS)
def test_label_smoothing_which_nothing_reads_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor=0.1 is not part of this objective: .*(leave it at|set label)"
    ):
        TRAINERS[name](tmp_path, label_smoothing_factor=0.1)


class OwnLoss(LlamaForCausalLM):
    """Computes its loss by itself, as remote code of the Hub does."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: object) -> CausalLMOutputWithPast:
        kwargs.pop("num_items_in_batch", None)
        logits = super().forward(input_ids, **kwargs).logits
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_model_that_computes_its_own_loss_is_evaluated_and_told_by_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own, usual = OwnLoss(CONFIGS["llama"]()), tiny_model("llama")
    own.load_state_dict(usual.state_dict())
    evaluated = [
        cpt_runs.trainer(tmp_path / name, model, evaluated=True, packing="concat").evaluate()
        for name, model in (("own", own), ("usual", usual))
    ]
    assert evaluated[0]["eval_new_loss"] == pytest.approx(evaluated[1]["eval_new_loss"], rel=1e-6)
    run = cpt_runs.trainer(tmp_path / "trained", own, packing="concat", max_steps=2)
    run.train()
    assert all(loss > 0 for loss in cpt_runs.logged(run.state.log_history, "lm_loss/replay"))


@pytest.mark.parametrize(("steps", "warmup"), [(5, 1), (30, 3), (49, 5), (300, 10), (5000, 50)])
def test_short_runs_warm_up_too(steps: int, warmup: int, tmp_path: Path) -> None:
    """A tenth of the run, at most 10 steps, where the paper's hundredth is less."""
    args = cpt_runs.config(tmp_path, max_steps=steps, learning_rate=1e-3)
    for phase in ("scratch", "decayed"):
        settings = args.schedule_settings(phase)
        rates = [learning_rate_at(step, **settings) for step in range(warmup + 1)]
        assert rates == pytest.approx([1e-3 * step / warmup for step in range(warmup + 1)])
    assert args.phases("constant").warmup == 0


@pytest.mark.slow
def test_a_resumed_run_of_bfloat16_weights_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3}
    straight = cpt_runs.trainer(tmp_path / "straight", half("mixtral"), **saved)
    straight.train()
    resumed = cpt_runs.trainer(tmp_path / "straight", half("mixtral"), **saved)
    resumed.train(str(tmp_path / "straight" / "checkpoint-3"))
    for want, got in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(want, got)


@pytest.mark.slow
def test_updates_of_bfloat16_weights_arrive(tmp_path: Path) -> None:
    """How far the weights go along the way of float32 weights, on the same batches: 1 if every update arrives."""
    start, ways = half().state_dict(), {}
    for name, dtype, optim in (
        ("float32", torch.float32, "auto"),
        ("stochastic", torch.bfloat16, "auto"),
        ("nearest", torch.bfloat16, "adamw_torch"),
    ):
        model = tiny_model("llama")
        model.load_state_dict(start)
        settings = {"learning_rate": 2e-5, "optim": optim, "replay_ratio": 0.0, "logging_steps": 6}
        run = cpt_runs.trainer(tmp_path / name, model.to(dtype), **settings)
        run.train()
        ended = run.model.state_dict()
        ways[name] = torch.cat([(ended[key].double() - start[key].double()).flatten() for key in start])
    wanted = ways["float32"]
    reached = {name: float(way @ wanted / (wanted @ wanted)) for name, way in ways.items()}
    assert reached["stochastic"] == pytest.approx(1, abs=0.15) and reached["nearest"] < 0.6, reached
