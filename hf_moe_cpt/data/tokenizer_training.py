"""Train a byte-level BPE tokenizer: every text comes back from its tokens unchanged. Source: GPT-2's scheme."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
NUM_BYTES = 256
SMALLEST_VOCABULARY = NUM_BYTES + 2  # every byte and the two special tokens
# Words with the space before them, up to three digits, runs of marks, runs of space: the cut of Llama 3 and GPT-4.
# Unlike GPT-2's it keeps a line break and the indentation after it in few pieces, which code is full of.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, *, model_max_length: int = 2048, progress: bool = True
) -> PreTrainedTokenizerFast:
    """A fast tokenizer with exactly `vocab_size` entries, or fewer if the texts are too few to give that many.

    EOS is token 0 and PAD token 1; encoding adds neither, nor a space in front. The same texts in the same order give
    the same tokenizer. model_max_length: in tokens, stored for the models trained with it.
    Raises ValueError if vocab_size leaves no room for all bytes, or if there is no text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for {NUM_BYTES} bytes and 2 special tokens: "
            f"pass at least {SMALLEST_VOCABULARY}."
        )
    if model_max_length < 1:
        raise ValueError(f"model_max_length={model_max_length} must be at least 1 token.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (EOS_TOKEN, PAD_TOKEN)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_non_empty(texts), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    """The texts as they are; refuses an iterable without a single character."""
    found = False
    for text in texts:
        found = found or bool(text)
        yield text
    if not found:
        raise ValueError("there is no text to train the tokenizer on: pass at least one non-empty string.")
