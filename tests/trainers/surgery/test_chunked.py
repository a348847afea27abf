"""KL in chunks against its definition on full logits: values, every gradient, memory, types and refusals.

Hidden states, log-probabilities and divergences of any causal LM against its own logits.
"""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

from hf_moe_cpt.trainers.surgery import chunked as model_pass
from hf_moe_cpt.trainers.surgery.chunked import (
    LogitForm,
    check_head,
    chunked_kl,
    chunked_kl_sum,
    head_of,
    next_token_kl,
    plain_kl,
    run_model,
    token_logp,
)
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tolerances import assert_matches, relative_rms_error


DIRECTIONS = ("forward", "reverse")
FORMS = {"plain": None, "scaled": LogitForm(scale=0.3), "softcap": LogitForm(softcap=2.0), "both": LogitForm(1.7, 3.0)}


def _case(num_tokens: int, width: int, words: int, ref_width: int, dtype=torch.float64, with_bias=True):
    """Tensors of a model that needs gradients and of a reference that needs none, and weights of tokens, some 0."""
    generator = torch.Generator().manual_seed(num_tokens * 1000 + words)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    case = SimpleNamespace(
        model=[draw(num_tokens, width).requires_grad_(), draw(words, width).requires_grad_()],
        reference=[draw(num_tokens, ref_width), draw(words, ref_width)],
        biases={},
        weights=draw(num_tokens).clamp(min=0.0).float().to(torch.promote_types(dtype, torch.float32)),
    )
    if with_bias:
        case.biases = {"bias": draw(words).requires_grad_(), "ref_bias": draw(words)}
        case.leaves = [*case.model, case.biases["bias"]]
    else:
        case.leaves = case.model
    return case


def _run(function, case, *arguments, form=None):
    """KL (N,) and the gradients of its weighted sum over hidden, head and bias."""
    if function is chunked_kl_sum:
        total, kl = function(*case.model, *case.reference, case.weights, *arguments, form=form, **case.biases)
    else:
        kl = function(*case.model, *case.reference, *arguments, form=form, **case.biases)
        total = (kl * case.weights).sum()
    return kl, torch.autograd.grad(total, case.leaves)


def _agree(got, want, limit=None):
    assert_matches("kl", got[0], want[0], limit)
    for name, one, other in zip(("hidden", "head", "bias"), got[1], want[1], strict=False):
        assert one.dtype == other.dtype
        assert_matches(name, one, other, limit)


@pytest.mark.parametrize("function", [chunked_kl, chunked_kl_sum])
@pytest.mark.parametrize("direction, form, chunk", list(product(DIRECTIONS, FORMS, (1, 4, 13, 99))))
def test_values_and_gradients_are_those_of_the_definition(function, direction, form, chunk):
    case = _case(13, 5, 17, 7)
    got = _run(function, case, direction, chunk, form=FORMS[form])
    _agree(got, _run(plain_kl, case, direction, form=FORMS[form]), 1e-11)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(2, 9), st.integers(1, 11), st.sampled_from(DIRECTIONS))
@settings(max_examples=25, deadline=None)
def test_any_shape_and_any_chunk(num_tokens, width, words, chunk, direction):
    case = _case(num_tokens, width, words, ref_width=3, with_bias=False)
    want = _run(plain_kl, case, direction)
    for function in (chunked_kl, chunked_kl_sum):
        got = _run(function, case, direction, chunk)
        for one, other in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_are_differences_of_the_value(direction):
    case = _case(4, 3, 6, 2)
    bias, ref_bias = case.biases.values()

    def kl(hidden, head, offset):
        options = {"bias": offset, "ref_bias": ref_bias, "form": FORMS["both"]}
        return chunked_kl(hidden, head, *case.reference, direction, 3, **options)

    assert torch.autograd.gradcheck(kl, (*case.model, bias))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("function", [chunked_kl, chunked_kl_sum])
