"""The trainer against TRL's losses, a computation from full logits, and itself under other references and batches."""

import inspect

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from hf_moe_cpt.trainers.rainbowpo.objective import LINKS
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer
from tests.helpers.preference_runs import losses, pairs, saved_model, settings, trainer, word_tokenizer
from tests.helpers.tiny_models import VOCABULARY


def _moved(model, seed: int = 1) -> None:
    """Change a policy, so that it differs from its reference, in the same way at every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _batch(run, rows: int = 4) -> dict[str, torch.Tensor]:
    names = {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"}
    data = [{k: v for k, v in row.items() if k in names or k.startswith("score")} for row in run.train_dataset]
    return run.data_collator(data[:rows])


def _loss_and_gradient(run, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    run.model.train()
    run.model.zero_grad()
    loss = run._compute_loss(run.model, _batch(run, rows), False)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


def _trl(folder, loss_type: str, beta: float, kind: str = "llama") -> DPOTrainer:
    args = DPOConfig(**settings(folder / "trl"), loss_type=[loss_type], beta=beta)
    model = saved_model(folder, kind)
    return DPOTrainer(model, args=args, train_dataset=pairs(16), processing_class=word_tokenizer())


PARITY = {  # preset -> TRL's loss, its beta, factor of the loss
    "ln-dpo": ("sigmoid_norm", 10.0, 1.0),
    "dpo": ("sigmoid", 0.1, 1.0),
    "ipo": ("ipo", 0.7, 0.7**2),
}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("preset", PARITY)
def test_the_presets_that_trl_has_are_trls(tmp_path, preset, kind):
    loss_type, beta, factor = PARITY[preset]
    theirs = _trl(tmp_path, loss_type, beta, kind)
    ours = trainer(tmp_path, saved_model(tmp_path, kind), preset=preset, beta=beta)
    for run in (theirs, ours):
        run.aux_loss_enabled = run.aux_loss_enabled and factor == 1.0  # the factor is of the preference alone
        _moved(run.model)
    (want, want_gradient), (got, gradient) = _loss_and_gradient(theirs), _loss_and_gradient(ours)
    assert got == pytest.approx(factor * want.item(), rel=1e-6)
    torch.testing.assert_close(gradient, factor * want_gradient, rtol=1e-5, atol=1e-6)


def _from_full_logits(model, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities (2B, S - 1) of the tokens, entropies and mask, in float64, from the whole logits."""
    logits = model.double()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logp = functional.log_softmax(logits, dim=-1)
    tokens = logp.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return tokens, -(logp.exp() * logp).sum(-1), batch["completion_mask"][:, 1:].double()


