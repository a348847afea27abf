"""Fused head and loss against cross entropy in float64; models with it, and with Liger's kernels, against none."""

import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations.liger import apply_liger_kernel
from transformers.modeling_outputs import CausalLMOutput

import hf_moe_cpt.kernels.cross_entropy as module
from hf_moe_cpt.extras import is_installed
from hf_moe_cpt.kernels.cross_entropy import (
    apply_liger_kernel_to_cpt_moe,
    fuse_head,
    liger_rotate_query_and_key,
    linear_cross_entropy,
    plain_linear_cross_entropy,
    register_with_liger,
    tokens_per_chunk,
)
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeAttention, CptMoeForCausalLM, CptMoeRMSNorm, rotate
from hf_moe_cpt.trainers.common.metrics import LossRecorder, SourceLosses
from tests.helpers.expert_layers import DEVICE, FLOAT_DTYPES
from tests.helpers.tiny_models import CONFIGS, VOCABULARY, tiny_model
from tests.helpers.tolerances import RELATIVE_RMS_LIMIT, assert_matches


# N, H, V, bytes of logits: rows of 48 float32 logits are 192 bytes each
SHAPES = {
    "three chunks, the last one short": (8, 16, 37, 3 * 148),
    "a chunk for every token": (3, 8, 64, 1),
    "one token": (1, 3, 2, 2**20),
    "one word": (4, 3, 1, 2**20),
    "blocks of logits": (3, 8, 131, 2**20),
}
UPSTREAM = -0.37


def case(N, H, V, dtype=torch.float32, seed=0, ignored=0.3, size=1.0):
    """Hidden states, weight and targets, some of them ignored; the first one is not, unless all are."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator) * size
    weight = torch.randn(V, H, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[1:][torch.rand(N - 1, generator=generator) < ignored] = -100
    return [tensor.to(DEVICE).requires_grad_() for tensor in (hidden.to(dtype), weight.to(dtype))] + [
        targets.to(DEVICE)
    ]


def reference(hidden, weight, targets, upstream=UPSTREAM):
    """Losses and gradients by torch's own function in float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    losses = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    gradients = torch.autograd.grad(losses.sum() * upstream, (hidden, weight))
    return losses.sum(), losses, *gradients


def assert_all_match(got, want, dtype):
    limit = RELATIVE_RMS_LIMIT[dtype]
    for name, left, right in zip(("sum", "losses", "hidden", "weight"), got, want, strict=True):
        assert_matches(name, left, right, limit)


def fused(hidden, weight, targets, max_logits_bytes=2**20, upstream=UPSTREAM):
    loss_sum, losses = linear_cross_entropy(hidden, weight, targets, max_logits_bytes)
    return loss_sum, losses, *torch.autograd.grad(loss_sum * upstream, (hidden, weight))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("N, H, V, max_logits_bytes", SHAPES.values(), ids=SHAPES)
def test_losses_and_gradients(monkeypatch, N, H, V, max_logits_bytes, dtype):
    monkeypatch.setattr(module, "MAX_BLOCK", 32)
    tensors = case(N, H, V, dtype)
    got = fused(*tensors, max_logits_bytes)
    assert_all_match(got, reference(*tensors), dtype)
    assert (got[0].dtype, got[1].dtype, got[2].dtype, got[3].dtype) == (torch.float32, torch.float32, dtype, dtype)
    assert not got[1].requires_grad


def test_bias_scale_and_softcap():
    hidden, weight, targets = case(6, 16, 37)
    bias = torch.randn(37, device=DEVICE).requires_grad_()
    for scale, softcap, added in ((0.5, None, bias), (2.0, 3.0, bias), (1.0, 5.0, None)):
        inputs = [tensor for tensor in (hidden, weight, added) if tensor is not None]
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        logits = scale * F.linear(*exact)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        losses = F.cross_entropy(logits, targets, reduction="none")
        got_sum, got = linear_cross_entropy(hidden, weight, targets, 296, added, scale, softcap)
        assert_matches("losses", got, losses)
        want = torch.autograd.grad(losses.sum(), exact)
        for left, right in zip(torch.autograd.grad(got_sum, inputs), want, strict=True):
            assert_matches("gradient", left, right)


