"""Which engine runs on how many ranks: one table for the fixtures that start them and the tests that read them."""

import inspect

import torch
from packaging.version import Version
from transformers.distributed import DistributedConfig


HAS_EP_INTERFACE = "ep_implementation" in inspect.signature(DistributedConfig).parameters  # transformers 5.23
# torch 2.11 cannot gather every kind of shard
HAS_EP = HAS_EP_INTERFACE and Version(torch.__version__) >= Version("2.13")

OURS = {"ep_implementation": "hf_moe_cpt"}
ACCUMULATED = {"accumulation": 4, "balance": False}
BIASED = {"model": "biased"}  # its balance is that of the whole batch, whatever the micro-batches
SHAKEN = {"shaken": True}  # a surgery alone, of noisy weights, that forgets at the worst point nearby
ONE_RANK = {"whole": {}, "without balance": {"balance": False}, "accumulated": ACCUMULATED, "biased": BIASED}
ONE_RANK |= {"shaken": SHAKEN}
FSDP2 = {"fsdp": True}
TWO_RANKS = {
    "DDP": {},
    "DDP accumulated": ACCUMULATED,
    "DDP with biases, accumulated": {"accumulation": 2, **BIASED},
    "FSDP2": FSDP2,
    "FSDP2 with biases": {**FSDP2, **BIASED},
    "DDP shaken": SHAKEN,
    "FSDP2 shaken": {**FSDP2, **SHAKEN},
    "FSDP2 in bfloat16": {**FSDP2, "short": True},  # a surgery alone
    "FSDP2 recomputed": {**FSDP2, "recomputed": True},
    "FSDP2 of accelerate accumulated": {"accelerate": "fsdp2_8gpu.yaml", **ACCUMULATED},
}
FOUR_RANKS = {
    "DDP on 4": {},
    "DDP on 4 accumulated": ACCUMULATED,
    "FSDP2 on 4": FSDP2,
    "FSDP2 on 4 accumulated": {**FSDP2, **ACCUMULATED},
}


def _dealt(fsdp: int, ep: int = 1, copies: int = 1, **more: object) -> dict[str, object]:
    """Sizes of a `DistributedConfig`; experts reached by our exchange."""
    sizes = {"fsdp_size": fsdp, **({"dp_replicate_size": copies} if copies > 1 else {})}
    return {"sharded": {**sizes, **({"ep_size": ep, **OURS} if ep > 1 else {})}, **more}


EP_OF_TRANSFORMERS = {"sharded": {"fsdp_size": 2, "ep_size": 2}}
SHARDED_TRAINING = {
    2: {
        "EP": _dealt(2, 2),
        "EP accumulated": _dealt(2, 2, **ACCUMULATED),
        "EP recomputed": _dealt(2, 2, recomputed=True),
        "EP with biases": _dealt(2, 2, **BIASED),
        "EP of transformers": EP_OF_TRANSFORMERS,
    },
    4: {
        "HSDP": _dealt(2, copies=2),
        "HSDP accumulated": _dealt(2, copies=2, **ACCUMULATED),
        "EP on 4": _dealt(4, 4),
        "EP on 4 accumulated": _dealt(4, 4, **ACCUMULATED),
        "EP and FSDP2": _dealt(4, 2),
        "EP and FSDP2 accumulated": _dealt(4, 2, **ACCUMULATED),
        "EP and HSDP": _dealt(2, 2, copies=2),
        "EP and HSDP accumulated": _dealt(2, 2, copies=2, **ACCUMULATED),
    },
}
STEPS = {
    2: {
        "all to all": {"sizes": {"fsdp_size": 2, "ep_size": 2}},
        "once": {"sizes": {"fsdp_size": 2, "ep_size": 2, **OURS}},
        "once, eager": {"sizes": {"fsdp_size": 2, "ep_size": 2, **OURS}, "experts": "eager"},
        "tensors too": {"sizes": {"tp_size": 2, "ep_size": 2, **OURS}},
        "all reduce": {"sizes": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"}, "experts": "eager"},
        "autocast": {"sizes": {"fsdp_size": 2, "ep_size": 2, **OURS}, "bf16": True},
    },
    4: {
        "four parts": {"sizes": {"fsdp_size": 4, "ep_size": 4, **OURS}},
        "two copies of two parts": {"sizes": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2, **OURS}},
        "parts that are sharded": {"sizes": {"fsdp_size": 4, "ep_size": 2, **OURS}},
    },
}
if HAS_EP:
    TWO_RANKS |= SHARDED_TRAINING[2] | {name: {"step": step} for name, step in STEPS[2].items()}
    FOUR_RANKS |= SHARDED_TRAINING[4] | {name: {"step": step} for name, step in STEPS[4].items()}
ON_GPUS = {
    1: {"whole": {}, "without balance": {"balance": False}, "rounded": {"rounded": True}},
    2: {
        "DDP": {},
        "DDP accumulated": ACCUMULATED,
        "FSDP2": FSDP2,
        "FSDP2 accumulated": {**FSDP2, **ACCUMULATED},
        "FSDP2 gathered in float32": {"sharded": {"fsdp_size": 2, "fsdp_mixed_precision": False}},
        **({"EP": _dealt(2, 2), "EP accumulated": _dealt(2, 2, **ACCUMULATED)} if HAS_EP_INTERFACE else {}),
    },
    4: {
        "FSDP2 on 4": FSDP2,
        "HSDP": _dealt(2, copies=2),
        **({"EP on 4": _dealt(4, 4), "EP and FSDP2": _dealt(4, 2)} if HAS_EP_INTERFACE else {}),
        **({"EP and FSDP2 accumulated": _dealt(4, 2, **ACCUMULATED)} if HAS_EP_INTERFACE else {}),
    },
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}  # for the kernels of a GPU
ON_GPUS = {
    ranks: {name: {**job, "on_gpu": True, "model": "wide"} for name, job in jobs.items()}
    for ranks, jobs in ON_GPUS.items()
}
JOBS = {1: ONE_RANK, 2: TWO_RANKS, 4: FOUR_RANKS}  # by the number of ranks
