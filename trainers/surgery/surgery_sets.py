"""From what the user passed to what a surgery trains on and measures: checked, tokenised, paired. Source: ours."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_moe_cpt.trainers.surgery.pair_losses import PairLoss
from hf_moe_cpt.trainers.surgery.settings_checks import FORGET_SETS, UNSEEN, check_sets, losses_of_sets
from hf_moe_cpt.trainers.surgery.subject_overlap import check_subjects
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_data import tokenize_set
from hf_moe_cpt.trainers.surgery.text_pairs import with_refusals, with_winners


class SurgerySets(NamedTuple):
    """Tokenised sets by name: those with a term in the objective, and all that are measured."""

    train: dict[str, Dataset]
    measured: dict[str, Dataset]


def prepare_sets(
    args: SurgeryConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    given: dict[str, Dataset | None],
) -> SurgerySets:
    """Raises ValueError for what the settings need and did not get, for overlapping subjects and for unreadable rows.

    given: the user's sets by name, None where there is none.
    """
    for name, data in given.items():
        if data is not None and not isinstance(data, Dataset):
            raise ValueError(
                f"{name}_dataset is a {type(data).__name__}: pass a datasets.Dataset (datasets.Dataset.from_dict("
                "{'text': [...]}) makes one from a list)."
            )
    in_force = check_sets(args, given)
    check_subjects({name: data for name, data in given.items() if data is not None}, args.allow_overlap)
    named = {name: data for name, data in given.items() if name in in_force or name in (UNSEEN, "update")}
    tokenize = partial(
        tokenize_set,
        tokenizer=tokenizer,
        max_length=args.max_length,
        mask_prefix=args.mask_prefix,
        append_eos=args.append_eos,
        vocab_size=vocab_size,
        num_proc=args.dataset_num_proc,
    )
    with args.main_process_first(desc="tokenising"):
        sets = {name: tokenize(data, name=name) for name, data in named.items() if data is not None and len(data)}
        train = {name: _paired(args, name, sets, given, tokenize) for name in in_force}
    return SurgerySets(train, {name: sets[name] for name in (*in_force, UNSEEN) if name in sets})


def tokenized(
    args: SurgeryConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, sets: dict[str, Dataset]
) -> dict[str, Dataset]:
    """Other sets than those that are trained on, to be measured."""
    options = {"mask_prefix": args.mask_prefix, "append_eos": args.append_eos, "vocab_size": vocab_size}
    return {
        name: tokenize_set(data, tokenizer, name=name, max_length=args.max_length, **options)
        for name, data in sets.items()
    }


def _paired(
    args: SurgeryConfig,
    name: str,
    sets: dict[str, Dataset],
    given: dict[str, Dataset | None],
    tokenize: partial[Dataset],
) -> Dataset:
    """The tokenised set, with winners if it has a pair loss."""
    loss = losses_of_sets(args)[name] if name in FORGET_SETS else None
    if not isinstance(loss, PairLoss):
        return sets[name]
    if loss.name == "pair_dpo":
        return with_winners(sets[name], sets["update"], name=name)
    return with_refusals(sets[name], given[name], tokenize, name=name, seed=args.seed, refusals=args.refusals)