def test_only_what_needs_a_gradient_gets_one(function, needed):
    """A frozen head, as under LoRA, costs no gradient of its size."""
    case = _case(7, 4, 9, 4)
    want = _run(plain_kl, case)
    case.model = [tensor.detach().requires_grad_(index in needed) for index, tensor in enumerate(case.model)]
    case.biases["bias"] = case.biases["bias"].detach().requires_grad_(2 in needed)
    leaves = [*case.model, case.biases["bias"]]
    case.leaves = [leaves[index] for index in needed]
    kl, gradients = _run(function, case, "forward", 3)
    for index, gradient in zip(needed, gradients, strict=True):
        assert_matches(f"{index}", gradient, want[1][index], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_models_are_exactly_zero_apart(direction, dtype):
    case = _case(9, 8, 40, 8, dtype, with_bias=False)
    case.reference = [tensor.detach().clone() for tensor in case.model]
    for function in (chunked_kl, chunked_kl_sum):
        kl, gradients = _run(function, case, direction, 4)
        assert (kl == 0).all() and all((gradient == 0).all() for gradient in gradients)


def test_the_reference_gets_no_gradient_and_may_be_the_same_tensor():
    hidden, head = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    chunked_kl(hidden, head, hidden, head).sum().backward()
    assert (hidden.grad == 0).all() and (head.grad == 0).all()


@pytest.mark.parametrize("function", [chunked_kl, chunked_kl_sum])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float32_and_bfloat16_are_the_definition_to_rounding(function, direction):
    single = _case(24, 16, 50, 16, torch.float32)
    exact = _run(plain_kl, _case(24, 16, 50, 16), direction)
    _agree(
        [x.float() if isinstance(x, torch.Tensor) else x for x in _run(function, single, direction, 7)],
        (exact[0].float(), [g.float() for g in exact[1]]),
        1e-5,
    )
    half = _case(24, 16, 50, 16, torch.bfloat16)
    got, want = _run(function, half, direction, 7), _run(plain_kl, half, direction)
    assert got[0].dtype == torch.float32
    _agree(got, want, 1e-2)


def test_a_bfloat16_head_is_added_up_in_float32():
    """Hundreds of chunks would otherwise round the gradient of the head hundreds of times."""
    case, exact = (_case(600, 4, 6, 4, dtype, with_bias=False) for dtype in (torch.bfloat16, torch.float64))
    exact.model = [tensor.detach().double().requires_grad_() for tensor in case.model]
    exact.leaves, exact.reference = exact.model, [tensor.double() for tensor in case.reference]
    exact.weights = case.weights.double()
    want = _run(plain_kl, exact)[1][1]
    error = [relative_rms_error(_run(chunked_kl, case, "forward", chunk)[1][1], want) for chunk in (1, 600)]
    assert max(error) < 1e-2 and error[0] < 2 * error[1]


def test_autocast_decides_the_type_of_the_products():
    case = _case(12, 16, 30, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for function in (chunked_kl, chunked_kl_sum):
            got, want = _run(function, case, "forward", 5), _run(plain_kl, case, "forward")
            assert got[0].dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in got[1])
            _agree(got, want, 1e-2)
    assert relative_rms_error(_run(plain_kl, case)[0], got[0]) > 1e-4, "the products were not in bfloat16"


def test_small_weights_of_tokens_survive_in_float16():
    """1 / tokens of a batch times a small probability is 0 in float16, unless loss scaling comes first."""
    case, exact = (_case(16, 8, 30, 8, dtype, with_bias=False) for dtype in (torch.float16, torch.float64))
    case.weights = torch.full((16,), 1e-6)
    total, _ = chunked_kl_sum(*case.model, *case.reference, case.weights)
    got = torch.autograd.grad(total * 65536.0, case.leaves)
    kl = plain_kl(*exact.model, *exact.reference)
    want = torch.autograd.grad((kl * 1e-6).sum() * 65536.0, exact.leaves)
    for one, other in zip(got, want, strict=True):
        assert relative_rms_error(one, other) < 1e-2


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
@pytest.mark.parametrize("function", [chunked_kl, chunked_kl_sum])
def test_no_more_logits_than_those_of_a_chunk_are_alive(function, direction, form):
    """Forward and backward: three tensors of chunk x V, four with a softcap, and none that is larger."""
    num_tokens, width, words, chunk = 48, 4, 101, 6
    case = _case(num_tokens, width, words, width, with_bias=False)
    with _LiveMemory(chunk * words) as memory:
        _run(function, case, direction, chunk, form=FORMS[form])
    assert memory.peak == (3 if form == "plain" else 4)
    assert memory.largest == chunk * words
    with _LiveMemory(num_tokens * words) as plain:
        _run(plain_kl, case, direction, form=FORMS[form])
    assert plain.peak > 4 and plain.largest == num_tokens * words, "the measurement sees nothing"


def _saved_bytes(function, case) -> int:
    """Bytes kept for the backward pass beyond the inputs."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (*case.model, *case.reference)}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in inputs:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*case.model, *case.reference)
    assert out is not None
    return sum(kept.values())


def test_what_is_kept_for_the_backward_pass():
    """Nothing; the gradients themselves, (N, H) and (V, H); or several times N x V by the definition."""
    num_tokens, width, words = 64, 4, 200
    case = _case(num_tokens, width, words, width, with_bias=False)
    assert _saved_bytes(chunked_kl, case) == 0
    weighted = lambda *tensors: chunked_kl_sum(*tensors, case.weights)  # noqa: E731
    assert _saved_bytes(weighted, case) == 8 * (num_tokens * width + words * width + 1)
    assert _saved_bytes(plain_kl, case) >= 8 * num_tokens * words


def test_without_gradients_nothing_is_kept_and_evaluation_agrees():
    case = _case(9, 4, 11, 4)
    with torch.no_grad():
        kl = chunked_kl(*case.model, *case.reference, "reverse", 2, **case.biases)
        total, again = chunked_kl_sum(*case.model, *case.reference, case.weights, "reverse", 2, **case.biases)
    assert not kl.requires_grad and torch.equal(kl, again)
    assert_matches("kl", kl, _run(plain_kl, case, "reverse")[0])
    assert_matches("sum", total, (kl * case.weights).sum())


def test_no_tokens_and_no_weight():
    hidden, head = torch.zeros(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    total, kl = chunked_kl_sum(hidden, head, torch.zeros(0, 3), head.detach(), torch.zeros(0))
    (total + chunked_kl(hidden, head, torch.zeros(0, 3), head.detach()).sum()).backward()
    assert total.item() == 0.0 and kl.shape == (0,) and (head.grad == 0).all()
    case = _case(4, 3, 5, 3)
    case.weights = torch.zeros(4, dtype=torch.float64)
    _, gradients = _run(chunked_kl_sum, case)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("function", [chunked_kl, chunked_kl_sum])
def test_nothing_asks_for_a_value(function):
    case = _case(6, 3, 5, 3, torch.float32, with_bias=False)
    case.model = case.leaves = [tensor.detach().to("meta").requires_grad_() for tensor in case.model]
    case.reference = [tensor.to("meta") for tensor in case.reference]
    case.weights = case.weights.to("meta")
    kl, gradients = _run(function, case, "forward", 4)
    assert kl.shape == (6,) and gradients[1].shape == (5, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [chunked_kl, chunked_kl_sum])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_agrees_and_waits_for_nothing(function, dtype):
    case = _case(70, 16, 200, 16, dtype, with_bias=False)
    want = _run(plain_kl, case)
    case.model = case.leaves = [tensor.detach().cuda().requires_grad_() for tensor in case.model]
    case.reference, case.weights = [tensor.cuda() for tensor in case.reference], case.weights.cuda()
    _run(function, case, "forward", 32)  # the libraries wait when they are first called
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = _run(function, case, "forward", 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for one, other in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert relative_rms_error(one, other) < limit


GOOD = {"hidden": (4, 3), "head": (7, 3), "ref_hidden": (4, 2), "ref_head": (7, 2)}
REFUSED = {
    "batch and time": (
        {"hidden": (2, 2, 3)},
        {},
        r"hidden and head \(2, 2, 3\) and \(7, 3\) must be \(tokens",
    ),
    "another width": ({"ref_head": (7, 3)}, {}, r"ref_hidden and ref_head \(4, 2\) and \(7, 3\) must be"),
    "other tokens": ({"ref_hidden": (5, 2)}, {}, "hidden has 4 tokens and ref_hidden 5: they must be the same tokens"),
    "vocabulary": (
        {"ref_head": (8, 2)},
        {},
        "head has 7 words and ref_head 8: model and reference need one voc",
    ),
    "direction": ({}, {"direction": "js"}, "kl_direction='js' is unknown: choose one of forward, reverse"),
    "chunk": ({}, {"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1: 512 is usual"),
    "bias": ({}, {"bias": torch.zeros(6)}, r"bias \(6,\) must be one number per word, \(7,\)"),
}


@pytest.mark.parametrize("shapes, options, message", REFUSED.values(), ids=REFUSED)
def test_inputs_that_do_not_fit_are_refused(shapes, options, message):
    tensors = {name: torch.zeros(shape) for name, shape in (GOOD | shapes).items()}
    with pytest.raises(ValueError, match=message):
        chunked_kl(**tensors, **options)
    with pytest.raises(ValueError, match=message):
        chunked_kl_sum(**tensors, token_weights=torch.zeros(4), **options)


def test_more_refusals():
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    with pytest.raises(ValueError, match=r"token_weights \(3,\) must be one per token, \(4,\)"):
        chunked_kl_sum(**tensors, token_weights=torch.zeros(3))
    for softcap in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"softcap={softcap} must be above 0, or None for none"):
            LogitForm(softcap=softcap)


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
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
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
    got = token_logp(run_model(model, batch).hidden, head_of(model), batch["input_ids"], chunk_tokens=5)
    (got * weights).sum().backward()
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_divergence_is_that_of_full_logits(kind):
    model, reference = _model(kind), _model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    batch = _batch(61)
    mask = batch["attention_mask"][:, 1:].bool()
    logps = [m(**batch).logits[:, :-1].log_softmax(-1) for m in (model, reference)]
    kl = functional.kl_div(logps[0], logps[1], log_target=True, reduction="none").sum(-1)
    want = ((kl * mask).sum(1) / mask.sum(1)).mean()
    states = [(run_model(m, batch).hidden, head_of(m)) for m in (model, reference)]
    got, per_token = next_token_kl(*states, mask, chunk_tokens=4)
    assert torch.allclose(got, want, rtol=1e-9)
    assert torch.allclose(per_token, kl, rtol=1e-8, atol=1e-12)


def test_no_logits_but_those_of_one_position_are_made(monkeypatch):
    model = _model("llama")
    seen = []
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(x.shape) or functional.linear(x, head.weight))
    head = head_of(model)
    run_model(model, _batch(61))
    assert seen == [(3, 1, 16)]


@pytest.mark.parametrize("kind", ["mixtral", "cpt_moe"])
def test_router_penalty_is_what_the_model_adds_to_its_loss(kind):
    model = _wide(tiny_model(kind, router_aux_loss_coef=0.37)).train()
    batch = _batch(model.config.vocab_size)
    penalty = run_model(model, batch, with_router_penalty=True).router_penalty
    with_it = model(**batch, labels=batch["input_ids"], output_router_logits=True).loss
    logits = model(**batch).logits.double()
    plain = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert penalty > 0
    assert torch.allclose(penalty.double(), with_it - plain, rtol=1e-5)
    assert run_model(model, batch).router_penalty is None


def test_models_that_make_logits_in_another_way_are_refused(monkeypatch):
    model = _model("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 3.0 * functional.linear(x, model.lm_head.weight))
    with pytest.raises(ValueError, match="makes its logits in a way that is not known"):
        check_head(model)
    with pytest.raises(ValueError, match="no causal LM of transformers"):
        head_of(nn.Linear(2, 2))
    layer = model.lm_head
    layer.lora_A = nn.ModuleDict()
    with pytest.raises(ValueError, match="leave it out of target_modules"):
        head_of(model)


def test_a_wrapper_is_looked_through():
    model = _model("llama")
    wrapped = nn.Module()
    wrapped.module = model
    assert model_pass.causal_lm_of(wrapped) is model
