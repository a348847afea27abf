"""Draw responses from a policy and score them with a reward model, both checked before any weight is read.

A response depends on (seed, prompt index, sample number) and not on what is drawn beside it. The random numbers are
drawn before generation: token t of sample j to prompt i takes number t of a stream keyed by (seed, i, j), and is the
token whose stretch of the cumulative distribution holds that number. So neither the batch, nor its order, nor the
number of samples per prompt changes a response; what remains is the rounding of the logits, which depends on the shape
of the batch. vLLM draws its own numbers from a seed of the same key.

A reward model is any sequence classifier with one label, whose logit is the reward; TEXT_FORMATS says what it reads. A
Prompt is a string, or a conversation as a list of {"role": ..., "content": ...}.

Letters: B rows of a batch, V vocabulary, T new tokens. Source: ours.
"""

from __future__ import annotations

import importlib
import inspect
import math
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import json_object
from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.machine import DTYPES, check_names, choose_device
from hf_moe_cpt.reading import read_config as config_of
from hf_moe_cpt.reading import read_generation_config, read_model, read_tokenizer, reading


Prompt = str | list[dict[str, str]]
Progress = Callable[[int], Any]
TEXT_FORMATS = ("auto", "chat", "plain", "pair")
UNBOUNDED = 10**9  # tokenizers without a limit say 10**30


@dataclass
class PolicyArguments:
    """Who answers, and how answers are drawn."""

    model_name_or_path: str | None = HfArg(default=None, help="The policy: a causal language model.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit on the Hub.")
    dtype: str = HfArg(default="auto", help=f"Type of a policy's weights: {', '.join(DTYPES)}.")
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2, ...")
    trust_remote_code: bool = HfArg(default=False, help="Run model code from the Hub, of all models.")
    temperature: float = HfArg(default=1.0, help="Of the drawing, above 0; 1 is the policy itself.")
    top_p: float = HfArg(default=1.0, help="Draw from the likeliest tokens of this total probability.")
    max_new_tokens: int = HfArg(default=512, help="Where a response is cut if it has not ended.")
    batch_size: int = HfArg(default=32, help="Sequences side by side; vLLM sees to its own.")
    use_vllm: bool = HfArg(default=False, help="Generate with vLLM, which must be installed.")
    vllm_options: str = HfArg(
        default="{}", help="Further arguments of vllm.LLM as JSON: '{\"tensor_parallel_size\": 4}'."
    )

    def __post_init__(self) -> None:
        check_names("--dtype", [self.dtype], DTYPES)
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be above 0 and finite; 0.01 is nearly greedy.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must lie in (0, 1].")
        check_at_least(self, 1, "max_new_tokens", "batch_size")
        json_object("--vllm_options", self.vllm_options)


@dataclass
class RewardArguments:
    """Who scores."""

    reward_model_name_or_path: str | None = HfArg(
        default=None, help="A sequence classifier with one label, whose logit is the reward."
    )
    reward_function: str | None = HfArg(
        default=None,
        help="A verifier in Python in its place, MODULE:NAME or FILE.py:NAME, called as TRL calls a reward function.",
    )
    reward_model_revision: str = HfArg(default="main", help="Branch, tag or commit on the Hub.")
    reward_dtype: str = HfArg(default="auto", help=f"Type of its weights: {', '.join(DTYPES)}.")
    reward_text_format: str = HfArg(
        default="auto",
        help="What it reads: chat (its chat template), plain (prompt + response + EOS in one text), pair (as "
        "two texts), or auto: chat where it has a template, plain otherwise.",
    )
    reward_max_length: int | None = HfArg(
        default=None, help="Tokens it reads; longer texts lose their beginning. Default: its tokenizer's."
    )
    reward_batch_size: int = HfArg(default=16, help="Texts scored side by side.")

    def __post_init__(self) -> None:
        if self.reward_model_name_or_path is not None and self.reward_function is not None:
            raise ValueError(
                f"Give one of --reward_model_name_or_path ({self.reward_model_name_or_path}) and --reward_function "
                f"({self.reward_function}): a response has one reward."
            )
        check_names("--reward_dtype", [self.reward_dtype], DTYPES)
        check_names("--reward_text_format", [self.reward_text_format], TEXT_FORMATS)
        check_at_least(self, 1, "reward_max_length", "reward_batch_size")

    @property
    def is_given(self) -> bool:
        """Whether anybody scores."""
        return self.reward_model_name_or_path is not None or self.reward_function is not None

    def scorer(self, trust_remote_code: bool, device: str) -> RewardModel | RewardFunction:
        """Who scores, checked; `load` gives what is called with (prompt, response) pairs."""
        if self.reward_function is not None:
            return RewardFunction(self.reward_function, self.reward_batch_size)
        return RewardModel(self, trust_remote_code, device)


