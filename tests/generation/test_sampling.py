"""Drawing and scoring responses: exact distributions, no dependence on neighbours, and what reward models read."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.generation import sampling
from tests.helpers.tiny_models import SIZES, tiny_model


LEAST_P = 1e-3
VOCABULARY = 300
STOP = list(range(30))
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_byte_level_bpe(["What comes after 1? It is 2. "] * 5, VOCABULARY, progress=False)


@pytest.fixture(scope="module")
def policy() -> torch.nn.Module:
    """A model whose next tokens are far from uniform."""
    model = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=128)
    model.lm_head.weight.data *= 30
    return model.eval()


def _sampler(policy, tokenizer, batch_size=8, stop=STOP, **changes) -> sampling.TransformersSampler:
    settings = {"num_samples": 3, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 10, "seed": 0, **changes}
    return sampling.TransformersSampler(policy, tokenizer, sampling.Sampling(**settings), stop, batch_size)


def _requests(tokenizer, indices, num_samples=3) -> list[sampling.Request]:
    prompts = {
        index: sampling.encode_prompt("What comes after " + "1 " * (index % 7) + "?", tokenizer) for index in indices
    }
    return [sampling.Request(index, sample, prompts[index]) for index in indices for sample in range(num_samples)]


def test_a_number_picks_the_token_whose_stretch_holds_it():
    logits = torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25]])).repeat(6, 1)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert sampling.tokens_at(logits, uniform).tolist() == [1, 1, 3, 3, 4, 4]
    unlikely_last = torch.tensor([[0.0, -torch.inf]])
    assert sampling.tokens_at(unlikely_last, uniform[-1:]).tolist() == [0]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_first_tokens_follow_the_policy(policy, tokenizer, temperature, top_p):
    count = 2000
    sampler = _sampler(
        policy, tokenizer, 1000, [0], temperature=temperature, top_p=top_p, max_new_tokens=1, num_samples=count
    )
    ids = sampling.encode_prompt("What?", tokenizer)
    drawn: list[int] = []

    def generate(**inputs):
        output = policy.generate(**inputs)
        drawn.extend(output[:, -1].tolist())
        return output

    sampler.model = SimpleNamespace(device=policy.device, generate=generate)
    sampler([sampling.Request(0, sample, ids) for sample in range(count)])
    with torch.no_grad():
        chances = (policy(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
    ranked = chances.sort(descending=True)
    inside = ranked.values.cumsum(0) - ranked.values < top_p
    chances[ranked.indices[~inside]] = 0
    expected = (chances / chances.sum() * count).numpy()
    counts = np.bincount(drawn, minlength=VOCABULARY)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    pooled = [*counts[common], counts[~common].sum()], [*expected[common], expected[~common].sum()]
    keep = np.array(pooled[1]) > 0
    assert common.sum() > 10 and chisquare(np.array(pooled[0])[keep], np.array(pooled[1])[keep]).pvalue > LEAST_P


def test_a_response_depends_on_its_prompt_index_and_sample_alone(policy, tokenizer):
    requests = _requests(tokenizer, range(9))
    whole = _sampler(policy, tokenizer, 8)(requests)
    assert len({response.text for response in whole}) > 20 and len({r.finished for r in whole}) == 2
    assert _sampler(policy, tokenizer, 1)(requests) == whole
    seen: list[int] = []
    assert _sampler(policy, tokenizer, 5)(requests[::-1], seen.append) == whole[::-1]
    assert seen == [5, 5, 5, 5, 5, 2]
    assert _sampler(policy, tokenizer, 8)(requests[6:9]) == whole[6:9]
    more = _sampler(policy, tokenizer, 8, num_samples=5)(_requests(tokenizer, range(9), 5))
    assert [response for place, response in enumerate(more) if place % 5 < 3] == whole


def test_seed_and_index_matter_and_the_models_own_settings_do_not(policy, tokenizer):
    requests = _requests(tokenizer, [0])
    moved = [request._replace(prompt_index=1) for request in requests]
    first = _sampler(policy, tokenizer)(requests)
    assert _sampler(policy, tokenizer, seed=1)(requests) != first != _sampler(policy, tokenizer)(moved)
    requests = _requests(tokenizer, range(3))
    plain, changed = (tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=128) for _ in range(2))
    changed.generation_config = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, max_length=3)
    assert _sampler(changed, tokenizer)(requests) == _sampler(plain, tokenizer)(requests)


def test_a_response_ends_before_its_first_stop_token_and_keeps_its_first_space(tokenizer):
    prompt, text = tokenizer("It is")["input_ids"], tokenizer(" 2.")["input_ids"]
    assert sampling.read_response(prompt, [*text, 0, *text, 0], [0], tokenizer) == (" 2.", True, len(text))
    assert sampling.read_response(prompt, [*text, 1], [0], tokenizer) == (
        " 2.",
        False,
        len(text) + 1,
    )  # padding is no text
    assert sampling.read_response(prompt, [0], [0], tokenizer) == ("", True, 0)
    words = Tokenizer(models.WordLevel({"▁It": 0, "▁is": 1, "▁2": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([1, 2]) == "is 2"
    assert sampling.read_response([0], [1, 2], [3], tokenizer).text == " is 2"


def test_conversations_are_continued_after_the_template(tokenizer):
    chat = train_byte_level_bpe(["What?"], 260, progress=False)
    chat.chat_template = CHAT_TEMPLATE
    turns = [{"role": "user", "content": "What?"}]
    assert chat.decode(sampling.encode_prompt(turns, chat)) == "<user>What?<|endoftext|><assistant>"
    with pytest.raises(ValueError, match="the prompt '' has no token: remove it"):
        sampling.encode_prompt("", tokenizer)


def test_stop_tokens_and_room_for_a_prompt(tokenizer):
    assert sampling.stop_tokens(GenerationConfig(eos_token_id=[7, 9]), tokenizer) == [0, 7, 9]
    assert sampling.stop_tokens(GenerationConfig(eos_token_id=None), tokenizer) == [0]
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert sampling.stop_tokens(GenerationConfig(eos_token_id=5), without) == [5]
    with pytest.raises(ValueError, match="has no EOS token and the policy's generation configuration has none"):
        sampling.stop_tokens(GenerationConfig(eos_token_id=None), without)
    config = LlamaConfig(max_position_embeddings=100)
    assert sampling.room_for_prompt(config, 60, None) == 40
    assert (sampling.room_for_prompt(config, 60, 30), sampling.room_for_prompt(config, 60, 50)) == (30, 40)
    with pytest.raises(ValueError, match="max_new_tokens=100 leaves no room for a prompt: the policy has 100"):
        sampling.room_for_prompt(config, 100, None)


def test_a_tokenizer_without_padding_is_padded_by_a_stop_token(policy, tokenizer):
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    requests = _requests(tokenizer, range(4))
    assert _sampler(policy, without)(requests) == _sampler(policy, tokenizer)(requests)
    assert without.pad_token is None


class _FakeEngine:
    """Stands for vllm.LLM: answers each request with its seed's digits, ends every second one."""

    def __init__(self, **arguments) -> None:
        self.arguments = arguments

    def generate(self, prompts, parameters, use_tqdm):
        self.prompts, self.parameters = prompts, parameters
        outputs = []
        for number, parameter in enumerate(parameters):
            ends = number % 2 == 0
            ids = [65 + parameter.seed % 20, *([0] if ends else [])]
            answer = SimpleNamespace(token_ids=ids, finish_reason="stop" if ends else "length")
            outputs.append(SimpleNamespace(outputs=[answer]))
        return outputs


