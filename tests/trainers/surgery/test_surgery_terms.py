"""Every term against full logits of transformers in float64, value and gradient; and nothing ascends a penalty."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional

from hf_moe_cpt.trainers.surgery.forget_losses import FORGET_LOSSES, ForgetSettings
from hf_moe_cpt.trainers.surgery.objective import TERMS
from hf_moe_cpt.trainers.surgery.pair_losses import PAIR_LOSSES
from hf_moe_cpt.trainers.surgery.reference import LiveReference
from hf_moe_cpt.trainers.surgery.routers import RouterTap
from hf_moe_cpt.trainers.surgery.set_mixture import WINNER
from hf_moe_cpt.trainers.surgery.surgery_terms import RouterPull, SurgeryTerms
from tests.helpers.tiny_models import VOCABULARY, tiny_model
from tests.helpers.tolerances import RELATIVE_RMS_LIMIT, assert_matches


LENGTHS, COUNTED_FROM = (9, 4, 6), (1, 3, 2)
MOES = ("mixtral", "cpt_moe")
TARGET = 3.9  # about the loss of these models: some tokens and texts are above, some below
LIMIT = RELATIVE_RMS_LIMIT[torch.float32]


def _model(kind, moved=False, **changes):
    model = tiny_model(kind, **changes).double().eval()
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters() if moved else ():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _texts(seed):
    """Three texts of unequal length whose first tokens do not count."""
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(9)
    attended = places < torch.tensor(LENGTHS)[:, None]
    counts = attended & (places >= torch.tensor(COUNTED_FROM)[:, None])
    return {"input_ids": ids, "attention_mask": attended.long(), "completion_mask": counts}


def _terms(losses=None, reference=None, **options):
    live = (
        None
        if reference is None
        else LiveReference(reference, Accelerator(cpu=True), with_routers="routers" in options)
    )
    return SurgeryTerms(losses or {}, ForgetSettings(target=TARGET), live, chunk_tokens=4, **options)


def _logp(model, batch):
    """Of all words, (B, S - 1, V), by transformers alone."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1].log_softmax(-1)


def _of_next(model, batch):
    return _logp(model, batch).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]


def _mean(values, batch, normalization):
    """Row by row, token by token, as the sheet says it."""
    rows = [row[counts] for row, counts in zip(values, batch["completion_mask"][:, 1:], strict=True)]
    return torch.stack([row.mean() for row in rows]).mean() if normalization == "sequence" else torch.cat(rows).mean()


def _gradients(value, model):
    """Of every weight by name, 0 where the value does not depend on it."""
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    named = zip(model.named_parameters(), found, strict=True)
    return {name: torch.zeros_like(weight) if one is None else one for (name, weight), one in named}


def _assert_same(got, want, model):
    """Up to float32, in which norms of transformers and the shares of tokens are computed."""
    assert_matches("value", got, want, LIMIT)
    gradients = _gradients(want, model)
    for name, gradient in _gradients(got, model).items():
        assert_matches(name, gradient, gradients[name], LIMIT)


@pytest.mark.parametrize("kind", ["llama", *MOES])
@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_update_is_the_cross_entropy(kind, normalization):
    model, batch = _model(kind), _texts(1)
    term = _terms(normalization=normalization).of("update", model, batch)
    want = _mean(-_of_next(model, batch), batch, normalization)
    _assert_same(term.loss, want, model)
    assert term.extra is None and list(term.measures) == ["update/ce"]
    assert float(term.measures["update/ce"]) == pytest.approx(want.item(), rel=1e-6)