def check_at_least(arguments: Any, least: int, *names: str) -> None:
    """Raise ValueError for the first of these options that is a smaller number; None passes."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} must be at least {least}.")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is read. dtype: float32, bfloat16, float16 or auto. device: auto, cpu or cuda."""

    revision: str = "main"
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"

    def source(self) -> dict[str, Any]:
        """What configuration, tokenizer and weights have in common."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def load_tokenizer(name: str, options: LoadOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; where texts must be cut, their beginning goes, not the response at their end."""
    return read_tokenizer(name, truncation_side="left", **options.source())


def read_config(name: str, options: LoadOptions) -> PreTrainedConfig:
    """The configuration alone."""
    return config_of(name, **options.source())


def load_policy(name: str, options: LoadOptions) -> PreTrainedModel:
    """A causal LM on its device, ready to generate."""
    return load_model(AutoModelForCausalLM, name, options)


def load_model(auto_class: type, name: str, options: LoadOptions) -> PreTrainedModel:
    """A model of an Auto class on its device, in evaluation mode."""
    attention = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    model = read_model(auto_class, name, dtype=options.dtype, **attention, **options.source())
    return model.to(choose_device(options.device)).eval()


def load_generation_config(name: str, options: LoadOptions) -> GenerationConfig:
    """The generation configuration of a model, or what its configuration says where it has none."""
    found = read_generation_config(name, revision=options.revision)  # many checkpoints come without that file
    return GenerationConfig.from_model_config(read_config(name, options)) if found is None else found


