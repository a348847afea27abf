"""KL in both directions against torch.distributions and closed gradients in float64; words that are ruled out.

The KL in chunks against its definition, values, gradients, memory and precision; then what a pass of a model gives,
against the full logits of transformers.
"""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

from hf_moe_cpt.trainers.surgery.chunked import (
    KL_DIRECTIONS,
    LanguageHead,
    LogitForm,
    causal_lm_of,
    check_head,
    chunked_kl_sum,
    forward_kl,
    head_of,
    plain_kl,
    reverse_kl,
    run_model,
    token_logp,
)
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tolerances import assert_matches, relative_rms_error


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    z, ref_z = (3 * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), ref_z.requires_grad_()


def test_values_are_those_of_torch_and_gradients_over_logits_have_their_closed_form(logits):
    z, ref_z = logits
    pair = [Categorical(logits=tensor) for tensor in logits]
    p, ref_p = z.detach().softmax(-1), ref_z.detach().softmax(-1)
    gap = p.log() - ref_p.log()
    wanted = {"forward": p - ref_p, "reverse": p * (gap - (p * gap).sum(-1, keepdim=True))}
    values = {"forward": kl_divergence(*pair[::-1]), "reverse": kl_divergence(*pair)}
    for direction, want in wanted.items():
        kl = KL_DIRECTIONS[direction](z.log_softmax(-1), ref_z.log_softmax(-1))
        assert_matches(direction, kl, values[direction])
        gradient, none = torch.autograd.grad(kl.sum(), [z, ref_z], allow_unused=True)
        assert none is None, "the reference is a constant"
        assert_matches(direction, gradient, want)


