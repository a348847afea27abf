"""Which engine runs on how many ranks: one table for the fixtures that start them and the tests that read them."""

import inspect

import torch
from packaging.version import Version
from transformers.distributed import DistributedConfig


HAS_EP = "ep_size" in inspect.signature(DistributedConfig).parameters  # from transformers 5.23 on
# torch 2.11 cannot gather every kind of shard
HAS_EP = HAS_EP and Version(torch.__version__) >= Version("2.13")

ACCUMULATED = {"accumulation": 2, "balance": False}
BIASED = {"model": "biased"}  # its balance is that of the whole batch, whatever the micro-batches
ONE_RANK = {
    "whole": {},
    "without balance": {"balance": False},
    "accumulated": {"accumulation": 4, "balance": False},
    "biased": BIASED,
}
TWO_RANKS = {
    "DDP": {},
    "DDP accumulated": ACCUMULATED,
    "DDP with biases, accumulated": {"accumulation": 2, **BIASED},
    "FSDP2": {"fsdp": True},
    "FSDP2 with biases": {"fsdp": True, **BIASED},
    "FSDP2 of accelerate accumulated": {"accelerate": "fsdp2_8gpu.yaml", **ACCUMULATED},
}
FOUR_RANKS = {"DDP on 4": {}}
SHARDED_TRAINING = {
    2: {
        "EP": {"sharded": {"fsdp_size": 2, "ep_size": 2}},
        "EP with biases": {"sharded": {"fsdp_size": 2, "ep_size": 2}, **BIASED},
    },
    4: {"EP on 4": {"sharded": {"fsdp_size": 4, "ep_size": 4}}},
}
STEPS = {
    2: {
        "all to all": {"sizes": {"fsdp_size": 2, "ep_size": 2}},
        "eager": {"sizes": {"fsdp_size": 2, "ep_size": 2}, "experts": "eager"},
        "tensors too": {"sizes": {"tp_size": 2, "ep_size": 2}},
        "all reduce": {"sizes": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"}, "experts": "eager"},
        "autocast": {"sizes": {"fsdp_size": 2, "ep_size": 2}, "bf16": True},
    },
    4: {
        "four parts": {"sizes": {"fsdp_size": 4, "ep_size": 4}},
        "two copies of two parts": {"sizes": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}},
        "parts that are sharded": {"sizes": {"fsdp_size": 4, "ep_size": 2}},
    },
}
if HAS_EP:
    TWO_RANKS |= SHARDED_TRAINING[2] | {name: {"step": step} for name, step in STEPS[2].items()}
    FOUR_RANKS |= SHARDED_TRAINING[4] | {name: {"step": step} for name, step in STEPS[4].items()}
JOBS = {1: ONE_RANK, 2: TWO_RANKS, 4: FOUR_RANKS}  # by the number of ranks