def test_vllm_gets_token_ids_and_a_seed_for_each_response_or_is_asked_for(tokenizer, monkeypatch, tmp_path):
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = _FakeEngine, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", fake)
    tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 10, "vllm_options": '{"max_model_len": 64}'}
    arguments = sampling.PolicyArguments(use_vllm=True, **asked)
    policy = sampling.Policy(str(tmp_path), sampling.LoadOptions(dtype="bfloat16"), arguments, num_samples=3, seed=0)
    sampler = policy.load()
    assert isinstance(sampler, sampling.VllmSampler)
    told = {"model": str(tmp_path), "dtype": "bfloat16", "revision": "main", "trust_remote_code": False}
    assert sampler.engine.arguments == told | {"max_model_len": 64}
    requests = _requests(tokenizer, range(2))
    responses = sampler(requests)
    assert [r.finished for r in responses] == [True, False] * 3 and all(r.num_tokens == 1 for r in responses)
    assert sampler.engine.prompts == [{"prompt_token_ids": request.prompt_ids} for request in requests]
    first = sampler.engine.parameters
    assert len({parameter.seed for parameter in first}) == 6
    assert (first[0].temperature, first[0].top_p, first[0].max_tokens) == (0.8, 0.9, 10)
    assert first[0].stop_token_ids == policy.stop
    sampler(requests[::-1])
    assert [p.seed for p in sampler.engine.parameters[::-1]] == [p.seed for p in first]
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="--use_vllm needs the package vllm, which is not installed: pip install"):
        sampling.require_vllm()


def _reward_model(**changes) -> LlamaForSequenceClassification:
    torch.manual_seed(1)
    sizes = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "num_labels": 1, "pad_token_id": 1}
    return LlamaForSequenceClassification(LlamaConfig(**{**sizes, **changes})).eval()