def _expected(run, batch) -> float:
    """The objective as it is printed, from two fresh copies of the model and full logits."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(run.model.config._name_or_path) for _ in range(2))
    policy.load_state_dict(run.model.state_dict())
    args = run.args
    tokens, _, mask = _from_full_logits(policy, batch)
    ref_tokens, entropies, _ = _from_full_logits(reference, batch)
    length = mask.sum(1)
    of, ref = (
        (values * mask).sum(1) / (length if args.length_normalization else 1) for values in (tokens, ref_tokens)
    )
    entropy = ((entropies * mask).sum(1) / length / torch.tensor(float(VOCABULARY)).double().log()).view(2, -1).mean(0)
    phi = -run.dispersion_scale * entropy.log() if args.contextual_scaling == "mallows" else 1.0
    policy_gap, reference_gap = (values.view(2, -1)[0] - values.view(2, -1)[1] for values in (of, ref))
    margin = policy_gap - args.mixing_alpha * reference_gap - (1 - args.mixing_alpha) * args.home_advantage
    return LINKS[args.link](args.beta * phi * margin).mean().item()


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("length_normalization", [True, False])
@pytest.mark.parametrize("alpha, scaling", [(0.25, "mallows"), (0.0, "mallows"), (1.0, "none"), (0.0, "none")])
def test_loss_is_that_of_the_full_logits(tmp_path, link, length_normalization, alpha, scaling):
    run = trainer(
        tmp_path,
        link=link,
        length_normalization=length_normalization,
        mixing_alpha=alpha,
        contextual_scaling=scaling,
        beta=2.0 if length_normalization else 0.2,
    )
    run._calibrate()
    _moved(run.model)
    run.model.train()
    got = run._compute_loss(run.model, _batch(run), False).item()
    assert got == pytest.approx(_expected(run, _batch(run)), rel=2e-5)


def test_no_reference_is_loaded_or_asked_where_none_is_used(tmp_path):
    run = trainer(tmp_path, preset="simpo", beta=2.0, simpo_gamma=1.0)
    assert run.ref_model is None
    calls = []
    run.model.register_forward_hook(lambda *_: calls.append(1))
    run.model.train()
    run._compute_loss(run.model, _batch(run), False)
    assert len(calls) == 1
    mask, batch = _batch(run)["completion_mask"][:, 1:], _batch(run)
    tokens, _, _ = _from_full_logits(AutoModelForCausalLM.from_pretrained(saved_model(tmp_path)), batch)
    means = ((tokens * mask).sum(1) / mask.sum(1)).view(2, -1)
    simpo = -functional.logsigmoid(2.0 * (means[0] - means[1]) - 1.0).mean()  # Meng et al. 2024, equation 6
    assert run._compute_loss(run.model, batch, False).item() == pytest.approx(simpo.item(), rel=1e-5)


def test_every_kind_of_reference_gives_the_same_losses(tmp_path):
    plain = trainer(tmp_path / "plain", saved_model(tmp_path))
    plain.train()
    want = losses(plain.state.log_history)
    assert len(want) == 2 and want[0] != want[1]

    cached = trainer(tmp_path / "cached", saved_model(tmp_path), precompute_ref_log_probs=True)
    assert cached.ref_model is None
    cached.train()
    assert losses(cached.state.log_history) == pytest.approx(want, rel=1e-5)
    again = trainer(tmp_path / "again", saved_model(tmp_path), precompute_ref_log_probs=True)
    assert again.train_dataset["ref_chosen_logps"][:] == cached.train_dataset["ref_chosen_logps"][:]

    given = AutoModelForCausalLM.from_pretrained(saved_model(tmp_path))
    explicit = trainer(tmp_path / "explicit", saved_model(tmp_path), ref_model=given)
    explicit.train()
    assert losses(explicit.state.log_history) == pytest.approx(want, rel=1e-6)
    assert explicit.dispersion_scale == pytest.approx(plain.dispersion_scale, rel=1e-6)

    halves = trainer(
        tmp_path / "halves", saved_model(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    halves.train()
    assert losses(halves.state.log_history) == pytest.approx(want, rel=1e-5)


def test_an_adapter_is_switched_off_for_the_reference(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = trainer(tmp_path / "a", saved_model(tmp_path), peft_config=lora)
    assert adapted.ref_model is None
    _moved(adapted.model)
    full = trainer(tmp_path / "b", adapted.model.get_base_model().config._name_or_path)
    batch, reference = (
        _batch(adapted),
        [run.compute_ref_log_probs(run.ref_model or run.model, _batch(run)) for run in (adapted, full)],
    )
    torch.testing.assert_close(reference[0], reference[1])
    for run in (adapted, full):
        run._calibrate()
    merged = adapted.model.merge_and_unload(safe_merge=True)
    full.model.load_state_dict(merged.state_dict())
    full.model.train()
    merged_loss = full._compute_loss(full.model, batch, False).item()
    again = trainer(tmp_path / "c", saved_model(tmp_path), peft_config=lora)
    _moved(again.model)
    again._calibrate()
    again.model.train()
    assert again._compute_loss(again.model, batch, False).item() == pytest.approx(merged_loss, rel=1e-5)


def test_router_penalty_enters_once_and_outside_of_the_link(tmp_path):
    path = saved_model(tmp_path, "mixtral", output_router_logits=True)
    run = {coef: trainer(tmp_path, path, router_aux_loss_coef=coef) for coef in (0.0, 0.5)}
    loss = {}
    for coef, each in run.items():
        each._calibrate()
        each.model.train()
        loss[coef] = each._compute_loss(each.model, _batch(each), False).item()
    logged = run[0.5].meters["train"].pop()
    assert loss[0.5] - loss[0.0] == pytest.approx(0.5 * logged["aux_loss"], rel=1e-4)
    assert logged["loss/preference"] + logged["loss/aux"] == pytest.approx(loss[0.5], rel=1e-6)
    assert logged["aux_loss"] > 0
    run[0.5].model.eval()
    without = run[0.5]._compute_loss(run[0.5].model, _batch(run[0.5]), False).item()
    assert without == pytest.approx(loss[0.0], rel=1e-5)  # never in the evaluation loss


def test_calibration_makes_phi_one_on_the_training_pairs_and_is_kept(tmp_path):
    run = trainer(tmp_path, saved_model(tmp_path), max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    phi = [entry["phi/mean"] for entry in run.state.log_history if "phi/mean" in entry]
    assert len(phi) == 4  # one epoch of 16 pairs
    assert sum(phi) / 4 == pytest.approx(1.0, rel=1e-5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"Scale of phi: {run.dispersion_scale:.4g}" in card

    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = trainer(tmp_path, saved_model(tmp_path), pairs(16), max_steps=4, dispersion_scale="auto")
    resumed.compute_ref_log_probs = None  # calibrating again would need it; so does the loss
    with pytest.raises(TypeError):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.dispersion_scale == run.dispersion_scale
    whole = trainer(tmp_path, saved_model(tmp_path), max_steps=4)
    whole.train(resume_from_checkpoint=str(checkpoint))
    assert losses(whole.state.log_history) == pytest.approx(losses(run.state.log_history), rel=1e-6)


def test_scores_and_lengths_are_home_advantages(tmp_path):
    data = pairs(16, scores=True)
    odpo = trainer(
        tmp_path, saved_model(tmp_path), data, preset="odpo", beta=0.5, home_advantage=2.0, score_transform="identity"
    )
    rdpo = trainer(tmp_path, saved_model(tmp_path), data, preset="r-dpo", beta=0.5, home_advantage=0.1)
    dpo = trainer(tmp_path, saved_model(tmp_path), data, preset="dpo", beta=0.5)
    for run in (odpo, rdpo, dpo):
        run.train()
    # At the first step policy and reference agree, so the margin is the advantage alone.
    first = next(iter(dpo.get_train_dataloader()))
    margin = {name: run.state.log_history[0]["margin/effective"] for name, run in (("odpo", odpo), ("rdpo", rdpo))}
    length = first["completion_mask"].sum(1).view(2, -1).double()
    assert dpo.state.log_history[0]["margin/effective"] == pytest.approx(0.0, abs=1e-5)
    assert margin["rdpo"] == pytest.approx(0.1 * (length[0] - length[1]).mean().item(), rel=1e-4)
    scores = next(iter(odpo.get_train_dataloader()))["scores"]
    assert margin["odpo"] == pytest.approx(-2.0 * (scores[:, 0] - scores[:, 1]).mean().item(), rel=1e-4)


def test_evaluation_reports_under_its_own_names(tmp_path):
    run = trainer(tmp_path, saved_model(tmp_path), eval_dataset={"a": pairs(6, seed=1), "b": pairs(6, seed=2)})
    metrics = run.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_a_rewards/margins", "eval_b_phi/mean"} <= metrics.keys()
    assert metrics["eval_a_loss"] == pytest.approx(metrics["eval_a_loss/preference"], rel=1e-5)


def test_signatures_of_what_is_overridden_are_those_of_this_trl():
    want = {
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
        "compute_ref_log_probs": ["self", "model", "inputs"],
        "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
        "_set_signature_columns_if_needed": ["self"],
        "log": ["self", "logs", "start_time"],
    }
    for name, parameters in want.items():
        assert list(inspect.signature(getattr(DPOTrainer, name)).parameters) == parameters
        assert list(inspect.signature(getattr(RainbowPOTrainer, name)).parameters) == parameters
    assert "outputs" in inspect.signature(add_fused_lm_head).parameters
    source = inspect.getsource(DPOTrainer.__init__)
    assert source.index("self.ref_model = create_model_from_path") < source.index("add_fused_lm_head(self.ref_model)")