def _by_hand(name, logp, ref_logp):
    """The forget loss of one text from its tokens' log-probabilities (n,)."""
    tau, n, nll = TARGET, len(logp), -logp
    if name == "ga":
        return -nll.mean()
    if name == "cap":
        return -nll.clamp(max=tau).mean()
    if name == "seqcap":
        return -nll.mean().clamp(max=tau)
    if name == "aim":
        return (nll.mean() - tau) ** 2 / (2 * tau)
    if name == "expcap":
        return -tau * (1 - (-nll / tau).exp()).mean()
    if name == "npo":
        return -2 / (0.1 * n) * functional.logsigmoid(0.1 * (ref_logp.sum() - logp.sum()))
    if name == "simnpo":
        return -2 / 4.5 * functional.logsigmoid(4.5 * (nll.mean() - tau))
    if name == "wga":
        return -(logp.exp().detach() * nll).mean()
    if name == "satimp":
        p = logp.exp().detach()
        return -(p**5 * (1 - p) * nll).mean()
    if name == "unlikelihood":
        return -torch.log1p(-logp.exp()).mean()
    raise KeyError(f"{name} has no definition here: write one")


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", FORGET_LOSSES)
@pytest.mark.parametrize("forgotten", ["unlearn", "obsolete"])
def test_forgetting_is_its_loss_of_each_text(kind, name, forgotten):
    model, before, batch = _model(kind, moved=True), _model(kind), _texts(2)
    term = _terms({forgotten: FORGET_LOSSES[name]}, before).of(forgotten, model, batch)
    counts = batch["completion_mask"][:, 1:]
    logps, ref_logps = (_of_next(one, batch) for one in (model, before))
    rows = [_by_hand(name, *(one[row][counts[row]] for one in (logps, ref_logps.detach()))) for row in range(3)]
    _assert_same(term.loss, torch.stack(rows).mean(), model)
    assert term.extra is None
    assert float(term.measures[f"{forgotten}/ce"]) == pytest.approx(_mean(-logps, batch, "sequence").item(), rel=1e-6)
    assert float(term.measures[f"{forgotten}/loss"]) == pytest.approx(term.loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_winner_wins_over_what_is_forgotten(name):
    model, before, batch, winner = _model("llama", moved=True), _model("llama"), _texts(2), _texts(3)
    term = _terms({"obsolete": PAIR_LOSSES[name]}, before).of("obsolete", model, {**batch, WINNER: winner})
    rows = []
    sums = [
        (_of_next(model, text) - _of_next(before, text).detach(), text["completion_mask"][:, 1:])
        for text in (winner, batch)
    ]
    for row in range(3):
        won, lost = (gain[row][counts[row]].sum() for gain, counts in sums)
        rows.append(-2 / (0.1 * int(sums[1][1][row].sum())) * functional.logsigmoid(0.1 * (won - lost)))
    _assert_same(term.loss, torch.stack(rows).mean(), model)


@pytest.mark.parametrize("kind", ["llama", *MOES])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_an_anchor_is_the_divergence_from_the_model_before(kind, direction, normalization):
    model, before, batch = _model(kind, moved=True), _model(kind), _texts(4)
    terms = _terms(reference=before, kl_direction=direction, normalization=normalization)
    for name in ("retain", "neighbour"):
        term = terms.of(name, model, batch)
        logp, ref_logp = _logp(model, batch), _logp(before, batch).detach()
        pair = (ref_logp, logp) if direction == "forward" else (logp, ref_logp)
        want = _mean((pair[0].exp() * (pair[0] - pair[1])).sum(-1), batch, normalization)
        _assert_same(term.loss, want, model)
        assert term.extra is None and list(term.measures) == [f"{name}/kl"]
    assert terms.of("retain", before, batch).loss.item() == 0.0


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("name", TERMS)
def test_shares_of_micro_batches_add_up_to_the_mean(name, normalization):
    model, before, whole = _model("llama", moved=True), _model("llama"), _texts(5)
    terms = _terms(dict.fromkeys(("unlearn", "obsolete"), FORGET_LOSSES["cap"]), before, normalization=normalization)
    counts = whole["completion_mask"][:, 1:]
    total = counts.any(1).sum() if normalization == "sequence" else counts.sum()
    parts = [{key: value[place] for key, value in whole.items()} for place in (slice(0, 1), slice(1, 3))]
    shares = [terms.of(name, model, part, total) for part in parts]
    _assert_same(sum(share.loss for share in shares), terms.of(name, model, whole).loss, model)
    for key, value in terms.of(name, model, whole).measures.items():
        assert float(sum(share.measures[key] for share in shares)) == pytest.approx(value.item(), rel=1e-6)


# ---- mixtures of experts: penalties of the routers ----

PENALISED = {
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 5.0},
    "cpt_moe": {"output_router_logits": True, "router_aux_loss_coef": 5.0, "router_z_loss_coef": 2.0},
}


