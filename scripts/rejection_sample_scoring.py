"""Score responses with a reward model: any sequence classifier with one label, whose logit is the reward.

Source: ours. The text that is scored is a chat through the reward model's own template, or prompt and response one
after the other, or as the two texts of a pair; `TEXT_FORMATS` says which is which.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_cpt.scripts.rejection_sample_models import Prompt


TEXT_FORMATS = {
    "auto": "chat where the reward model's tokenizer has a chat template, plain otherwise",
    "chat": "the reward model's chat template; a string prompt is the turn of a user",
    "plain": "prompt + response + EOS in one text",
    "pair": "prompt and response as the two texts of a pair, as encoders with a separator expect",
}
UNBOUNDED = 10**9  # tokenizers without a limit say 10**30


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

    def __call__(
        self, pairs: Sequence[tuple[Prompt, str]], progress: Callable[[int], Any] = lambda count: None
    ) -> list[Score]:
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
