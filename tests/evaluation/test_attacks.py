"""Attacks on a model: rounding against its definition, relearning that learns, and a model that is left as it was."""

import numpy as np
import pytest
import torch

from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.evaluation import attacks
from hf_moe_cpt.evaluation.scoring import AskedQuestion, CountedText, EvalSettings, questions_of, score_options
from tests.helpers.tiny_models import tiny_model


# As QLoRA's authors publish them.
NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
       0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)  # fmt: skip


def _state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def test_four_bits_have_the_published_values_and_zeros_shape_and_type_stay():
    assert attacks.nf4_values() == pytest.approx(NF4, abs=1e-4) and attacks.nf4_values() == sorted(
        attacks.nf4_values()
    )
    weight = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    assert attacks.rounded(weight, 4).dtype == torch.bfloat16 and torch.equal(attacks.rounded(weight, 4), weight)
    with pytest.raises(ValueError, match="bits=3 is unknown: choose 4 or 8"):
        attacks.rounded(weight, 3)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_takes_the_nearest_value_of_each_block(bits):
    weight = torch.randn(5, 3 * attacks.BLOCK // 5 + 1, dtype=torch.float64) * 3  # the last block is not full
    got = attacks.rounded(weight, bits)
    values = torch.tensor(attacks.nf4_values() if bits == 4 else [step / 127 for step in range(-127, 128)]).double()
    flat = weight.flatten()
    for begin in range(0, len(flat), attacks.BLOCK):
        block = flat[begin : begin + attacks.BLOCK]
        scaled = values * block.abs().max()
        want = scaled[(block[:, None] - scaled).abs().argmin(1)]
        torch.testing.assert_close(got.flatten()[begin : begin + attacks.BLOCK], want, rtol=0, atol=1e-6)
    torch.testing.assert_close(attacks.rounded(got, bits), got, rtol=0, atol=1e-6)  # a rounded weight stays


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_layers_and_experts_are_rounded_but_neither_ends_nor_routers(kind):
    model = tiny_model(kind)
    before = _state(model)
    attacks.round_weights(model, 4)
    changed = {name for name, tensor in _state(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight") or name.endswith("_proj")}
    assert changed and not any(word in name for name in changed for word in ("embed", "lm_head", "norm", "mlp.gate."))


def test_everything_is_as_before_even_after_an_error():
    model = tiny_model("llama").bfloat16()
    model.lm_head.weight.requires_grad_(False)
    before = _state(model)
    with pytest.raises(RuntimeError, match="stop"):
        with attacks.restored_afterwards(model):
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.requires_grad_().data = tensor.data.float() + 1.0
            raise RuntimeError("stop")
    after = _state(model)
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad


def test_half_of_the_subjects_are_taught_and_without_questions_there_is_no_attack(bench, tokenizer):
    names = [name for name in "abcde" for _ in range(3)]
    taught = attacks.taught_subjects(names, 0)
    assert len(taught) == 3 and taught < set(names) and taught == attacks.taught_subjects(names, 0)
    assert attacks.taught_subjects([], 0) == set()
    empty = SurgeryBench(bench.documents, type(bench.questions)({k: v.select([]) for k, v in bench.questions.items()}))
    made = attacks.attack(tiny_model("llama", vocab_size=400), tokenizer, empty, EvalSettings(max_documents=1))
    assert set(made) == {"gradients"}  # which asks nothing


def test_half_of_the_facts_about_each_subject_are_taught_and_the_others_asked(bench, tokenizer):
    model = tiny_model("llama", vocab_size=400, max_position_embeddings=512)
    asked = questions_of(bench, "unlearn", tokenizer, model, EvalSettings(), kinds=("mcq",))
    told, groups = attacks.halves_of_subjects(asked, 0)
    taught = {(one.row["subject"], one.row["attribute"]) for one in told}
    others = {(one.row["subject"], one.row["attribute"]) for one in groups["untaught"]}
    assert not taught & others and taught | others == {(q.row["subject"], q.row["attribute"]) for q in asked}
    for subject in {subject for subject, _ in taught}:
        both = [sum(who == subject for who, _ in half) for half in (taught, others)]
        assert both[1] - both[0] in (0, 1)
    answers = {tokenizer.decode(one.tokens.ids[one.tokens.start :]).strip() for one in told}
    assert answers == {one.row["options"][one.row["answer"]].strip() for one in told}


def test_an_answer_is_right_if_its_perplexity_is_the_lowest_and_ties_share():
    model = tiny_model("llama").double().eval()
    options = [CountedText([5, 6, 7], 2), CountedText([5, 6, 9, 9, 11], 2), CountedText([5, 6, 13], 2)]
    nll = []
    for ids, start, _ in options:
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nll.append(-sum(float(logp[place - 1, ids[place]]) for place in range(start, len(ids))) / (len(ids) - start))
    for answer in range(3):
        found = attacks.answers_of(model, [AskedQuestion({"subject": "s", "answer": answer}, options)], 1)
        assert found == {"subject": ["s"], "right": [float(nll[answer] == min(nll))]}
    twins = AskedQuestion({"subject": "s", "answer": 1}, [options[0], options[0]])
    assert attacks.answers_of(model, [twins], 1)["right"] == [0.5]
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    broken = AskedQuestion({"subject": "s", "answer": 2}, options)
    assert np.isnan(attacks.answers_of(model, [broken], 1)["right"]).all()  # no number was measured


def test_relearning_teaches_what_it_is_shown_and_leaves_the_model_as_it_was(bench, tokenizer):
    model = tiny_model("llama", vocab_size=400, hidden_size=32, max_position_embeddings=512).eval()
    before = _state(model)
    settings = EvalSettings(relearn_steps=20, relearn_every=15, relearn_lr=2e-2, relearn_batch_size=3, seed=1)
    found = attacks.attack(model, tokenizer, bench, settings)
    own, benign = found["relearn"]["own"], found["relearn"]["benign"]
    assert own["steps"] == benign["steps"] == [0, 15, 20]
    assert set(own) == {"steps", "taught", "others"} and set(benign) == {"steps", "others"}
    taught, others = ({*curve[0]["subject"]} for curve in (own["taught"], own["others"]))
    assert taught | others == set(bench.subjects("unlearn")) and not taught & others
    first, last = (sum(point["right"]) / len(point["right"]) for point in (own["taught"][0], own["taught"][-1]))
    assert last > first + 0.2
    assert {*found["quantise"]} == {"8-bit", "4-bit"}
    assert {*found["quantise"]["4-bit"]} == {"unlearn", "update", "retain"}
    assert {*found["prefix"]} == {*attacks.PREFIXES}
    after = _state(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["mixtral", "cpt_moe", "cpt_moe sinkhorn"])
def test_with_the_old_routes_a_mixture_whose_routers_alone_were_turned_says_what_it_said(kind, bench, tokenizer):
    before, after = (tiny_model(kind, vocab_size=400, max_position_embeddings=512) for _ in range(2))
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        for layer in attacks.moe_layers(after):
            for weight in layer.router.parameters():
                weight.neg_()
    settings = EvalSettings(robustness=["routes"], max_questions=3, batch_size=2)
    asked = questions_of(bench, "unlearn", tokenizer, before, settings, kinds=("mcq",))
    old, new = (score_options(model, asked, 2) for model in (before, after))
    with attacks.routes_of(after, before):
        forced = score_options(after, asked, 2)
    for theirs, turned, again in zip(old, new, forced, strict=True):
        assert again["logp"] == pytest.approx(theirs["logp"], abs=1e-5)
        assert turned["logp"] != pytest.approx(theirs["logp"], abs=1e-4)
    assert score_options(after, asked, 2)[0]["logp"] == new[0]["logp"]  # the hooks are gone
    found = attacks.attack(after, tokenizer, bench, settings, before)
    assert set(found) == {"routes"} and set(found["routes"]) == {"unlearn", "obsolete"}
    assert found["routes"]["unlearn"] == attacks.answers_of(before, asked, 2)


def test_old_routes_are_asked_of_mixtures_with_the_same_layers(bench, tokenizer):
    settings = EvalSettings(robustness=["routes"], max_questions=3)
    dense, mixture = (tiny_model(k, vocab_size=400, max_position_embeddings=512) for k in ("llama", "mixtral"))
    assert attacks.attack(dense, tokenizer, bench, settings, dense) == {}
    assert attacks.attack(mixture, tokenizer, bench, settings) == {}
    with pytest.raises(ValueError, match="0 layers of experts cannot route for 2: give the model before surgery"):
        with attacks.routes_of(mixture, dense):
            pass


def test_gradients_are_the_mean_of_norms_over_weights_and_leave_the_model_as_it_was(bench, tokenizer):
    """As OpenUnlearning's gradnorm with p = 2: a backward pass for each text, its last label dropped."""
    model = tiny_model("mixtral", vocab_size=400, max_position_embeddings=512)
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    settings = EvalSettings(robustness=["gradients"], max_documents=2)
    before = _state(model)
    found = attacks.attack(model, tokenizer, bench, settings)["gradients"]
    assert set(found) == {"unlearn", "unseen"} and all(len(columns["norm"]) == 2 for columns in found.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(model).items())
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.grad.eq(1).all()
    model.lm_head.weight.requires_grad_(True)
    for place, document in enumerate(attacks.documents_of(bench, "unseen", tokenizer, model, settings)):
        model.zero_grad()
        ids = torch.tensor([document.tokens.ids[:-1]])
        model(input_ids=ids, labels=ids, output_router_logits=False).loss.backward()
        norms = [weight.grad.norm() for weight in model.parameters() if weight.grad is not None]
        assert found["unseen"]["norm"][place] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-4)