def _own_loss(model, batch):
    """What the model itself calls its loss, with cross entropy and penalties of the routers."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(~batch["completion_mask"], -100)
    return model(**inputs, labels=labels, output_router_logits=True).loss


@pytest.mark.parametrize("kind", MOES)
@pytest.mark.parametrize("losses", [*FORGET_LOSSES, *PAIR_LOSSES])
def test_no_forget_term_holds_a_penalty_of_routers(kind, losses):
    """With coefficients that would dominate: the gradient is that of the same model without any."""
    loss = {**FORGET_LOSSES, **PAIR_LOSSES}[losses]
    batch = {**_texts(2), WINNER: _texts(3)}
    found = {}
    for name, changes in (
        ("with", PENALISED[kind]),
        ("without", {key: 0.0 for key in PENALISED[kind] if "coef" in key}),
    ):
        model = _model(kind, moved=True, **changes).train()
        term = _terms({"unlearn": loss}, _model(kind), penalised_set="unlearn").of("unlearn", model, batch)
        assert term.extra is None
        found[name] = _gradients(term.loss, model)
    for name, gradient in found["with"].items():
        assert torch.equal(gradient, found["without"][name]), name
    if losses == "ga":  # the test can fail: to ascend on the model's own loss is something else
        model = _model(kind, moved=True, **PENALISED[kind]).train()
        ascended = _gradients(-_own_loss(model, batch), model)
        gates = [name for name in ascended if "gate.weight" in name]
        assert gates and all(not torch.allclose(ascended[name], found["with"][name], rtol=0.1) for name in gates)


@pytest.mark.parametrize("kind", MOES)
def test_penalties_are_descended_on_once(kind):
    """The gradient of a whole surgery is that of its terms plus the penalty of one set, with a positive sign."""
    model, before = _model(kind, moved=True, **PENALISED[kind]).train(), _model(kind)
    batches = {name: _texts(10 + place) for place, name in enumerate(TERMS)}
    losses = dict.fromkeys(("unlearn", "obsolete"), FORGET_LOSSES["ga"])
    terms = _terms(losses, before, penalised_set="update", normalization="token")
    parts = [terms.of(name, model, batches[name]) for name in TERMS]
    assert [part.extra is not None for part in parts] == [name == "update" for name in TERMS]
    got = sum(part.loss + (0.0 if part.extra is None else part.extra) for part in parts)
    crosses = {name: _mean(-_of_next(model, batches[name]), batches[name], "token") for name in TERMS}
    penalty = _own_loss(model, batches["update"]) - crosses["update"]
    kl = [
        _mean((ref.exp() * (ref - now)).sum(-1), batches[name], "token")
        for name in ("retain", "neighbour")
        for ref, now in [(_logp(before, batches[name]).detach(), _logp(model, batches[name]))]
    ]
    want = -crosses["unlearn"] - crosses["obsolete"] + crosses["update"] + sum(kl) + penalty
    assert penalty.item() > 1.0
    _assert_same(got.double(), want, model)


@pytest.mark.parametrize("kind", MOES)
def test_an_anchor_pays_the_penalty_where_nothing_is_learnt(kind):
    model, batch = _model(kind, moved=True, **PENALISED[kind]).train(), _texts(1)
    term = _terms(reference=_model(kind), penalised_set="retain").of("retain", model, batch)
    cross = _mean(-_of_next(model, batch), batch, "token")
    _assert_same((cross + term.extra).double(), _own_loss(model, batch), model)


@pytest.mark.parametrize("kind", MOES)
def test_routers_are_pulled_to_their_old_selves(kind):
    model, before, batch = _model(kind, moved=True), _model(kind), _texts(1)
    pull = RouterPull(RouterTap(model), anchor=0.7)
    terms = _terms(reference=before, routers=pull, normalization="token")
    term = terms.of("retain", model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    pairs = [model(**inputs, output_router_logits=True).router_logits]
    pairs.append(copy.deepcopy(before)(**inputs, output_router_logits=True).router_logits)
    counts = functional.pad(batch["completion_mask"][:, 1:], (0, 1)).flatten()
    layers = [
        functional.kl_div(now.log_softmax(-1), old.detach().log_softmax(-1), log_target=True, reduction="none").sum(-1)
        for now, old in zip(*pairs, strict=True)
    ]
    want = torch.stack([layer.flatten()[counts].mean() for layer in layers]).mean()
    _assert_same(term.extra.double(), 0.7 * want.double(), model)
    assert float(term.measures["retain/router_kl"]) == pytest.approx(want.item(), rel=1e-6)
    assert terms.of("update", model, batch).extra is None


@pytest.mark.parametrize("kind", MOES)
def test_forgotten_text_is_pulled_to_the_target_experts(kind):
    model, batch = _model(kind, moved=True), _texts(2)
    pull = RouterPull(RouterTap(model), expert_anchor=0.3, targets=[(0, 1), (0, 2), (1, 0)])
    terms = _terms({"unlearn": FORGET_LOSSES["ga"]}, routers=pull)
    pulled = _gradients(terms.of("unlearn", model, batch).extra, model)
    term = terms.of("unlearn", model, batch)
    plain = _terms({"unlearn": FORGET_LOSSES["ga"]}).of("unlearn", model, batch)
    _assert_same(term.loss, plain.loss, model)
    assert term.extra.item() == pytest.approx(0.3 * float(term.measures["unlearn/experts"]))
    gates = [name for name in pulled if name.endswith("gate.weight")]
    assert len(gates) == 2 and all(pulled[name].abs().max() > 0 for name in gates)
