"""What is measured on fixed rows, against full logits row by row; the gap and the stop rules, case by case."""

import math
import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_moe_cpt.trainers.surgery.forget_losses import ForgetSettings
from hf_moe_cpt.trainers.surgery.reference import LiveReference
from hf_moe_cpt.trainers.surgery.set_mixture import eval_batches
from hf_moe_cpt.trainers.surgery.surgery_probe import measure, stop_reason, surgery_gap
from hf_moe_cpt.trainers.surgery.surgery_terms import SurgeryTerms
from tests.helpers.tiny_models import tiny_model, tokenized


NAMES = ("unlearn", "update", "retain", "unseen")


def _sets():
    rows = {name: tokenized(7, seed) for seed, name in enumerate(NAMES)}
    return {
        name: one.map(lambda row: {"completion_mask": [place >= 2 for place in range(len(row["input_ids"]))]})
        for name, one in rows.items()
    }


def _batches(sets):
    options = {"batch_size": 3, "pad_token_id": 0, "max_rows": 5, "seed": 0}
    return lambda name: eval_batches(sets[name], **options)


def _moved():
    model = tiny_model("llama", attention_dropout=0.5).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_measures_are_means_over_rows_or_tokens(normalization, direction):
    sets, model, before = _sets(), _moved().train(), tiny_model("llama").double().eval()
    reference = LiveReference(before, Accelerator(cpu=True))
    terms = SurgeryTerms({}, ForgetSettings(), reference, normalization, direction, chunk_tokens=4)
    got = measure(model, _batches(sets), list(NAMES), terms)
    assert model.training
    assert list(got) == ["unlearn_ce", "update_ce", "retain_ce", "retain_kl", "unseen_ce"]
    model.eval()
    for name in NAMES:
        values = {"ce": [], "kl": []}
        for place in [int(row) for batch in _batches(sets)(name) for row in batch["row"]]:
            ids = torch.tensor([sets[name][place]["input_ids"]])
            with torch.no_grad():
                logp, ref = (one(input_ids=ids).logits[0, :-1].log_softmax(-1) for one in (model, before))
            values["ce"].append(-logp.gather(-1, ids[0, 1:, None])[1:, 0])
            pair = (ref, logp) if direction == "forward" else (logp, ref)
            values["kl"].append((pair[0].exp() * (pair[0] - pair[1])).sum(-1)[1:])
        assert len(values["ce"]) == 5
        for kind in ("ce", "kl") if name == "retain" else ("ce",):
            rows = values[kind]
            means = torch.cat(rows) if normalization == "token" else torch.stack([row.mean() for row in rows])
            assert got[f"{name}_{kind}"] == pytest.approx(float(means.mean()), rel=1e-6), (name, kind)


def test_without_a_reference_there_are_losses_only():
    terms = SurgeryTerms({}, ForgetSettings(), None)
    got = measure(tiny_model("llama").eval(), _batches(_sets()), ["retain"], terms)
    assert list(got) == ["retain_ce"]


def test_ranks_without_rows_do_not_count():
    """A rank that has no rows left repeats some with nothing that counts."""
    sets = _sets()
    terms = SurgeryTerms({}, ForgetSettings(), None)
    model = tiny_model("llama").eval()

    def with_a_spare(name):
        yield from _batches(sets)(name)
        spare = next(iter(_batches(sets)(name)))
        yield {**spare, "completion_mask": torch.zeros_like(spare["completion_mask"])}

    assert measure(model, with_a_spare, ["update"], terms) == measure(model, _batches(sets), ["update"], terms)


def test_dropout_and_modes_are_left_alone():
    terms, sets = SurgeryTerms({}, ForgetSettings(), None), _sets()
    model = tiny_model("llama", attention_dropout=0.9).train()
    state = torch.get_rng_state()
    first, second = (measure(model, _batches(sets), ["update"], terms) for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules() if isinstance(module, nn.Module))
    assert all(parameter.grad is None for parameter in model.parameters())


MEASURED = {"unlearn_ce": 3.0, "obsolete_ce": 5.5, "update_ce": 1.25, "retain_kl": 0.2, "neighbour_kl": 0.05}


@pytest.mark.parametrize(
    "changes, rules, want",
    [
        ({}, (4.0, None, None), 1.0 + 1.5 + 1.25 + 0.25),
        ({}, (4.0, 1.0, None), 1.0 + 1.5 + 0.25 + 0.25),
        ({}, (4.0, 2.0, 0.3), 1.0 + 1.5 + 0.25),
        ({}, (None, 2.0, None), 0.25),
        ({}, (4.0, None, 0.1), math.inf),
        ({"retain_kl": -1e-8}, (None, 2.0, None), 0.05),
        ({"unlearn_ce": None, "obsolete_ce": None}, (4.0, 1.0, None), 0.25 + 0.25),
        ({"update_ce": None, "neighbour_kl": None}, (4.0, 1.0, None), 1.0 + 1.5 + 0.2),
    ],
)
def test_the_gap_is_the_sum_that_its_formula_says(changes, rules, want):
    measured = {name: value for name, value in {**MEASURED, **changes}.items() if value is not None}
    assert surgery_gap(measured, *rules) == pytest.approx(want)


@pytest.mark.parametrize(
    "changes, rules, want",
    [
        ({}, (4.0, 2.0, None), None),  # unlearn is below
        ({"unlearn_ce": 4.0}, (4.0, 2.0, None), "unlearn 4 nats .target 4., obsolete 5.5 nats .*, update 1.25 nats"),
        ({"unlearn_ce": 4.0}, (4.0, 1.0, None), None),  # update is not learnt
        ({"unlearn_ce": 4.0}, (4.0, None, None), None),  # and has no target
        ({"unlearn_ce": 4.0}, (None, 2.0, None), None),
        (
            {"unlearn_ce": 4.0, "update_ce": None},
            (4.0, None, None),
            "every set has reached its target: unlearn 4 nats",
        ),
        ({"unlearn_ce": None, "obsolete_ce": None}, (None, 2.0, None), "update 1.25 nats .target 2."),
        ({}, (4.0, 2.0, 0.1), "the KL on retained text is 0.2, above max_retain_kl=0.1"),
        ({"unlearn_ce": None, "obsolete_ce": None, "update_ce": None}, (4.0, 2.0, None), None),
    ],
)
def test_when_a_run_stops(changes, rules, want):
    measured = {name: value for name, value in {**MEASURED, **changes}.items() if value is not None}
    reason = stop_reason(measured, *rules)
    assert (reason is None) == (want is None)
    if want is not None:
        assert re.search(want, reason), reason
