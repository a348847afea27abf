"""SurgeryBench: a made-up world of people, places, products and rules, its texts, questions and files."""

from hf_moe_cpt.data.surgery_bench.bench import (
    ALL_KINDS,
    BEFORE_SETS,
    HEADER,
    QUESTION_KINDS,
    QUIZ_TEMPLATE,
    RETRAINED_SETS,
    SETS,
    SPLITS,
    SurgeryBench,
    as_completions,
    group_of_set,
)


__all__ = [
    "ALL_KINDS",
    "BEFORE_SETS",
    "HEADER",
    "QUESTION_KINDS",
    "QUIZ_TEMPLATE",
    "RETRAINED_SETS",
    "SETS",
    "SPLITS",
    "SurgeryBench",
    "as_completions",
    "group_of_set",
]
