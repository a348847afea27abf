"""Outputs, losses kept apart, caches, padding, packing, gradient checkpointing, experts and saving of the heads.

That biases, norms and windows compute what Llama, Mistral, Qwen and OLMoE do: test_equal_to_transformers.py; what
`generate` makes of caches: test_generation.py.
"""

import pytest
import torch
from torch.nn.functional import gelu
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import (
    CptMoeExperts,
    CptMoeForCausalLM,
    CptMoeForSequenceClassification,
    CptMoeMLP,
    CptMoeModel,
    CptMoeSparseMoeBlock,
    router_penalties,
)
from tests.helpers.tolerances import assert_matches


SIZE = {"vocab_size": 256, "num_hidden_layers": 2}
PRESETS = (
    "dense-tiny",
    "pb-granular-tiny",
    "sb-granular-tiny",
    "lf-granular-tiny",
    "pb-switch-tiny",
    "sb-switch-tiny",
)
ATTENTION = {
    "biases, norms of heads": {"qkv_bias": True, "qk_norm": "head", "num_key_value_heads": 2},
    "all biases, norms of projections": {"attention_bias": True, "qk_norm": "projection", "num_key_value_heads": 1},
    "window": {"sliding_window": 4},
}


def model_of(preset: str, **fields) -> CptMoeForCausalLM:
    """In evaluation; `preset` may name a case of ATTENTION, whose biases, norms and attention weights then matter."""
    variant = ATTENTION.get(preset)
    torch.manual_seed(0)
    fields = {**SIZE, **(variant or {}), **fields}
    model = CptMoeForCausalLM(CptMoeConfig.from_preset("pb-switch-tiny" if variant else preset, **fields)).eval()
    for name, weight in model.named_parameters() if variant else ():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, -1.0, 1.0)
        elif ".self_attn." in name:
            weight.data *= 4
    return model


def tokens_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns))


@pytest.mark.parametrize("case", [*PRESETS, *ATTENTION])
def test_decoding_with_a_cache_equals_one_forward(case: str) -> None:
    model, tokens = model_of(case), tokens_of(2, 12)
    cache, rows = None, []
    for column in tokens.split([5, 1, 1, 5], dim=1):
        out = model(input_ids=column, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits)
    want = model(input_ids=tokens, use_cache=False).logits
    assert_matches("logits", torch.cat(rows, dim=1), want)
    model.set_attn_implementation("eager")
    assert_matches("eager", model(input_ids=tokens).logits, want)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["pb-granular-tiny", *ATTENTION])
def test_packed_documents_do_not_see_each_other(case: str, implementation: str) -> None:
    model = model_of(case)
    model.set_attn_implementation(implementation)
    first, second = tokens_of(1, 7), tokens_of(1, 9)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    for use_cache in (True, False):
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=use_cache).logits
        assert_matches("first", packed[:, :7], model(input_ids=first).logits)
        assert_matches("second", packed[:, 7:], model(input_ids=second).logits)


def test_a_token_sees_no_more_than_its_window() -> None:
    """Two layers of a window of 4 reach 6 tokens back, and exactly that far (beyond: rounding, 1e-7)."""
    model, tokens = model_of("window"), tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 3] = (tokens[0, 3] + 1) % 256
    differs = (model(tokens).logits - model(changed).logits).abs().amax(-1)[0]
    assert (differs > 1e-4).tolist() == [3 <= position <= 9 for position in range(12)]


@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_loss_is_the_pure_loss(preset: str) -> None:
    model, tokens = model_of(preset), tokens_of(2, 16)
    out = model(input_ids=tokens, labels=tokens)
    assert torch.equal(out.loss, out.lm_loss)
    assert torch.equal(out.loss, ForCausalLMLoss(out.logits, tokens, 256))
    assert out.aux_loss is None and out.router_logits is None


