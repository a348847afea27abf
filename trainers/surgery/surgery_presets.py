"""Whole settings of a surgery by name: the paper's own, and a bounded one that is the default.

"paper" follows the authors' code in everything that decides a number: four sets, weights, plain ascent, forward KL,
AdamW with decay on every parameter, a constant rate, 120 steps, no rule that stops it, and the model of the last step.
What the code leaves to the launch is not in it: how many GPUs, hence how many sequences of each set make a step.
Source: akshajkumarv/llm_surgery_code, config_surgery.yaml at 87826d1 (2024-09-25); "safe" is ours.
"""

from __future__ import annotations

from typing import Any

from hf_moe_cpt.trainers.surgery.objective import PAPER_WEIGHTS


PRESETS: dict[str, dict[str, Any]] = {
    "safe": {},  # the defaults of SurgeryConfig
    "paper": {
        **{f"{name}_weight": weight for name, weight in PAPER_WEIGHTS.items()},
        **{f"{name}_batch_size": 1 for name in PAPER_WEIGHTS},
        "forget_loss": "ga",
        "forget_target": None,
        "kl_direction": "forward",
        "normalization": "sequence",
        "mask_prefix": False,
        "append_eos": False,
        "max_length": 4096,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "max_steps": 120,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.01,
        "decay_all_parameters": True,
        "max_grad_norm": 1.0,
        "reference": "copy",
        "gradient_checkpointing": True,
        "logging_steps": 8,
        "seed": 42,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "metric_for_best_model": None,
    },
}


def preset_settings(name: str) -> dict[str, Any]:
    """The fields of `SurgeryConfig` that a preset sets. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}.")
    return dict(PRESETS[name])