def test_no_tokens():
    hidden, weight, targets = (tensor[:0] if index != 1 else tensor for index, tensor in enumerate(case(2, 8, 37)))
    loss_sum, losses = linear_cross_entropy(hidden, weight, targets)
    assert loss_sum.item() == 0.0
    assert losses.shape == (0,)
    assert torch.autograd.grad(loss_sum, weight)[0].eq(0).all()


def test_logits_whose_exponentials_overflow_give_the_same_bits_twice_and_views_do_as_well():
    hidden, weight, targets = tensors = case(6, 16, 37, size=1e4)
    want, got = reference(*tensors), fused(*tensors, 296)
    assert_all_match(got, want, torch.float32)
    assert all(torch.equal(left, right) for left, right in zip(got, fused(*tensors, 296), strict=True))
    wide = torch.randn(6, 40, device=DEVICE)
    wide[:, 3:19] = hidden.detach()
    views = (wide[:, 3:19].requires_grad_(), weight.detach().T.contiguous().T.requires_grad_())
    assert_all_match(fused(*views, targets.repeat_interleave(2)[::2], 296), want, torch.float32)


def test_a_block_of_impossible_words(monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK", 16)
    hidden, weight, targets = case(4, 8, 37, ignored=0.0)
    hidden, weight = hidden.detach().abs(), weight.detach()
    weight[:16] = float("-inf")
    targets = targets.clamp(min=16)
    want = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    assert_matches("losses", linear_cross_entropy(hidden, weight, targets)[1], want)


def test_a_target_outside_the_vocabulary_is_loud():
    hidden, weight, targets = case(4, 8, 37, ignored=0.0)
    for wrong in (37, -1, 2**33):
        targets[2] = wrong
        losses = linear_cross_entropy(hidden, weight, targets)[1]
        assert losses.isnan().tolist() == [False, False, True, False]


def test_gradients_come_only_where_they_are_needed():
    hidden, weight, targets = case(5, 8, 37)
    want = reference(hidden, weight, targets, upstream=1.0)
    for which, frozen in enumerate((weight, hidden)):
        frozen.requires_grad_(False)
        loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
        (gradient,) = torch.autograd.grad(loss_sum, (hidden, weight)[which])
        assert_matches("gradient", gradient, want[2 + which])
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets)[0].requires_grad


def test_several_backward_passes():
    hidden, weight, targets = case(5, 8, 37)
    loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    (loss_sum * 2).backward(retain_graph=True)
    (loss_sum * -0.5).backward()
    linear_cross_entropy(hidden, weight, targets, 1)[0].backward()  # a second micro-batch
    want = reference(hidden, weight, targets, upstream=2.5)
    assert_matches("hidden", hidden.grad, want[2])
    assert_matches("weight", weight.grad, want[3])


def test_a_second_derivative_is_refused():
    hidden, weight, targets = case(5, 8, 37)
    loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss_sum**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_operator_contract():
    bias = torch.randn(5, device=DEVICE).requires_grad_()
    for needs in ([True, True, True], [False, False, False]):
        how = (bias if needs[2] else None, 2.0, 3.0 * needs[0], torch.float32, 2**20, needs)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(module._linear_cross_entropy, (*case(2, 4, 5), *how), test_utils=checks)


@pytest.mark.slow
@pytest.mark.compiles
def test_operator_compiles_into_one_graph():
    def loss(hidden, weight, targets):
        return linear_cross_entropy(hidden * 2, weight, targets, 296)[0] * UPSTREAM

    tensors = case(5, 8, 37)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*tensors), tensors[:2])
    want = torch.autograd.grad(loss(*tensors), tensors[:2])
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right)