def test_training_loss_is_the_pure_loss_plus_weighted_penalties() -> None:
    model, tokens = model_of("pb-granular-tiny").train(), tokens_of(2, 16)
    out = model(input_ids=tokens, labels=tokens)
    aux, z_loss = router_penalties(out.router_logits, out.router_indices)
    torch.testing.assert_close((out.aux_loss, out.z_loss), (aux, z_loss))
    torch.testing.assert_close(out.loss, out.lm_loss + 0.01 * aux + 0.001 * z_loss)
    assert out.loss > out.lm_loss

    half = model(input_ids=tokens, labels=tokens, num_items_in_batch=2 * 30)
    torch.testing.assert_close(half.loss, out.loss / 2)
    pure = model(input_ids=tokens, labels=tokens, output_router_logits=False)
    assert pure.aux_loss is None and pure.router_logits is None
    assert torch.equal(pure.loss, out.lm_loss)


@pytest.mark.parametrize("preset", ["dense-tiny", "sb-granular-tiny"])
def test_a_model_without_penalties_trains_on_the_pure_loss(preset: str) -> None:
    model, tokens = model_of(preset).train(), tokens_of(2, 16)
    out = model(input_ids=tokens, labels=tokens, output_router_logits=True)
    assert torch.equal(out.loss, out.lm_loss)
    assert (out.aux_loss is None) == (preset == "dense-tiny")


@pytest.mark.parametrize("preset", ["pb-granular-tiny", "sb-switch-tiny"])
def test_recorded_indices_are_the_experts_really_used(preset: str) -> None:
    """A hook on the experts sees the same ids; and they can be recorded without the logits."""
    model, tokens = model_of(preset).train(), tokens_of(2, 16)
    seen = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    out = model(input_ids=tokens, output_router_indices=True, output_router_logits=False)
    assert out.router_logits is None and out.aux_loss is None
    assert all(map(torch.equal, out.router_indices, seen)) and len(seen) == 2
    assert out.router_indices[0].shape == (32, model.config.num_experts_per_tok)


