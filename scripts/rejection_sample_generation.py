"""Sample responses so that each depends on (seed, prompt index, sample number) and not on what is sampled beside it.

The random numbers are drawn before generation: token t of sample j to prompt i takes number t of a stream keyed by
(seed, i, j), and is the token whose stretch of the cumulative distribution holds that number. So neither the batch,
nor its order, nor the number of samples per prompt changes a response; what remains is the rounding of the logits,
which depends on the shape of the batch. vLLM draws its own numbers from a seed of the same key.

Letters: B rows of a batch, V vocabulary, T new tokens. Source: ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from hf_moe_cpt.data.permutation import derive_seed
from hf_moe_cpt.scripts.rejection_sample_models import LoadOptions, Prompt


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


Progress = Callable[[int], Any]


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


def requests_for(prompt_index: int, prompt_ids: list[int], sampling: Sampling) -> list[Request]:
    """The num_samples requests of one prompt."""
    return [Request(prompt_index, sample, prompt_ids) for sample in range(sampling.num_samples)]


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


def load_vllm(
    name: str,
    options: LoadOptions,
    engine_options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    stop: list[int],
) -> VllmSampler:
    """A sampler on a new vLLM engine. engine_options: further arguments of vllm.LLM, such as tensor_parallel_size."""
    vllm = require_vllm()
    engine = vllm.LLM(model=name, dtype=options.dtype, **{**options.source(), **engine_options})
    return VllmSampler(engine, vllm.SamplingParams, tokenizer, sampling, stop)


def _seed_of(request: Request, sampling: Sampling) -> int:
    return derive_seed(sampling.seed, "response", request.prompt_index, request.sample)