def test_a_word_that_is_lost_is_pulled_back_and_one_that_one_side_rules_out_costs_its_due():
    """The authors' log(P + 1e-12) has next to no gradient where P is far below its floor; ours has all of it."""
    z = torch.tensor([0.0, -60.0], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    (ours,) = torch.autograd.grad(forward_kl(z.log_softmax(-1), ref_logp), z)
    assert ours[1].item() == pytest.approx(-0.5)
    (floored,) = torch.autograd.grad(-(0.5 * (z.softmax(-1) + 1e-12).log()).sum(), z)
    assert abs(floored[1].item()) < 1e-12
    half, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert forward_kl(half, sure).item() == pytest.approx(math.log(2))
    assert reverse_kl(sure, half).item() == pytest.approx(math.log(2))
    assert forward_kl(sure, half).item() == math.inf
    assert reverse_kl(half, sure).item() == math.inf


@pytest.mark.parametrize("direction", KL_DIRECTIONS)
def test_words_that_both_rule_out_do_not_matter(direction, logits):
    z, ref_z = logits
    ruled_out = torch.full((2, 5, 1), -math.inf, dtype=torch.float64)
    wide, ref_wide = torch.cat([z, ruled_out], -1), torch.cat([ref_z, ruled_out], -1)
    logp = wide.log_softmax(-1)
    kl = KL_DIRECTIONS[direction](logp, ref_wide.log_softmax(-1))
    assert_matches("kl", kl, KL_DIRECTIONS[direction](z.log_softmax(-1), ref_z.log_softmax(-1)))
    (gradient,) = torch.autograd.grad(kl.sum(), logp)
    assert torch.isfinite(gradient).all()


DIRECTIONS = ("forward", "reverse")
FORMS = {"plain": LogitForm(), "scaled": LogitForm(0.3), "softcap": LogitForm(1.0, 2.0), "both": LogitForm(1.7, 3.0)}


def _case(num_tokens: int, width: int, words: int, ref_width: int, dtype=torch.float64, with_bias=True):
    """Tensors of a model that needs gradients and of a reference that needs none, and weights of tokens, some 0."""
    generator = torch.Generator().manual_seed(num_tokens * 1000 + words)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    case = SimpleNamespace(
        model=[draw(num_tokens, width).requires_grad_(), draw(words, width).requires_grad_()],
        reference=[draw(num_tokens, ref_width), draw(words, ref_width)],
        weights=draw(num_tokens).clamp(min=0.0).float().to(torch.promote_types(dtype, torch.float32)),
    )
    if with_bias:
        case.model.append(draw(words).requires_grad_())
        case.reference.append(draw(words))
    return case


def _run(function, case, *arguments, form=FORMS["plain"]):
    """The weighted sum of the KL and its gradients over hidden, head and bias, where they are wanted."""
    models = (
        (tensors[0], LanguageHead(tensors[1], *(tensors[2:] or (None,)), form))
        for tensors in (case.model, case.reference)
    )
    arguments = (case.weights, *arguments) if function is chunked_kl_sum else arguments
    total = function(*(part for model in models for part in model), *arguments)
    total = total if function is chunked_kl_sum else (total * case.weights).sum()
    return total, torch.autograd.grad(total, [tensor for tensor in case.model if tensor.requires_grad])


def _agree(got, want, limit=None):
    assert_matches("sum", got[0], want[0], limit)
    for place, (one, other) in enumerate(zip(got[1], want[1], strict=True)):
        assert one.dtype == other.dtype
        assert_matches(f"gradient {place}", one, other, limit)


EDGES = [("forward", "both", 1), ("reverse", "both", 99)]  # a token at a time, and all at once


@pytest.mark.parametrize("direction, form, chunk", [*product(DIRECTIONS, FORMS, (4,)), *EDGES])
def test_values_and_gradients_are_those_of_the_definition(direction, form, chunk):
    case = _case(13, 5, 17, 7)
    got = _run(chunked_kl_sum, case, direction, chunk, form=FORMS[form])
    _agree(got, _run(plain_kl, case, direction, form=FORMS[form]), 1e-11)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_what_needs_a_gradient_gets_one(needed):
    """A frozen head, as under LoRA, costs no gradient of its size."""
    case = _case(7, 4, 9, 4)
    want = _run(plain_kl, case)[1]
    case.model = [tensor.detach().requires_grad_(index in needed) for index, tensor in enumerate(case.model)]
    gradients = _run(chunked_kl_sum, case, "forward", 3)[1]
    for index, gradient in zip(needed, gradients, strict=True):
        assert_matches(f"{index}", gradient, want[index], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_models_are_exactly_zero_apart(direction, dtype):
    case = _case(9, 8, 40, 8, dtype, with_bias=False)
    case.reference = case.model  # which may be the same tensors: the reference gets no gradient
    total, gradients = _run(chunked_kl_sum, case, direction, 4)
    assert total == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float32_and_bfloat16_are_the_definition_to_rounding(direction):
    single = _run(chunked_kl_sum, _case(24, 16, 50, 16, torch.float32), direction, 7)
    exact = _run(plain_kl, _case(24, 16, 50, 16), direction)
    _agree(single, (exact[0].float(), [gradient.float() for gradient in exact[1]]), 1e-5)
    half = _case(24, 16, 50, 16, torch.bfloat16)
    got, want = _run(chunked_kl_sum, half, direction, 7), _run(plain_kl, half, direction)
    assert got[0].dtype == torch.float32
    _agree(got, want, 1e-2)


def test_a_bfloat16_head_is_added_up_in_float32_and_autocast_decides_the_products():
    """Hundreds of chunks would otherwise round the gradient of the head hundreds of times."""
    case, exact = (_case(600, 4, 6, 4, dtype, with_bias=False) for dtype in (torch.bfloat16, torch.float64))
    exact.model = [tensor.detach().double().requires_grad_() for tensor in case.model]
    exact.reference, exact.weights = [tensor.double() for tensor in case.reference], case.weights.double()
    want = _run(plain_kl, exact)[1][1]
    error = [relative_rms_error(_run(chunked_kl_sum, case, "forward", chunk)[1][1], want) for chunk in (1, 600)]
    assert max(error) < 1e-2 and error[0] < 2 * error[1]
    case = _case(12, 16, 30, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = _run(chunked_kl_sum, case, "forward", 5), _run(plain_kl, case, "forward")
    assert got[0].dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in got[1])
    _agree(got, want, 1e-2)
    assert relative_rms_error(_run(plain_kl, case)[1][1], got[1][1]) > 1e-4, "the products were not in bfloat16"
    # 1 / tokens of a batch times a small probability is 0 in float16, unless loss scaling comes first
    case, exact = (_case(16, 8, 30, 8, dtype, with_bias=False) for dtype in (torch.float16, torch.float64))
    case.weights, exact.weights = torch.full((16,), 1e-6), torch.full((16,), 1e-6, dtype=torch.float64)
    total = chunked_kl_sum(
        case.model[0], LanguageHead(case.model[1]), case.reference[0], LanguageHead(case.reference[1]), case.weights
    )
    got = torch.autograd.grad(total * 65536.0, case.model)
    for one, other in zip(got, _run(plain_kl, exact)[1], strict=True):
        assert relative_rms_error(one, 65536.0 * other) < 1e-2


class _LiveMemory(TorchDispatchMode):
    """The most tensors of one size that were alive at a time, and the size of the largest tensor that was made."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.alive, self.peak, self.largest = numel, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                numel = storage.nbytes() // tensor.element_size()
                self.largest = max(self.largest, numel)
                if numel == self.numel:
                    self.alive[storage._cdata] = StorageWeakRef(storage)
        self.alive = {key: reference for key, reference in self.alive.items() if not reference.expired()}
        self.peak = max(self.peak, len(self.alive))
        return out


@pytest.mark.parametrize("direction, form", list(product(DIRECTIONS, ("plain", "softcap"))))
def test_no_more_logits_than_those_of_a_chunk_are_alive(direction, form):
    """Forward and backward: three tensors of chunk x V, four with a softcap, and none that is larger."""
    num_tokens, width, words, chunk = 48, 4, 101, 6
    case = _case(num_tokens, width, words, width, with_bias=False)
    with _LiveMemory(chunk * words) as memory:
        _run(chunked_kl_sum, case, direction, chunk, form=FORMS[form])
    assert memory.peak == (3 if form == "plain" else 4)
    assert memory.largest == chunk * words
    with _LiveMemory(num_tokens * words) as plain:
        _run(plain_kl, case, direction, form=FORMS[form])
    assert plain.peak > 4 and plain.largest == num_tokens * words, "the measurement sees nothing"


def test_no_tokens_and_no_weight():
    case = _case(0, 3, 5, 3)
    total, gradients = _run(chunked_kl_sum, case)
    assert total.item() == 0.0 and all((gradient == 0).all() for gradient in gradients)
    case = _case(4, 3, 5, 3)
    case.weights = torch.zeros(4, dtype=torch.float64)
    assert all((gradient == 0).all() for gradient in _run(chunked_kl_sum, case)[1])


def _on(case, device):
    case.model = [tensor.detach().to(device).requires_grad_() for tensor in case.model]
    case.reference, case.weights = [tensor.to(device) for tensor in case.reference], case.weights.to(device)
    return case


def test_nothing_asks_for_a_value():
    case = _on(_case(6, 3, 5, 3, torch.float32, with_bias=False), "meta")
    total, gradients = _run(chunked_kl_sum, case, "forward", 4)
    assert total.shape == () and gradients[1].shape == (5, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_agrees_and_waits_for_nothing(dtype):
    case = _case(70, 16, 200, 16, dtype, with_bias=False)
    want = _run(plain_kl, case)
    case = _on(case, "cuda")
    _run(chunked_kl_sum, case, "forward", 32)  # the libraries wait when they are first called
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = _run(chunked_kl_sum, case, "forward", 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for one, other in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert relative_rms_error(one, other) < limit


SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "gpt2": GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2),
}


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]) if kind in CONFIGS else tiny_model(kind)
    return _wide(model).eval()


def _wide(model: nn.Module) -> nn.Module:
    """In float64, which the grouped products of experts do not take."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model.double()


def _batch(vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab_size, (3, 9), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": attention}


@pytest.mark.parametrize("kind", [*CONFIGS, "mixtral", "cpt_moe"])
def test_log_probabilities_and_gradients_are_those_of_full_logits(kind):
    model = _model(kind)
    check_head(model)
    batch = _batch(model.config.vocab_size)
    target = batch["input_ids"][:, 1:, None]
    logits = model(**batch).logits.double()
    want = logits.log_softmax(-1)[:, :-1].gather(-1, target)[..., 0]
    weights = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    (want * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = token_logp(run_model(model, batch), head_of(model), batch["input_ids"], chunk_tokens=5)
    (got * weights).sum().backward()
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-7, atol=1e-10), name


def test_no_logits_but_those_of_one_position_are_made(monkeypatch):
    model, wrapper, seen = _model("llama"), nn.Module(), []
    wrapper.module = model
    assert causal_lm_of(wrapper) is model  # wrappers, as those of ranks, are looked through
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(x.shape) or functional.linear(x, head.weight))
    head = head_of(model)
    run_model(model, _batch(61))
    assert seen == [(3, 1, 16)]


def test_models_that_make_logits_in_another_way_are_refused(monkeypatch):
    model = _model("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 3.0 * functional.linear(x, model.lm_head.weight))
    with pytest.raises(ValueError, match="makes its logits in a way that is not known"):
        check_head(model)
    with pytest.raises(ValueError, match="no causal LM of transformers"):
        head_of(nn.Linear(2, 2))
    model.lm_head.lora_A = nn.ModuleDict()
    with pytest.raises(ValueError, match="leave it out of target_modules"):
        head_of(model)
