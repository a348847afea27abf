"""How long training takes: the speed measured for one GPU, scaled by arithmetic, and what travels between GPUs.

Operations of a token, forward: 2 for each active parameter, and 2 x width x S in the causal attention of each layer;
a backward pass costs two forwards, recomputing one more, a reference model one. A measured step gives operations per
second, which are taken to hold for the model asked about. What travels is divided by a nominal bandwidth: the shorter
time has all of it hidden behind the products, the longer one none. Nothing here was measured on several GPUs.

Letters: S sequence length, N GPUs, P parameters. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_moe_cpt.analysis.training_memory import COMPUTED, PRECISIONS, ModelSize, TrainingSetup


SECONDS_OF_DAY = 86_400


@dataclass(frozen=True)
class MeasuredStep:
    """A committed benchmark of a training step on one GPU, with bfloat16 weights; `flops_per_token` as below."""

    model: str
    kernels: str
    is_mixture: bool
    sequence_length: int
    tokens_per_second: float
    flops_per_token: float
    device: str
    date: str
    commit: str

    @property
    def flops_per_second(self) -> float:
        """Operations of the model, not of the hardware: nothing that is computed twice counts twice."""
        return self.tokens_per_second * self.flops_per_token


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of an optimizer step: of one GPU's products, and of what it sends, if nothing hides that."""

    compute_seconds: float
    transfer_seconds: float
    tokens_per_step: int  # of all GPUs; both answers of a pair and all terms of a surgery count
    basis: MeasuredStep
    is_same_model: bool  # whether the basis was measured on this very model

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Least and most: transfers hidden, and not hidden at all."""
        return self.compute_seconds, self.compute_seconds + self.transfer_seconds

    def days(self, tokens: float) -> tuple[float, float]:
        """Least and most for so many tokens."""
        steps = -(-tokens // self.tokens_per_step)
        least, most = self.step_seconds
        return steps * least / SECONDS_OF_DAY, steps * most / SECONDS_OF_DAY


def flops_per_token(size: ModelSize, sequence_length: int, forwards: float = 3.0) -> float:
    """Operations of a token of a training step; forwards: 3, 4 with recomputing, one more with a reference."""
    attention = 2 * len(size.layers) * size.attention_width * sequence_length
    return forwards * (2 * size.active + attention)


def forwards_of(setup: TrainingSetup) -> float:
    """Costs of a step in forward passes of its tokens. A cached reference runs once, before training."""
    return 3.0 + (1.0 if setup.checkpointing else 0.0) + (1.0 if setup.reference == "copy" else 0.0)


def nearest_step(size: ModelSize, kernels: str, steps: Sequence[MeasuredStep]) -> MeasuredStep:
    """The measured step to go by: the same model if there is, else a mixture for a mixture; kernels count most.

    Of several that are equally near the slowest is taken. Raises ValueError without any.
    """
    if not steps:
        raise ValueError("No measured steps to go by: give those of scripts/plan_speeds.py.")

    def distance(step: MeasuredStep) -> tuple[bool, bool, bool, float]:
        is_mixture = size.num_experts > 0
        return step.model != size.name, step.kernels != kernels, step.is_mixture != is_mixture, step.flops_per_second

    same_kernels = [step for step in steps if step.kernels == kernels] or list(steps)
    return min(same_kernels, key=distance)


def training_time(
    size: ModelSize,
    setup: TrainingSetup,
    steps: Sequence[MeasuredStep],
    device_factor: float = 1.0,
    bandwidth: float = 450e9,
    network_bandwidth: float = 50e9,
) -> TrainingTime:
    """Estimate an optimizer step.

    device_factor: speed of the GPU over that of the measured ones. bandwidth, network_bandwidth: bytes per second and
    GPU that arrive from GPUs of its node and of other nodes.
    """
    basis = nearest_step(size, setup.kernels, steps)
    tokens_of_gpu = setup.sequences * setup.sequence_length * setup.passes
    work = tokens_of_gpu * flops_per_token(size, setup.sequence_length, forwards_of(setup))
    rate = bandwidth if setup.gpus <= setup.gpus_per_node else network_bandwidth
    inside, across = bytes_sent(size, setup)
    return TrainingTime(
        compute_seconds=work / (basis.flops_per_second * device_factor),
        transfer_seconds=inside / bandwidth + across / rate,
        tokens_per_step=tokens_of_gpu * setup.gpus,
        basis=basis,
        is_same_model=basis.model == size.name,
    )


def bytes_sent(size: ModelSize, setup: TrainingSetup) -> tuple[float, float]:
    """Bytes that one GPU sends in an optimizer step: inside its node whatever the number of nodes, and to all GPUs.

    A ring over N sends (N - 1) / N of what it reduces or gathers, and twice that to leave a sum everywhere. ddp: the
    gradients' sum. fsdp2, zero3: weights gathered forward and backward and gradients scattered in every pass. hsdp:
    the same inside a node, and the sum of a shard's gradients across. ep: fsdp2 for all but the experts, and inside a
    node each chosen token to its experts and back, forward and backward.
    """
    if setup.gpus == 1:
        return 0.0, 0.0
    share = (setup.gpus - 1) / setup.gpus
    if setup.engine in ("single", "ddp"):
        return 0.0, 2 * share * size.total * PRECISIONS[setup.precision]
    of_pass = 3 * COMPUTED * setup.passes
    ranks = setup.ranks_of_node
    share_of_node, nodes = (ranks - 1) / ranks, setup.gpus / ranks
    if setup.engine == "hsdp":
        return share_of_node * of_pass * size.total, 2 * (1 - 1 / nodes) * COMPUTED * size.total / ranks
    if setup.engine == "ep":
        tokens = setup.sequences * setup.sequence_length * setup.passes * len(size.layers)
        exchanged = 4 * COMPUTED * tokens * size.experts_per_token * size.hidden_size
        across = 2 * (1 - 1 / nodes) * COMPUTED * size.experts / ranks
        return share_of_node * exchanged, share * of_pass * (size.total - size.experts) + across
    return 0.0, share * of_pass * size.total