def test_hidden_states_logits_to_keep_and_embeddings_instead_of_ids() -> None:
    model, tokens = model_of("pb-granular-tiny"), tokens_of(2, 16)
    model.set_attn_implementation("eager")
    out = model(input_ids=tokens, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(2, 16, 128)] * 3
    assert [a.shape for a in out.attentions] == [(2, 4, 16, 16)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 16))
    model, tokens = model_of("pb-granular-tiny"), tokens_of(2, 10)
    full = model(input_ids=tokens).logits
    assert_matches("last 3", model(input_ids=tokens, logits_to_keep=3).logits, full[:, -3:])
    kept = torch.tensor([0, 4])
    assert_matches("chosen", model(input_ids=tokens, logits_to_keep=kept).logits, full[:, kept])
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, full)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("preset", PRESETS)
def test_left_padding_changes_neither_losses_nor_loads(preset: str) -> None:
    """In training, where Sinkhorn's plan and the penalties could see it."""
    model, tokens = model_of(preset).train(), tokens_of(1, 12)
    record = preset != "dense-tiny"
    alone = model(input_ids=tokens, labels=tokens, output_router_logits=record)
    padded = torch.cat([torch.full((1, 4), 9), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    out = model(
        input_ids=padded,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        labels=padded.masked_fill(mask == 0, -100).index_fill(1, torch.tensor([4]), -100),
        output_router_logits=record,
    )
    assert_matches("logits", out.logits[:, 4:], alone.logits)
    torch.testing.assert_close(out.lm_loss, alone.lm_loss)
    torch.testing.assert_close(out.loss, alone.loss)
    if record:
        torch.testing.assert_close((out.aux_loss, out.z_loss), (alone.aux_loss, alone.z_loss))


def gradients(model: CptMoeForCausalLM) -> dict[str, torch.Tensor]:
    tokens = torch.arange(20).view(2, 10)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


NO_PENALTY = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "output_router_logits": True}


@pytest.mark.parametrize(
    ("preset", "fields", "use_reentrant"),
    [
        ("pb-granular-tiny", {}, False),
        ("sb-granular-tiny", {}, False),
        pytest.param("dense-tiny", {}, False, marks=pytest.mark.slow),
        pytest.param("sb-granular-tiny", {}, True, marks=pytest.mark.slow),
        ("dense-tiny", {}, True),
        ("pb-granular-tiny", NO_PENALTY, True),
    ],
)
def test_checkpointing_keeps_every_bit_of_the_gradients(preset: str, fields: dict, use_reentrant: bool) -> None:
    """Re-entrant checkpointing only where no penalty is on."""
    want = gradients(model_of(preset, **fields))
    for settings in ({"use_reentrant": use_reentrant}, *([] if use_reentrant else [None])):
        model = model_of(preset, **fields)
        model.gradient_checkpointing_enable(settings)
        if use_reentrant:
            model.enable_input_require_grads()
        got = gradients(model)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_reentrance_is_refused_where_a_penalty_would_lose_its_gradient() -> None:
    with pytest.raises(ValueError, match='cuts the router penalties off.*"use_reentrant": False'):
        model_of("pb-granular-tiny").train().gradient_checkpointing_enable({"use_reentrant": True})
    # Switched on afterwards: refused at the forward that would train on it.
    model = model_of("pb-granular-tiny", output_router_logits=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    tokens = torch.arange(64).view(2, 32)
    with pytest.raises(ValueError, match="cuts the router penalties off"):
        model(input_ids=tokens, labels=tokens, output_router_logits=True)
    assert model.eval()(input_ids=tokens, labels=tokens, output_router_logits=True).aux_loss > 0


EDGES = {"one token": (1, 8, 1), "tokens < experts": (5, 31, 3), "top-1": (64, 8, 1), "all experts": (9, 4, 4)}


def experts(E: int, K: int, implementation: str, dtype: torch.dtype) -> CptMoeExperts:
    config = CptMoeConfig.from_preset(
        "pb-granular-tiny", hidden_size=32, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=16
    )
    config._experts_implementation = implementation
    module = CptMoeExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return module


def loop(tokens: torch.Tensor, index: torch.Tensor, gates: torch.Tensor, module: CptMoeExperts) -> torch.Tensor:
    rows = []
    for token, chosen, gate in zip(tokens, index, gates, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(chosen, gate, strict=True):
            gate_part, up = (module.gate_up_proj[expert] @ token).chunk(2)
            row = row + weight * (module.down_proj[expert] @ (gelu(gate_part) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("T", "E", "K"), EDGES.values(), ids=EDGES)
def test_implementations_equal_the_loop(implementation: str, T: int, E: int, K: int) -> None:
    tokens = torch.randn(T, 32)
    index = torch.rand(T, E).argsort(1)[:, :K]
    gates = torch.rand(T, K)
    upstream = torch.randn(T, 32)
    results = {}
    for name, dtype in ((implementation, torch.float32), ("loop", torch.float64)):
        module = experts(E, K, name if name != "loop" else "eager", dtype)
        inputs = [value.detach().to(dtype, copy=True).requires_grad_() for value in (tokens, gates)]
        arguments = (inputs[0], index, inputs[1])
        output = loop(*arguments, module) if name == "loop" else module(*arguments)
        output.backward(upstream.to(dtype))
        gradients = [value.grad for value in [*inputs, module.gate_up_proj, module.down_proj]]
        results[name] = dict(zip(("tokens", "gates", "gate_up_proj", "down_proj"), gradients, strict=True))
        results[name]["output"] = output
    for name, want in results["loop"].items():
        assert_matches(name, results[implementation][name], want)


def test_a_missing_id_of_another_rank_adds_nothing() -> None:
    """Expert parallelism marks it with the id `num_experts`."""
    module = experts(4, 2, "eager", torch.float64)
    tokens, gates = torch.randn(6, 32, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    index = torch.tensor([[0, 4], [4, 4], [3, 1], [4, 2], [1, 0], [2, 3]])
    got = module(tokens, index, gates)
    want = loop(tokens, index.clamp(max=3), gates.masked_fill(index == 4, 0.0), module)
    assert_matches("output", got, want)
    assert (got[1] == 0).all()


def test_shared_experts_are_added_with_weight_one() -> None:
    config = CptMoeConfig.from_preset("pb-granular-tiny", num_shared_experts=2, moe_intermediate_size=16)
    config._experts_implementation = "eager"
    block = CptMoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert block.shared_experts.down_proj.weight.shape == (128, 32)
    hidden = torch.randn(2, 5, 128)
    tokens = hidden.view(10, 128)
    _, gates, index = block.gate(tokens)
    want = block.experts(tokens, index, gates) + block.shared_experts(tokens)
    assert_matches("block", block(hidden), want.view(2, 5, 128))


def test_the_activation_is_exact_gelu_unless_asked() -> None:
    hidden = torch.randn(3, 128)
    for act, function in {"gelu": gelu, "silu": ACT2FN["silu"]}.items():
        mlp = CptMoeMLP(CptMoeConfig.from_preset("dense-tiny", hidden_act=act), 16)
        want = mlp.down_proj(function(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
        assert torch.equal(mlp(hidden), want)


def test_the_implementation_is_chosen_as_in_transformers() -> None:
    config = CptMoeConfig.from_preset("pb-granular-tiny", vocab_size=64, num_hidden_layers=1)
    model = CptMoeForCausalLM(config)
    ours_or_theirs = "hf_moe_cpt" if torch.cuda.is_available() else "grouped_mm"
    assert model.config._experts_implementation == ours_or_theirs
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert model.model.layers[0].mlp.experts.config._experts_implementation == implementation
    batched = CptMoeForCausalLM._from_config(config, experts_implementation="batched_mm")
    assert batched.config._experts_implementation == "batched_mm"
    with pytest.raises(ValueError, match="nonesuch"):
        model.set_experts_implementation("nonesuch")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_multiply_in_the_dtype_of_autocast(implementation):
    """As linear layers do: with float32 weights and bfloat16 autocast the products are those of bfloat16 weights."""
    config = CptMoeConfig.from_preset("pb-granular-tiny", vocab_size=64, num_hidden_layers=1)
    torch.manual_seed(0)
    model = CptMoeForCausalLM._from_config(config, experts_implementation=implementation)
    block, seen = model.model.layers[0].mlp, []
    block.experts.register_forward_pre_hook(
        lambda module, args: seen.append((module.gate_up_proj.dtype, module.down_proj.dtype, args[0].dtype))
    )
    tokens = torch.randn(1, 24, config.hidden_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = block(tokens)
    assert seen == [(torch.bfloat16,) * 3] and block.experts.gate_up_proj.dtype == torch.float32
    low.float().square().sum().backward()
    assert block.experts.gate_up_proj.grad.dtype == torch.float32
    high = block(tokens)
    assert 0 < (low.float() - high).norm() / high.norm() < 2e-2


def test_a_model_runs_on_the_meta_device():
    """Shapes and costs are worked out there, and torch has no autocast for it."""
    with torch.device("meta"):
        model = CptMoeForCausalLM._from_config(
            CptMoeConfig.from_preset("pb-granular-tiny"), experts_implementation="grouped_mm", dtype=torch.bfloat16
        )
        logits = model(torch.zeros(2, 8, dtype=torch.long)).logits
    assert logits.shape == (2, 8, 4096) and logits.is_meta


@pytest.mark.parametrize(
    "preset", [*PRESETS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS[2:])]
)
def test_bf16_runs_and_follows_fp32(preset: str) -> None:
    model, tokens = model_of(preset), tokens_of(2, 16)
    want = model(input_ids=tokens).logits
    got = model.to(torch.bfloat16).train()(input_ids=tokens, labels=tokens)
    got.loss.backward()
    assert got.logits.dtype == torch.bfloat16 and torch.isfinite(got.loss)
    got = model.eval()(input_ids=tokens).logits
    assert (got.float() - want).square().mean().sqrt() < 0.15 * want.square().mean().sqrt()


def assert_same_weights(got: torch.nn.Module, want: torch.nn.Module) -> None:
    """Bit for bit. Logits may still differ by rounding: CPU kernels look at the alignment of a memory-mapped file."""
    got_values, want_values = got.state_dict(), want.state_dict()
    assert got_values.keys() == want_values.keys()
    assert all(torch.equal(got_values[name], want_values[name]) for name in want_values)


@pytest.mark.parametrize(
    "preset",
    [
        "lf-granular-tiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in PRESETS if name != "lf-granular-tiny"),
    ],
)
def test_saving_and_loading_is_exact(preset: str, tmp_path) -> None:
    model, tokens = model_of(preset), tokens_of(2, 10)
    biases = {name: bias.uniform_(-0.5, 0.5) for name, bias in model.named_buffers() if "correction_bias" in name}
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(half[name], bias) for name, bias in biases.items())  # an update is far below bfloat16
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is CptMoeForCausalLM
    assert_same_weights(loaded, model)
    assert_matches("logits", loaded(tokens).logits, model(tokens).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is CptMoeModel
    assert_same_weights(base, model.model)
    tied = model_of(preset, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_same_weights(again, tied)


def test_token_classification_and_question_answering_read_every_token_and_train(tmp_path) -> None:
    """Against the linear map of the decoder's states, and torch's cross entropy."""
    config = CptMoeConfig.from_preset("pb-granular-tiny", **SIZE, num_labels=3)
    tokens, labels = torch.randint(1, 256, (2, 10)), torch.randint(3, (2, 10))
    cross_entropy = torch.nn.functional.cross_entropy
    for auto in (AutoModelForTokenClassification, AutoModelForQuestionAnswering):
        model = auto.from_config(config).eval()
        hidden = model.model(input_ids=tokens).last_hidden_state
        if auto is AutoModelForTokenClassification:
            out, want = model(input_ids=tokens, labels=labels), model.score(hidden)
            got, loss = out.logits, cross_entropy(want.flatten(0, 1), labels.flatten())
        else:
            start, end = torch.tensor([1, 2]), torch.tensor([4, 9])
            out, want = model(input_ids=tokens, start_positions=start, end_positions=end), model.qa_outputs(hidden)
            got = torch.stack((out.start_logits, out.end_logits), dim=-1)
            loss = (cross_entropy(want[..., 0], start) + cross_entropy(want[..., 1], end)) / 2
        assert_matches(auto.__name__, got, want)
        torch.testing.assert_close(out.loss, loss)
        out.loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        model.save_pretrained(tmp_path / auto.__name__)
        assert_same_weights(auto.from_pretrained(tmp_path / auto.__name__), model)


def test_sequence_classification_reads_the_last_token_and_trains(tmp_path) -> None:
    config = CptMoeConfig.from_preset("pb-granular-tiny", **SIZE, num_labels=3, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert type(model) is CptMoeForSequenceClassification
    tokens = torch.randint(1, 256, (2, 10))
    tokens[0, 7:] = 0
    out = model(input_ids=tokens, attention_mask=(tokens != 0).long(), labels=torch.tensor([2, 0]))
    hidden = model.model(input_ids=tokens[:1, :7]).last_hidden_state[:, -1]
    assert_matches("logits", out.logits[:1], model.score(hidden))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, torch.tensor([2, 0])))
    out.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert_same_weights(again, model)