def test_autocast_multiplies_in_its_type_and_adds_up_in_float32():
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    hidden, weight, targets = case(7, 16, 37)
    with torch.autocast(DEVICE.type, dtype):
        got = fused(hidden, weight, targets, 200)
        loss_sum, losses = plain_linear_cross_entropy(hidden, weight, targets)
        want = loss_sum, losses, *torch.autograd.grad(loss_sum * UPSTREAM, (hidden, weight))
    assert [tensor.dtype for tensor in got] == [torch.float32] * 4
    assert_all_match(got, want, dtype)
    rounded = [tensor.detach().to(dtype) for tensor in (hidden, weight)]
    assert_matches("losses", got[1], reference(*rounded, targets)[1], 3e-3)


def test_logits_of_all_tokens_are_never_held(monkeypatch):
    sizes = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, out: sizes.append(out.shape) or multiply(*args, out=out))
    fused(*case(8, 16, 37), 3 * 148)
    logits = [rows for rows, columns in sizes if columns == 37]
    assert logits == [3, 3, 2]


def test_float64_goes_to_the_definition_and_what_does_not_fit_is_refused():
    hidden, weight, targets = case(5, 8, 37, torch.float64)
    got = linear_cross_entropy(hidden, weight, targets)
    assert got[1].dtype == torch.float64
    assert_matches("losses", got[1], reference(hidden, weight, targets)[1])
    with pytest.raises(RuntimeError, match="dtype"):
        linear_cross_entropy(hidden.float(), weight, targets)
    for wrong in ((hidden[None], weight, targets), (hidden, weight[:, 1:], targets), (hidden, weight, targets[1:])):
        with pytest.raises(ValueError, match=r"must be \(N, H\), \(V, H\) and \(N,\)"):
            linear_cross_entropy(*wrong)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 10**6), st.integers(1, 300_000), st.sampled_from([2, 4]), st.integers(1, 2**31))