PAIRS = [("What comes after " + "1 " * i + "?", f" It is {i}." * (1 + i % 4)) for i in range(9)]


def _alone(model, tokenizer, text: str) -> float:
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


def test_scores_are_the_models_own_whatever_the_batch(tokenizer):
    model = _reward_model()
    expected = [_alone(model, tokenizer, prompt + response + tokenizer.eos_token) for prompt, response in PAIRS]
    assert len(set(expected)) == len(PAIRS)
    for batch_size in (1, 4, 32):
        scores = sampling.RewardScorer(model, tokenizer, batch_size)(PAIRS)
        assert [score.reward for score in scores] == pytest.approx(expected, abs=1e-6)
        assert not any(score.was_cut for score in scores)


def test_chat_templates_are_used_where_there_is_one(tokenizer):
    chat = train_byte_level_bpe(["What comes after 1? It is 2. "] * 5, VOCABULARY, progress=False)
    chat.chat_template = CHAT_TEMPLATE
    model = _reward_model()
    scorer = sampling.RewardScorer(model, chat, 4)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1?"}]
    assert (
        scorer.text_of(turns, "2.") == "<system>Be brief.<|endoftext|><user>1?<|endoftext|><assistant>2.<|endoftext|>"
    )
    assert scorer.text_of("1?", "2.") == "<user>1?<|endoftext|><assistant>2.<|endoftext|>"
    (score,) = scorer([(turns, "2.")])
    assert score.reward == pytest.approx(_alone(model, chat, scorer.text_of(turns, "2.")), abs=1e-6)
    plain = sampling.RewardScorer(model, chat, 4, text_format="plain")
    assert plain.text_of("1?", " 2.") == "1? 2.<|endoftext|>"
    assert plain.text_of(turns, "2.") == "Be brief.\n\n1?\n\n2.<|endoftext|>"
    with pytest.raises(ValueError, match="has no chat template for text format 'chat': choose plain, pair or auto"):
        sampling.RewardScorer(model, tokenizer, 4, text_format="chat")


def test_encoders_read_pairs_with_token_types():
    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", truncation_side="left")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    model = BertForSequenceClassification(config).eval()
    (long, short) = sampling.RewardScorer(model, tokenizer, 2, text_format="pair")([("a b c", "d d"), ("a", "b")])
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor([[2, 4, 3, 5, 3]]), token_type_ids=torch.tensor([[0, 0, 0, 1, 1]])
        ).logits.item()
    assert short.reward == pytest.approx(expected, abs=1e-6) and long.reward != short.reward
    cut = sampling.RewardScorer(model, tokenizer, 2, max_length=6, text_format="pair")(
        [("a b c", "d d"), ("c", "d d")]
    )
    assert [score.was_cut for score in cut] == [True, False]
    assert cut[0].reward == pytest.approx(cut[1].reward, abs=1e-6)  # the prompt loses its beginning, not the answer


def test_long_texts_lose_their_beginning_and_say_so(tokenizer):
    model = _reward_model()
    left = train_byte_level_bpe(["What comes after 1? It is 2. "] * 5, VOCABULARY, progress=False)
    left.truncation_side = "left"
    text = PAIRS[8][0] + PAIRS[8][1] + left.eos_token
    ids = left(text)["input_ids"]
    (score,) = sampling.RewardScorer(model, left, 4, max_length=10)([PAIRS[8]])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids[-10:]])).logits.item()
    assert len(ids) > 10 and score.was_cut and score.reward == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("pad", [None, "<|endoftext|>", "own"], ids=["none", "EOS", "own"])
def test_a_reward_model_without_padding_takes_the_tokenizers_or_scores_one_text_at_a_time(tokenizer, pad):
    """With EOS as padding the model would read the token before the EOS of each text."""
    inner, own = tokenizer.backend_tokenizer, tokenizer.pad_token
    special = {"eos_token": "<|endoftext|>", "pad_token": own if pad == "own" else pad}
    model = _reward_model(pad_token_id=None)
    scorer = sampling.RewardScorer(model, PreTrainedTokenizerFast(tokenizer_object=inner, **special), 4)
    assert (scorer.pad, scorer.batch_size) == ((1, 4) if pad == "own" else (None, 1))
    expected = [_alone(model, tokenizer, prompt + response + "<|endoftext|>") for prompt, response in PAIRS]
    assert [score.reward for score in scorer(PAIRS)] == pytest.approx(expected, abs=1e-6)


def test_a_reward_that_is_no_number_is_refused(tokenizer):
    model = _reward_model()
    model.score.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the reward model gives nan for the response ' It is"):
        sampling.RewardScorer(model, tokenizer, 4)(PAIRS[1:2])
