"""What the models must know of transformers' releases: what it calls the cache, and keywords that nobody reads.

transformers says `cache` from 5.24 on and `past_key_values` before. A model that takes `**kwargs` swallows whichever
name it does not know, and then decodes every token without its past. So here every forward takes both names, and a
model refuses, or names in a warning, a keyword that none of its parts reads. Source: ours.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs, logging


logger = logging.get_logger(__name__)

NEWEST_TESTED = (5, 24)  # major and minor of the newest transformers that the tests passed with

# The keyword, and the field of an output, that holds the cache in the transformers that runs.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"

# Keywords that a forward does not name and that something below it reads, or that may be ignored.
_READ_BELOW = frozenset(TransformersKwargs.__annotations__) | frozenset(
    "return_dict output_router_indices debug_io debug_io_dir prune_layers "  # decorators of forward
    "shift_labels ignore_index "  # the loss
    "cache read_index write_index block_table max_seqlen_q max_seqlen_k logits_indices logits_processor_args "  # paged
    "token_type_ids".split()  # of tokenizers that think of BERT: all zeros for one text, no decoder reads them
)


def takes_either_cache_name(forward: Callable) -> Callable:
    """For a forward with a parameter `past_key_values`: it may be called `cache` too; the signature shows what
    transformers says. Raises TypeError where both are given and differ.

    Before 5.24 continuous batching gives its pages to the attention function as `cache`: those are left alone.
    """

    @wraps(forward)
    def with_one_name(self: nn.Module, *args, **kwargs):
        cache = kwargs.get("cache")
        if cache is None or CACHE_NAME == "cache" or isinstance(cache, Cache):
            kwargs.pop("cache", None)
        else:
            cache = None
        if cache is not None:
            if kwargs.setdefault("past_key_values", cache) is None:
                kwargs["past_key_values"] = cache
            if kwargs["past_key_values"] is not cache:
                raise TypeError("cache and past_key_values are two names of one argument: pass one of them.")
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    renamed = [
        parameter.replace(name=CACHE_NAME) if name == "past_key_values" else parameter
        for name, parameter in signature.parameters.items()
    ]
    with_one_name.__signature__ = signature.replace(parameters=renamed)
    return with_one_name


def refuses_unread_keywords(forward: Callable) -> Callable:
    """For the forward of a model: TypeError for a tensor or cache that nothing reads, a warning for anything else."""
    named = frozenset(inspect.signature(forward).parameters) | {"past_key_values"}

    @wraps(forward)
    def with_known_keywords(self: nn.Module, *args, **kwargs):
        unread = [name for name in kwargs if name not in named and name not in _READ_BELOW]
        if unread:
            _tell_of_unread(self, {name: kwargs[name] for name in unread if kwargs[name] is not None})
        return forward(self, *args, **kwargs)

    return with_known_keywords


def _tell_of_unread(model: nn.Module, keywords: dict[str, object]) -> None:
    attention = ALL_ATTENTION_FUNCTIONS.get(model.config._attn_implementation)
    functions = [function for function in (attention, getattr(model, "loss_function", None)) if function is not None]
    read = {name for function in functions for name in inspect.signature(function).parameters}
    for name, value in keywords.items():
        if name in read:
            continue
        message = f"{type(model).__name__} does not read {name}={type(value).__name__}"
        if isinstance(value, torch.Tensor | Cache):
            raise TypeError(f"{message}: leave it out, or check its spelling and the version of transformers.")
        logger.warning_once(f"{message}: ignored. Check its spelling.")


def warn_of_untested_release(version: str = transformers.__version__) -> None:
    """Say once, in one line, that the major or minor of transformers is newer than the newest tested."""
    if tuple(int(part) for part in version.split(".")[:2]) > NEWEST_TESTED:
        tested = ".".join(map(str, NEWEST_TESTED))
        logger.warning_once(f"cpt_moe models are tested with transformers up to {tested}; this is {version}.")