def test_chunks_fit_and_are_even(N, V, size, limit):
    rows = tokens_per_chunk(N, V, size, limit)
    assert rows == 1 or rows * V * size <= limit
    chunks = -(-N // rows)
    assert chunks * rows - N < chunks * 128  # the last chunk may be shorter, by less than the rounding of all
    assert tokens_per_chunk(32768, 128256, 2, module.MAX_LOGITS_BYTES) == 2048


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_synchronisation_and_little_memory_at_full_size(dtype):
    N, H, V = 6144, 512, 50257
    hidden = torch.randn(N, H, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, dtype=dtype).mul_(0.05).requires_grad_()
    targets = torch.randint(0, V, (N,), device=DEVICE)
    linear_cross_entropy(hidden, weight, targets)[0].backward()  # compiles
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (linear_cross_entropy(hidden, weight, targets, 128 * 2**20)[0] / N).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = torch.cuda.max_memory_allocated() - before
    assert held < 150 * 2**20 + 3 * (weight.nbytes + hidden.nbytes)
    loss_sum, _ = plain_linear_cross_entropy(hidden, weight, targets)
    want = torch.autograd.grad(loss_sum / N, (hidden, weight))
    assert_matches("hidden", hidden.grad, want[0], 2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert_matches("weight", weight.grad, want[1], 2e-2 if dtype == torch.bfloat16 else 1e-4)


def batch(sequences=3, tokens=9, seed=0):
    """Token ids, and labels that are partly ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (sequences, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(sequences, tokens, generator=generator) < 0.3, -100)
    labels[0, 1] = 5
    return ids.to(DEVICE), labels.to(DEVICE)


def pair(kind="cpt_moe", **changes):
    """The same model twice, the second with a fused head, both in training."""
    plain = tiny_model(kind, num_hidden_layers=1, **changes).to(DEVICE).train()
    fused = deepcopy(plain)
    fuse_head(fused)
    return plain, fused


def run(model, ids, **inputs):
    model.zero_grad()
    output = model(input_ids=ids, **inputs)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture
def calls(monkeypatch):
    """The shapes of hidden states that were given to the fused operator."""
    seen = []
    compute = module.linear_cross_entropy
    monkeypatch.setattr(
        module,
        "linear_cross_entropy",
        lambda *args, **options: seen.append(tuple(args[0].shape)) or compute(*args, **options),
    )
    return seen


DENSE = {"num_experts": 0, "num_experts_per_tok": 0}
MODELS = {
    "penalty-balanced, a number of tokens": ("cpt_moe", {}, {"num_items_in_batch": 7}),
    "switch, labels already shifted": ("cpt_moe switch", {}, {"shift_labels": True}),
    "sinkhorn, mean": ("cpt_moe sinkhorn", {}, {}),
    "dense, tied head, tokens on the device": (
        "cpt_moe",
        {**DENSE, "tie_word_embeddings": True},
        {"num_items_in_batch": torch.tensor(23, device=DEVICE)},
    ),
}


@pytest.mark.parametrize("kind, changes, inputs", MODELS.values(), ids=MODELS)
def test_losses_and_every_gradient(calls, kind, changes, inputs):
    ids, labels = batch()
    inputs = {"labels": labels, **inputs}
    if "shift_labels" in inputs:
        inputs["shift_labels"] = labels.roll(-1, 1)
    plain, fused = pair(kind, **changes)
    (want, want_gradients), (got, got_gradients) = run(plain, ids, **inputs), run(fused, ids, **inputs)
    assert got.logits is None
    assert calls == [(27, 16)]
    for name in ("loss", "lm_loss", "aux_loss", "z_loss"):
        if getattr(want, name) is not None:
            assert_matches(name, getattr(got, name), getattr(want, name))
    for name, gradient in want_gradients.items():
        assert_matches(name, got_gradients[name], gradient, 2e-5)


def test_logits_are_there_where_they_are_wanted(calls):
    ids, labels = batch()
    plain, fused = pair()
    for inputs, is_training, in_evaluation, are_skipped in (
        ({"labels": labels}, False, False, False),
        ({"labels": labels}, False, True, True),
        ({"labels": labels, "skip_logits": True}, False, False, True),
        ({"labels": labels, "skip_logits": False}, True, False, False),
        ({}, True, True, False),
        ({"logits_to_keep": 1}, False, True, False),
    ):
        calls.clear()
        plain.train(is_training), fused.train(is_training)
        fuse_head(fused, in_evaluation)
        got = fused(input_ids=ids, **inputs)
        want = plain(input_ids=ids, **{name: value for name, value in inputs.items() if name != "skip_logits"})
        assert (got.logits is None, len(calls)) == (are_skipped, are_skipped)
        assert want.logits is not None
        if not are_skipped:
            assert torch.equal(got.logits, want.logits)
        if "labels" in inputs:
            assert_matches("loss", got.loss, want.loss)


# What families do between head and loss: nothing, a factor, a divisor, a cap, a bias, and what is no such thing.
HEADS = {
    "llama": ({}, (1.0, 0.0)),
    "cohere": ({"logit_scale": 0.0625}, (0.0625, 0.0)),
    "granitemoe": ({"logits_scaling": 8.0}, (0.125, 0.0)),
    "gemma2": ({"final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "phi": ({}, (1.0, 0.0)),
}


@pytest.mark.parametrize(
    "family, changes, want",
    [
        pytest.param(name, *case, marks=[pytest.mark.slow] * (case == ({}, (1.0, 0.0)) and name == "llama"))
        for name, case in HEADS.items()
    ],
    ids=HEADS,
)
def test_the_heads_of_other_families(calls, family, changes, want):
    """Loss and every gradient equal those of transformers' own head, whatever it does to its logits."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, pad_token_id=0, **shape, **changes
    )
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(DEVICE).eval()
    torch.nn.init.normal_(plain.get_output_embeddings().weight)
    if (bias := plain.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias)
    ids, labels = batch()
    fused = deepcopy(plain)
    fuse_head(fused, in_evaluation=True)
    (output, gradients), (got, got_gradients) = (run(model, ids, labels=labels) for model in (plain, fused))
    assert got.logits is None and len(calls) == 1
    assert (fused._fused_head.scale, fused._fused_head.softcap or 0.0) == pytest.approx(want, rel=1e-4)
    assert_matches("loss", got.loss, output.loss)
    for name, gradient in gradients.items():
        if gradient is not None:
            assert_matches(name, got_gradients[name], gradient, 2e-5)


def test_logits_that_are_changed_in_a_way_we_do_not_know_are_formed(calls):
    ids, labels = batch()
    plain = tiny_model("llama").to(DEVICE).train()

    class Sine(type(plain)):
        def forward(self, input_ids, labels=None, **kwargs):
            logits = super().forward(input_ids, **kwargs).logits.sin()
            return CausalLMOutput(self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY), logits)

    plain.__class__ = Sine
    fused = deepcopy(plain)
    fuse_head(fused)
    assert_matches("loss", fused(input_ids=ids, labels=labels).loss, plain(input_ids=ids, labels=labels).loss)
    assert calls == []