def stop_tokens(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: those of the generation configuration, and the tokenizer's EOS.

    Raises ValueError if there is none: every response would run to its limit.
    """
    known = generation.eos_token_id
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no EOS token and the policy's generation configuration has "
            "none: no response would ever end; set tokenizer.eos_token and save the tokenizer with the policy."
        )
    return sorted(set(ids))


def room_for_prompt(config: PreTrainedConfig, max_new_tokens: int, max_prompt_length: int | None) -> int | None:
    """Most tokens that a prompt may have beside its response; None where the model has no limit.

    Raises ValueError if a response alone fills the model.
    """
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return max_prompt_length
    if max_new_tokens >= window:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the policy has {window} positions."
        )
    room = window - max_new_tokens
    return room if max_prompt_length is None else min(room, max_prompt_length)


@dataclass(frozen=True)
class Sampling:
    """What is drawn for each prompt."""

    num_samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


class Request(NamedTuple):
    """One response to draw: to which prompt, the how-manieth, and the tokens it continues."""

    prompt_index: int
    sample: int
    prompt_ids: list[int]


class Response(NamedTuple):
    """A response without its end token. finished: it ended itself before max_new_tokens."""

    text: str
    finished: bool
    num_tokens: int


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the response continues; a conversation goes through the chat template up to the answer."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no token: remove it.")
    return ids


def uniform_numbers(requests: Sequence[Request], sampling: Sampling) -> np.ndarray:
    """(B, T) numbers in [0, 1): row b belongs to the key (seed, prompt index, sample) of request b alone."""
    return np.stack(
        [
            np.random.Generator(np.random.Philox(_seed_of(request, sampling))).random(sampling.max_new_tokens)
            for request in requests
        ]
    )


def tokens_at(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token (B,) at which the cumulative distribution of logits (B, V) passes uniform (B,), numbers in [0, 1).

    A token of probability 0 is never chosen.
    """
    cumulative = logits.to(uniform.dtype).softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    place = torch.minimum(uniform[:, None] * total, below_total)
    return torch.searchsorted(cumulative, place, right=True).squeeze(-1)


class _ChosenByNumber(LogitsProcessor):
    """Leave one token in each row: the one at that step's number. Greedy search then has no choice."""

    def __init__(self, uniform: torch.Tensor, prompt_width: int) -> None:
        self.uniform, self.prompt_width = uniform, prompt_width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tokens = tokens_at(scores, self.uniform[:, input_ids.shape[1] - self.prompt_width])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class TransformersSampler:
    """Samples with `generate`, in batches of rows of similar length, padded on the left.

    The model's own generation configuration (penalties, top-k, ...) is replaced: what is drawn is the policy at
    `sampling`'s temperature and top_p. stop: ids that end a response, which also pad.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        stop: list[int],
        batch_size: int,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.stop, self.batch_size = stop, batch_size
        pad = tokenizer.pad_token_id
        self.pad = stop[0] if pad is None else pad
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=stop,
            pad_token_id=self.pad,
            bos_token_id=tokenizer.bos_token_id,
        )

    def __call__(self, requests: Sequence[Request], progress: Progress = lambda count: None) -> list[Response]:
        """One response for each request, in their order; progress gets the size of each finished batch."""
        # The longest first: a batch that does not fit into memory fails at once.
        order = sorted(range(len(requests)), key=lambda place: -len(requests[place].prompt_ids))
        responses: dict[int, Response] = {}
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            responses |= zip(places, self._batch([requests[place] for place in places]), strict=True)
            progress(len(places))
        return [responses[place] for place in range(len(requests))]

    @torch.inference_mode()
    def _batch(self, requests: list[Request]) -> list[Response]:
        device = self.model.device
        width = max(len(request.prompt_ids) for request in requests)
        ids = torch.full((len(requests), width), self.pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        # MPS has no float64: there a token of probability below 1e-7 may never be drawn.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        uniform = torch.from_numpy(uniform_numbers(requests, self.sampling)).to(device, dtype)
        output = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=LogitsProcessorList([*self._warpers(), _ChosenByNumber(uniform, width)]),
        )
        rows = zip(requests, output[:, width:].tolist(), strict=True)
        return [read_response(request.prompt_ids, ids, self.stop, self.tokenizer) for request, ids in rows]

    def _warpers(self) -> list[LogitsProcessor]:
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(self.sampling.temperature)]
        return warpers + ([TopPLogitsWarper(self.sampling.top_p)] if self.sampling.top_p < 1 else [])


def read_response(
    prompt_ids: list[int], new_ids: Sequence[int], stop: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Response:
    """The text before the first stop token.

    It is what the text of prompt and response has over that of the prompt, because some tokenizers drop a space at
    the beginning of what they decode.
    """
    ends = [place for place, token in enumerate(new_ids) if token in stop]
    kept = list(new_ids[: ends[0]] if ends else new_ids)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(prompt_ids, **options)
    whole = tokenizer.decode([*prompt_ids, *kept], **options)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(kept, **options)
    return Response(text, bool(ends), len(kept))


class VllmSampler:
    """Samples with vLLM, which batches by itself; each request carries a seed of its own.

    engine: a vllm.LLM. parameters: the class vllm.SamplingParams.
    """

    def __init__(
        self, engine: Any, parameters: type, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, stop: list[int]
    ) -> None:
        self.engine, self.parameters, self.tokenizer = engine, parameters, tokenizer
        self.sampling, self.stop = sampling, stop

    def __call__(self, requests: Sequence[Request], progress: Progress = lambda count: None) -> list[Response]:
        """One response for each request, in their order; progress is called once."""
        parameters = [
            self.parameters(
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                max_tokens=self.sampling.max_new_tokens,
                stop_token_ids=self.stop,
                seed=_seed_of(request, self.sampling) % 2**32,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        outputs = self.engine.generate(prompts, parameters, use_tqdm=False)
        progress(len(requests))
        return [
            read_response(request.prompt_ids, output.outputs[0].token_ids, self.stop, self.tokenizer)._replace(
                finished=output.outputs[0].finish_reason == "stop"
            )
            for request, output in zip(requests, outputs, strict=True)
        ]


def require_vllm() -> Any:
    """The module vllm. Raises ImportError, in one line, where it is not installed."""
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(
            "--use_vllm needs the package vllm, which is not installed: pip install vllm, or leave --use_vllm out."
        ) from error


def _seed_of(request: Request, sampling: Sampling) -> int:
    return derive_seed(sampling.seed, "response", request.prompt_index, request.sample)


class Policy:
    """A causal LM that draws responses; made from its configuration and tokenizer, and refused by them.

    name: folder or Hub id. arguments: how to draw; their own model_name_or_path is left aside. room: most tokens of a
    prompt, None where nothing limits it.
    """

    def __init__(
        self,
        name: str,
        options: LoadOptions,
        arguments: PolicyArguments,
        num_samples: int,
        seed: int,
        max_prompt_length: int | None = None,
    ) -> None:
        self.name, self.options, self.arguments = name, options, arguments
        if arguments.use_vllm:
            require_vllm()
        self.tokenizer = load_tokenizer(name, options)
        self.stop = stop_tokens(load_generation_config(name, options), self.tokenizer)
        self.room = room_for_prompt(read_config(name, options), arguments.max_new_tokens, max_prompt_length)
        drawn = arguments.temperature, arguments.top_p, arguments.max_new_tokens
        self.sampling = Sampling(num_samples, *drawn, seed)

    def load(self) -> TransformersSampler | VllmSampler:
        """Read the weights."""
        if not self.arguments.use_vllm:
            model = load_policy(self.name, self.options)
            return TransformersSampler(model, self.tokenizer, self.sampling, self.stop, self.arguments.batch_size)
        vllm, further = require_vllm(), json_object("--vllm_options", self.arguments.vllm_options)
        engine = vllm.LLM(model=self.name, dtype=self.options.dtype, **{**self.options.source(), **further})
        return VllmSampler(engine, vllm.SamplingParams, self.tokenizer, self.sampling, self.stop)

    def respond(
        self,
        sampler: TransformersSampler | VllmSampler,
        prompts: Mapping[int, Prompt],
        progress: Progress = lambda count: None,
    ) -> dict[int, list[Response]]:
        """num_samples responses to each prompt by its index, none to one that is too long; progress counts them."""
        ids = {index: encode_prompt(prompt, self.tokenizer) for index, prompt in prompts.items()}
        fitting = {index: tokens for index, tokens in ids.items() if self.room is None or len(tokens) <= self.room}
        samples = range(self.sampling.num_samples)
        requests = [Request(index, sample, tokens) for index, tokens in fitting.items() for sample in samples]
        progress((len(ids) - len(fitting)) * len(samples))
        drawn: dict[int, list[Response]] = {index: [] for index in ids}
        for request, response in zip(requests, sampler(requests, progress) if requests else [], strict=True):
            drawn[request.prompt_index].append(response)
        return drawn


def require_template(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], what: str, who: str = "policy"
) -> None:
    """Raise ValueError for a conversation among the prompts that the tokenizer has no chat template for."""
    if not tokenizer.chat_template and any(not isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            f"the {what} are conversations and the {who}'s tokenizer has no chat template: set "
            f"tokenizer.chat_template and save it with the {who}, or give strings."
        )


class Score(NamedTuple):
    """A reward. was_cut: the text was longer than the reward model reads and lost its beginning."""

    reward: float
    was_cut: bool


class RewardScorer:
    """Rewards of (prompt, response) pairs, in batches of similar length, padded on the right.

    A classifier that reads the last token finds it by the padding token of its configuration. Where that names none,
    the tokenizer's serves, if it is not also EOS; where there is none, texts are scored one at a time.
    max_length: tokens of a text; None takes the tokenizer's limit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None = None,
        text_format: str = "auto",
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.text_format = resolve_text_format(text_format, tokenizer)
        limit = tokenizer.model_max_length if max_length is None else max_length
        self.max_length = limit if limit < UNBOUNDED else None
        config = model.config.get_text_config()
        if config.pad_token_id is None and tokenizer.pad_token_id != tokenizer.eos_token_id:
            config.pad_token_id = tokenizer.pad_token_id
        self.pad = config.pad_token_id
        self.batch_size = 1 if self.pad is None else batch_size
        self._accepted = set(inspect.signature(model.forward).parameters)
        self._adds_eos = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]

    def __call__(self, pairs: Sequence[tuple[Prompt, str]], progress: Progress = lambda count: None) -> list[Score]:
        """One score for each pair, in their order; progress gets the size of each finished batch.

        Raises ValueError for a reward that is not finite.
        """
        encoded = [self._encode(prompt, response) for prompt, response in pairs]
        order = sorted(range(len(pairs)), key=lambda place: -len(encoded[place][0]["input_ids"]))
        rewards: dict[int, float] = {}
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            rewards |= zip(places, self._batch([encoded[place][0] for place in places]), strict=True)
            progress(len(places))
        for place, reward in rewards.items():
            if not math.isfinite(reward):
                raise ValueError(
                    f"the reward model gives {reward} for the response {pairs[place][1][:40]!r}: load it in another "
                    "dtype, such as float32."
                )
        return [Score(rewards[place], encoded[place][1]) for place in range(len(pairs))]

    def text_of(self, prompt: Prompt, response: str) -> str | tuple[str, str]:
        """The text that is scored; the two texts in format "pair"."""
        if self.text_format == "chat":
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self.tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": response}], tokenize=False
            )
        text = prompt if isinstance(prompt, str) else "\n\n".join(turn["content"] for turn in prompt)
        if self.text_format == "pair":
            return text, response
        joint = "" if isinstance(prompt, str) else "\n\n"
        end = "" if self._adds_eos or self.tokenizer.eos_token is None else self.tokenizer.eos_token
        return f"{text}{joint}{response}{end}"

    def _encode(self, prompt: Prompt, response: str) -> tuple[dict[str, list[int]], bool]:
        """Token ids and their like, and whether they were cut."""
        text = self.text_of(prompt, response)
        texts = (text,) if isinstance(text, str) else text
        special = self.text_format != "chat"  # the template has written them
        whole = self.tokenizer(*texts, add_special_tokens=special, verbose=False)
        if self.max_length is None or len(whole["input_ids"]) <= self.max_length:
            return dict(whole), False
        cut = self.tokenizer(
            *texts,
            add_special_tokens=special,
            max_length=self.max_length,
            truncation="only_first" if self.text_format == "pair" else True,
        )
        return dict(cut), True

    @torch.inference_mode()
    def _batch(self, rows: list[dict[str, list[int]]]) -> list[float]:
        width = max(len(row["input_ids"]) for row in rows)
        # Some tokenizers give token types to models that know none.
        fill = {name: 0 for name in rows[0] if name in self._accepted} | {"input_ids": self.pad or 0}
        batch = {
            name: torch.tensor([row[name] + [fill[name]] * (width - len(row[name])) for row in rows]) for name in fill
        }
        batch["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        )
        logits = self.model(**{name: values.to(self.model.device) for name, values in batch.items()}).logits
        return logits.float().squeeze(-1).tolist()


def resolve_text_format(text_format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The format meant by "auto"; the others as they are. Raises ValueError for "chat" without a chat template."""
    if text_format == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if text_format == "chat" and not tokenizer.chat_template:
        raise ValueError(
            "the reward model's tokenizer has no chat template for text format 'chat': choose plain, pair or auto."
        )
    return text_format


class RewardModel:
    """A reward model, checked by its configuration and tokenizer. Raises ValueError unless it has one label."""

    def __init__(self, arguments: RewardArguments, trust_remote_code: bool, device: str) -> None:
        self.arguments, self.name = arguments, arguments.reward_model_name_or_path
        revision, dtype = arguments.reward_model_revision, arguments.reward_dtype
        self.options = LoadOptions(revision, dtype, None, trust_remote_code, device)
        config = read_config(self.name, self.options)
        if config.num_labels != 1:
            raise ValueError(
                f"the reward model {self.name!r} has {config.num_labels} labels and must have one, whose logit is the "
                "reward: name another model, or score the responses yourself and name their columns."
            )
        self.tokenizer = load_tokenizer(self.name, self.options)
        self.text_format = resolve_text_format(arguments.reward_text_format, self.tokenizer)

    def load(self) -> RewardScorer:
        """Read the weights."""
        model = load_model(AutoModelForSequenceClassification, self.name, self.options)
        sizes = self.arguments.reward_batch_size, self.arguments.reward_max_length
        return RewardScorer(model, self.tokenizer, *sizes, self.text_format)


def function_of(option: str, place: str) -> Callable[..., Any]:
    """What MODULE:NAME or FILE.py:NAME names. Raises ValueError, naming the option, for what is nothing to call."""
    source, _, name = place.rpartition(":")
    try:
        with reading(f"--{option} {place!r}"):
            is_file = source.endswith(".py")
            found = (
                runpy.run_path(source).get(name) if is_file else getattr(importlib.import_module(source), name, None)
            )
    except ImportError as error:
        raise ValueError(f"--{option} {place!r} cannot be imported: {error}.") from error
    if not callable(found):
        raise ValueError(f"--{option} {place!r}: {source!r} has no function {name!r}.")
    return found


class RewardFunction:
    """A reward in Python, such as trl.rewards:think_format_reward, called as `function(prompts=..., completions=...)`.

    Completions of conversations are lists of one message, others texts; it returns a number for each.
    place: MODULE:NAME or FILE.py:NAME. Raises ValueError if there is none.
    """

    text_format = "function"

    def __init__(self, place: str, batch_size: int) -> None:
        self.place, self.batch_size = place, batch_size
        self.function = function_of("reward_function", place)

    def load(self) -> RewardFunction:
        """Itself."""
        return self

    def __call__(self, pairs: Sequence[tuple[Prompt, str]], progress: Progress = lambda count: None) -> list[Score]:
        """One score for each pair. Raises ValueError for what is no finite number."""
        scores: list[Score] = []
        for start in range(0, len(pairs), self.batch_size):
            some = pairs[start : start + self.batch_size]
            answers = [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}] for prompt, text in some
            ]
            rewards = self.function(prompts=[prompt for prompt, _ in some], completions=answers)
            for (_, text), reward in zip(some, rewards, strict=True):
                if not isinstance(reward, (int, float)) or not math.isfinite(reward):
                    raise ValueError(
                        f"--reward_function {self.place!r} gives {reward!r} for the response {text[:40]!r}."
                    )
                scores.append(Score(float(reward), False))
            progress(len(some))
        return scores
