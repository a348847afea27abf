"""Outputs, losses kept apart, cache and generation, padding, packing, checkpointing and saving of the heads."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.losses_cpt_moe import router_penalties
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM, CptMoeForSequenceClassification, CptMoeModel
from tests.helpers.tolerances import assert_matches


PRESETS = ("dense-tiny", "pb-granular-tiny", "sb-granular-tiny", "pb-switch-tiny", "sb-switch-tiny")
SIZE = {"vocab_size": 256, "num_hidden_layers": 2}


def model_of(preset: str, **fields) -> CptMoeForCausalLM:
    torch.manual_seed(0)
    return CptMoeForCausalLM(CptMoeConfig.from_preset(preset, **{**SIZE, **fields})).eval()


def tokens_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns))


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


def test_hidden_states_and_attentions_are_recorded() -> None:
    model, tokens = model_of("pb-granular-tiny"), tokens_of(2, 16)
    model.set_attn_implementation("eager")
    out = model(input_ids=tokens, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(2, 16, 128)] * 3
    assert [a.shape for a in out.attentions] == [(2, 4, 16, 16)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 16))


@pytest.mark.parametrize("preset", PRESETS)
def test_decoding_with_a_cache_equals_one_forward(preset: str) -> None:
    model, tokens = model_of(preset), tokens_of(2, 12)
    want = model(input_ids=tokens).logits
    cache, rows = None, []
    for column in tokens.split([5, 1, 1, 5], dim=1):
        out = model(input_ids=column, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits)
    assert_matches("logits", torch.cat(rows, dim=1), want)


@pytest.mark.parametrize("preset", ["pb-granular-tiny", "sb-switch-tiny"])
def test_generation_is_greedy_search_and_left_padding_does_not_change_it(preset: str) -> None:
    model, prompt = model_of(preset), tokens_of(1, 6)
    want = prompt
    for _ in range(5):
        want = torch.cat([want, model(input_ids=want).logits[:, -1:].argmax(-1)], dim=1)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **settings), want)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    batch = torch.cat([padded, tokens_of(1, 9)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    got = model.generate(batch, attention_mask=mask, **settings)
    assert torch.equal(got[0, 3:], want[0])
    static = model.generate(batch, attention_mask=mask, cache_implementation="static", **settings)
    assert torch.equal(static, got)


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


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(implementation: str, use_cache: bool) -> None:
    model = model_of("pb-granular-tiny")
    model.set_attn_implementation(implementation)
    first, second = tokens_of(1, 7), tokens_of(1, 9)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=use_cache).logits
    assert_matches("first", packed[:, :7], model(input_ids=first).logits)
    assert_matches("second", packed[:, 7:], model(input_ids=second).logits)


def test_logits_to_keep() -> None:
    model, tokens = model_of("pb-switch-tiny"), tokens_of(2, 10)
    full = model(input_ids=tokens).logits
    assert_matches("last 3", model(input_ids=tokens, logits_to_keep=3).logits, full[:, -3:])
    kept = torch.tensor([0, 4])
    assert_matches("chosen", model(input_ids=tokens, logits_to_keep=kept).logits, full[:, kept])


def test_embeddings_instead_of_ids_and_neither() -> None:
    model, tokens = model_of("pb-granular-tiny"), tokens_of(2, 10)
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    assert torch.equal(embedded, model(input_ids=tokens).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("preset", PRESETS)
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


@pytest.mark.parametrize("preset", ["pb-granular-tiny", "sb-switch-tiny", "dense-tiny"])
def test_saving_and_loading_is_exact(preset: str, tmp_path) -> None:
    model, tokens = model_of(preset), tokens_of(2, 10)
    model.save_pretrained(tmp_path)
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