@pytest.mark.parametrize("is_training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses_per_source_are_the_same(calls, is_training):
    measured = []
    for model in pair():
        tap, meter = LossRecorder(), SourceLosses(("new", "replay"))
        tap.attach(model.train(is_training))
        if measured:
            fuse_head(model, in_evaluation=True)
        for seed in range(2):
            ids, labels = batch(seed=seed)
            with tap.tell(meter.listener(torch.tensor([0, 1, 0]))):
                loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(31)).lm_loss
        measured.append(meter.pop() | {"loss": loss.item()})
    assert len(calls) == 2
    assert set(measured[0]) == {"lm_loss", "lm_loss/new", "lm_loss/replay", "loss"}
    assert measured[1] == pytest.approx(measured[0], rel=1e-6)


def test_the_loss_comes_from_the_call_of_the_head_with_its_hooks(calls):
    """As the hooks of FSDP2 need it: before the product, and on an output whose gradient comes."""
    ids, labels = batch()
    _, hooked = pair()
    seen = []

    def after(module, args, output):
        seen.append("after")
        if output.requires_grad:
            output.register_hook(lambda _: seen.append("backward"))

    hooked.lm_head.register_forward_pre_hook(lambda *_: seen.append("before"))
    hooked.lm_head.register_forward_hook(after)
    hooked(input_ids=ids, labels=labels).loss.backward()
    assert seen == ["before", "after"] * 2 + ["backward"]  # the first call is that over two tokens
    assert len(calls) == 1


def test_heads_that_cannot_be_fused(calls):
    ids, labels = batch()
    plain, _ = pair()
    adapted = get_peft_model(deepcopy(plain), LoraConfig(target_modules=["lm_head"], r=2)).get_base_model()
    replaced = deepcopy(plain)
    replaced.lm_head.forward = lambda states: nn.Linear.forward(replaced.lm_head, states) * 2
    for model, reason in ((adapted, "not a linear layer"), (replaced, "replaced already")):
        with pytest.raises(ValueError, match=reason):
            fuse_head(model)
    _, other_loss = pair()
    other_loss.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    output = other_loss(input_ids=ids, labels=labels, output_router_logits=False)
    assert torch.equal(output.loss, output.logits.square().mean())
    assert calls == []


def test_a_copy_of_a_fused_model_has_a_head_of_its_own():
    ids, labels = batch()
    plain, fused = pair()
    fuse_head(fused)  # twice is the same as once
    copy = deepcopy(fused)
    with torch.no_grad():
        copy.lm_head.weight.zero_()
    assert copy(input_ids=ids, labels=labels).lm_loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item())
    assert_matches("loss", fused(input_ids=ids, labels=labels).loss, plain(input_ids=ids, labels=labels).loss)


needs_liger = pytest.mark.skipif(not is_installed("liger_kernel"), reason="liger-kernel is not installed")
GROUPED_QUERIES = {"num_attention_heads": 4, "num_key_value_heads": 2}


