"""The whole objective against the printed one and the authors' code, in float64 on tiny models; names and weights."""

import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_moe_cpt.trainers.surgery.anchor import chunked_kl
from hf_moe_cpt.trainers.surgery.counted_tokens import reduce_sequences, reduce_tokens
from hf_moe_cpt.trainers.surgery.forget_losses import DEFAULT_BETA, FORGET_LOSSES, ForgetLoss, ForgetSettings, wga
from hf_moe_cpt.trainers.surgery.objective import (
    PAPER_WEIGHTS,
    TERMS,
    check_weights,
    forget_loss_of,
    sequence_cross_entropy,
    surgery_objective,
)
from hf_moe_cpt.trainers.surgery.pair_losses import PAIR_LOSSES
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import CONFIGS, VOCABULARY
from tests.helpers.tolerances import assert_matches


LENGTHS = {"unlearn": (6, 9), "obsolete": (5, 5), "update": (9, 4), "retain": (8, 3)}


def _model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"](initializer_range=0.3)).double().eval()


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    return _model(1), _model(2).requires_grad_(False)


@pytest.fixture(scope="module")
def batches() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
        for name, lengths in LENGTHS.items()
    }


def _by_our_functions(
    models: tuple, batches: dict, weights: dict[str, float], direction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective with ga, from padded batches, and the retain KL in it."""
    model, reference = models
    terms = {}
    for name, texts in batches.items():
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        is_token = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS[name])[:, None]
        hidden, ref_hidden = (one.model(ids, attention_mask=is_token).last_hidden_state for one in models)
        if name == "retain":
            heads = model.lm_head.weight, reference.lm_head.weight
            kl = chunked_kl(hidden.flatten(0, 1), heads[0], ref_hidden.flatten(0, 1), heads[1], direction, 5)
            terms[name] = reduce_tokens(kl.view(ids.shape), is_token, "sequence")
            continue
        logp = model.lm_head(hidden)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        mask = is_token[:, 1:]
        loss = sequence_cross_entropy if name == "update" else lambda *inputs: FORGET_LOSSES["ga"](*inputs, None)
        terms[name] = reduce_sequences(loss(logp, mask), mask, "sequence")
    return surgery_objective(terms, weights), terms["retain"]


def _cross_entropy(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of one text alone, without padding."""
    return torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean()


def _same_up_to(got: torch.Tensor, want: torch.Tensor, constant: float, model: torch.nn.Module) -> None:
    assert got.item() == pytest.approx(want.item() - constant, rel=1e-10)
    parameters = list(model.parameters())
    for index, pair in enumerate(
        zip(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True)
    ):
        assert_matches(f"gradient {index}", *pair, 1e-9)


def test_with_ga_and_the_papers_weights_it_is_the_authors_code(models, batches):
    """Theirs adds the entropy of the reference, a constant: same gradient, other value at the start."""
    model, reference = models
    got, _ = _by_our_functions(models, batches, PAPER_WEIGHTS, "forward")
    cross_entropy = {name: _mean([_cross_entropy(model, ids) for ids in batches[name]]) for name in LENGTHS}
    anchors, entropies = [], []
    for ids in batches["retain"]:
        p, ref_p = model(ids[None]).logits[0].softmax(-1), reference(ids[None]).logits[0].softmax(-1)
        anchors.append(-(ref_p * p.log()).sum(-1).mean())
        entropies.append(-(ref_p * ref_p.log()).sum(-1).mean())
    want = -0.1 * cross_entropy["unlearn"] - 0.1 * cross_entropy["obsolete"] + 2.0 * cross_entropy["update"]
    _same_up_to(got, want + 0.5 * _mean(anchors), 0.5 * _mean(entropies).item(), model)


def test_with_ga_weights_of_one_and_reverse_kl_it_is_the_negative_of_the_printed_objective(models, batches):
    """J = CE(D_unl) - CE(D_upd) - KL(P || P_pre), to be maximised; the printed one has no set of old versions."""
    model, reference = models
    got, _ = _by_our_functions(models, batches, {"unlearn": 1.0, "update": 1.0, "retain": 1.0}, "reverse")
    cross_entropy = {name: _mean([_cross_entropy(model, ids) for ids in batches[name]]) for name in LENGTHS}
    divergences = []
    for ids in batches["retain"]:
        p, ref_p = model(ids[None]).logits[0].softmax(-1), reference(ids[None]).logits[0].softmax(-1)
        divergences.append((p * (p / ref_p).log()).sum(-1).mean())
    printed = cross_entropy["unlearn"] - cross_entropy["update"] - _mean(divergences)
    _same_up_to(got, -printed, 0.0, model)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_anchor_is_zero_before_the_first_step(models, batches, direction):
    model = models[0]
    _, anchor = _by_our_functions((model, model), batches, PAPER_WEIGHTS, direction)
    assert anchor.item() == 0.0
    gradient = torch.autograd.grad(anchor, model.lm_head.weight)[0]
    assert gradient.abs().max() < 1e-15


def test_a_term_without_weight_is_neither_needed_nor_read():
    terms = {"update": torch.tensor(3.0), "unlearn": torch.tensor(math.nan)}
    weights = {"update": 2.0, "unlearn": 0.0, "retain": 0.0}
    assert surgery_objective(terms, weights).item() == 6.0


def test_weights_that_mean_nothing_are_refused():
    check_weights(PAPER_WEIGHTS)
    assert set(PAPER_WEIGHTS) == set(TERMS)
    for weights, message in (
        ({"unlearn": -0.1}, r"unlearn_weight=-0.1 must be a finite number, at least 0: a forget loss already has the"),
        ({"update": math.inf}, "update_weight=inf must be a finite number"),
        ({"forget": 1.0}, "'forget' is no term of the objective: choose among unlearn, obsolete, update, retain, nei"),
        ({"update": 0.0}, "all weights are 0: give at least one set a weight above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            surgery_objective({"update": torch.zeros(())}, weights)
    with pytest.raises(ValueError, match="no term for unlearn, retain: compute it, or set its weight to 0"):
        surgery_objective({"update": torch.zeros(())}, PAPER_WEIGHTS | {"obsolete": 0.0})


def test_a_name_a_record_or_a_function_is_a_forget_loss():
    for name, record in (FORGET_LOSSES | PAIR_LOSSES).items():
        assert forget_loss_of(name) is record is forget_loss_of(record)

    def halved(logp, mask, settings, ref_logp):
        return wga(logp, mask, settings, ref_logp) / 2

    loss = forget_loss_of(halved)
    assert (loss.name, loss.is_bounded, loss.needs_reference) == ("halved", False, False)
    logp, mask = -torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(2 * loss(logp, mask, ForgetSettings()), wga(logp, mask, ForgetSettings()))
    bounded = ForgetLoss("mine", halved, is_bounded=True)
    assert forget_loss_of(bounded).is_bounded


@pytest.mark.parametrize("loss", ["gradient_ascent", None, 3])
def test_what_is_no_forget_loss_is_refused(loss):
    with pytest.raises(ValueError, match=r"forget_loss=.* is unknown: choose one of ga, cap, .*, pair_dpo, or give a"):
        forget_loss_of(loss)


def test_cross_entropy_of_a_sequence_is_that_of_transformers(models, batches):
    model, ids = models[0], batches["unlearn"][0]
    logp = model(ids[None]).logits[:, :-1].log_softmax(-1).gather(-1, ids[None, 1:, None]).squeeze(-1)
    got = sequence_cross_entropy(logp, torch.ones_like(logp, dtype=torch.bool))
    assert_matches("cross entropy", got, _cross_entropy(model, ids)[None])
    assert got.item() == pytest.approx(model(ids[None], labels=ids[None]).loss.item(), rel=1e-6)  # in float32


def test_the_page_has_the_row_of_every_loss():
    """docs/surgery_objective.md repeats the records; a loss that changes must change there too."""
    text = (PROJECT / "docs" / "surgery_objective.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` (\|.*)$", text, re.MULTILINE))
    for name, record in (FORGET_LOSSES | PAIR_LOSSES).items():
        cells = [cell.strip().replace("`", "") for cell in rows[name].strip("|").split("|")]
        assert cells[:3] == [record.formula, record.bound, record.gradient_weight]
        assert cells[4].startswith(record.source)
        assert name not in DEFAULT_BETA or f"b {DEFAULT_BETA[name]:g}" in cells[3]