def changed_modules(model):
    """Names of the modules that hold a method of their own, and those methods' names."""
    names = ("forward", "rotate_query_and_key")
    return {(path, name) for path, module in model.named_modules() for name in names if name in vars(module)}


NORMS = {("model.norm", "forward")} | {
    (f"model.layers.{layer}.{norm}", "forward")
    for layer in (0, 1)
    for norm in ("input_layernorm", "post_attention_layernorm")
}
ROPES = {(f"model.layers.{layer}.self_attn", "rotate_query_and_key") for layer in (0, 1)}
HEAD = {("", "forward"), ("lm_head", "forward")}


MLPS = {(f"model.layers.{layer}.mlp", "forward") for layer in (0, 1)}
SHARED = {(f"{path}.shared_experts", name) for path, name in MLPS}
# Changed fields of the model, what is left out of the kernels, what changes.
PARTS = {
    "all of the default model": ({}, (), NORMS | ROPES | HEAD),
    "shared experts": ({"hidden_act": "silu"}, (), NORMS | ROPES | HEAD | SHARED),
    "dense": ({"hidden_act": "gelu_pytorch_tanh", **DENSE}, (), NORMS | ROPES | HEAD | MLPS),
    "no shared": (
        {"hidden_act": "silu", "num_shared_experts": 0, "moe_intermediate_size": 8},
        ("rope",),
        NORMS | HEAD,
    ),
    "layer norm": ({"norm_type": "layernorm"}, (), ROPES | HEAD),
    "two left out": ({"hidden_act": "silu"}, ("rms_norm", "swiglu"), ROPES | HEAD),
    "no fused head": ({}, ("fused_linear_cross_entropy",), NORMS | ROPES),
    "nothing": ({"hidden_act": "silu"}, ("rope", "rms_norm", "swiglu", "geglu", "fused_linear_cross_entropy"), set()),
}


@needs_liger
@pytest.mark.parametrize("changes, left_out, want", PARTS.values(), ids=PARTS)
def test_what_is_asked_for_and_possible_is_changed_in_this_model_alone(changes, left_out, want):
    """Twice is once; classes and torch's functions stay; norms keep our epsilon; other heads get the layers only."""
    from liger_kernel.transformers import LigerRMSNorm

    classes = (CptMoeForCausalLM, CptMoeAttention, CptMoeRMSNorm, nn.Linear)
    plain = tiny_model("cpt_moe", rms_norm_eps=3e-4, **changes)  # the first of a process writes on its class
    before = [dict(vars(one)) for one in classes], F.cross_entropy
    model = deepcopy(plain)
    for _ in range(2):
        apply_liger_kernel_to_cpt_moe(model=model, **dict.fromkeys(left_out, False))
    assert changed_modules(model) == want
    assert changed_modules(plain) == set() and before == ([dict(vars(one)) for one in classes], F.cross_entropy)
    for norm in (part for part in model.modules() if isinstance(part, CptMoeRMSNorm) and NORMS <= want):
        assert norm.forward.__func__ is LigerRMSNorm.forward
        assert (norm.casting_mode, norm.offset, norm.variance_epsilon) == ("llama", 0.0, 3e-4)
    classifier = AutoModelForSequenceClassification.from_config(CONFIGS["cpt_moe"](num_labels=3, **changes))
    for headless in (classifier, plain.model):
        apply_liger_kernel_to_cpt_moe(model=headless, **dict.fromkeys(left_out, False))
        assert len(changed_modules(headless)) == len(want - HEAD)


@needs_liger
@pytest.mark.parametrize("rotated", [6, 8])
def test_rotation(rotated):
    def states(heads):
        return torch.randn(2, 5, heads, 8, device=DEVICE).requires_grad_()

    query, key = states(4), states(2)
    angles = torch.randn(2, 5, rotated // 2, device=DEVICE)
    angles = torch.cat((angles, angles), dim=-1)
    upstream = torch.randn(2, 4, 5, 8, device=DEVICE), torch.randn(2, 2, 5, 8, device=DEVICE)
    want = [rotate(one.transpose(1, 2), angles.cos(), angles.sin()) for one in (query, key)]
    want_gradients = torch.autograd.grad(want, (query, key), upstream)
    projected = [one * 1.0 for one in (query, key)]  # rotated in place, as the outputs of a projection are
    got = liger_rotate_query_and_key(*(one.transpose(1, 2) for one in projected), angles.cos(), angles.sin())
    got_gradients = torch.autograd.grad(got, (query, key), [one.clone() for one in upstream])
    for left, right in zip((*got, *got_gradients), (*want, *want_gradients), strict=True):
        assert_matches("states or gradient", left, right)


def assert_same_step(kind, fraction, limit, left_out=(), **changes):
    """A step of a model with and without Liger's kernels; the rotation takes a fraction of each head."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": fraction}
    plain = tiny_model(kind, num_hidden_layers=1, **GROUPED_QUERIES, rope_parameters=rope, **changes).to(DEVICE)
    fused = deepcopy(plain)
    apply_liger_kernel_to_cpt_moe(model=fused, **dict.fromkeys(left_out, False))
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    packed = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4], device=DEVICE).expand(2, -1)
    losses = []
    for model in (plain, fused):
        output = model.train()(input_ids=ids, labels=ids, position_ids=packed, num_items_in_batch=12)
        output.loss.backward()
        losses.append(output.loss)
    assert_matches("loss", losses[1], losses[0], limit)
    for (name, want), got in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert_matches(name, got.grad, want.grad, limit)


@needs_liger
@pytest.mark.parametrize(
    "kind, fraction", [("cpt_moe", 0.5), pytest.param("cpt_moe switch", 1.0, marks=pytest.mark.slow)]
)
def test_a_step_gives_the_same_loss_and_gradients(kind, fraction):
    """With what Triton's interpreter can run of Liger."""
    assert_same_step(kind, fraction, 2e-5, left_out=("rms_norm", "swiglu", "geglu"))


@needs_liger
@pytest.mark.gpu
@pytest.mark.parametrize("hidden_act", ["gelu", "silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("changes", [{}, DENSE, {"norm_type": "layernorm"}], ids=["moe", "dense", "layernorm"])
def test_a_step_with_every_kernel_gives_the_same_loss_and_gradients(changes, hidden_act):
    assert_same_step("cpt_moe", 0.5, 1e-4, hidden_act=hidden_act, **changes)


@needs_liger
@pytest.mark.gpu
def test_norm_in_half_precision_rounds_where_ours_does():
    norm = CptMoeRMSNorm(64, 1e-5).to(DEVICE, torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    model = tiny_model("cpt_moe", hidden_size=64)
    model.model.norm = norm
    states = torch.randn(7, 64, device=DEVICE, dtype=torch.bfloat16)
    want = norm(states)
    apply_liger_kernel_to_cpt_moe(model=model)
    assert_matches("norm", norm(states), want, 1e-3)


@needs_liger
def test_transformers_finds_us_through_ligers_table():
    register_with_liger()
    model = AutoModelForCausalLM.from_config(CptMoeConfig(**CONFIGS["cpt_moe"]().to_diff_dict()))
    apply_liger_kernel(model, {"rms_norm": False})
    assert changed_modules(model) == ROPES | HEAD


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="Pass model=...: .* never into its classes"):
        apply_liger_kernel_to_cpt_moe()
    model = tiny_model("cpt_moe")
    with pytest.raises(ValueError, match="cross_entropy=True would replace torch's cross entropy"):
        apply_liger_kernel_to_cpt_moe(cross_entropy=True, model=model)
    assert changed_modules(model) == set()
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match=r"apply_liger_kernel_to_cpt_moe needs .* pip install 'hf_moe_cpt\[liger\]'"):
        apply_liger_kernel_to_cpt_moe(model=model)
