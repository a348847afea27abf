"""How much memory a GPU needs to train a model: weights, gradients, optimizer, activations, head, workspace.

Two moments of a step are the fullest. When the backward pass begins everything kept for it is there, and the head's
own buffers; when it has ended all gradients are there, and little else:

    begin = weights + optimizer + reference + kept + max(head at work, its gradients + one layer's) + workspace
    end   = weights + optimizer + reference + gradients + one layer + workspace

`begin` holds gradients too where earlier passes of the same step left some. An estimate: allocators round up, and
memory in pieces is lost memory. Letters: T tokens of a pass, V vocabulary, H hidden size. Source: ours; the errors
against measured peaks are in docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from hf_moe_cpt.analysis.kept_tensors import KeptBytes


ENGINES = ("single", "ddp", "fsdp2", "hsdp", "zero3", "ep")
TRAINERS = ("cpt", "rainbowpo", "surgery")
# plain: transformers as it is. experts: our experts in it. fused: those, Liger's norms and MLPs, our head.
KERNELS = ("plain", "experts", "fused")
PRECISIONS = {"mixed": 4, "bfloat16": 2}  # bytes of a weight; mixed computes in bfloat16 under autocast
COMPUTED = 2  # bytes of a number in products
# Copies of a weight that the optimizer holds, in the weights' type; the 8-bit one holds two of a byte each.
COPIES_OF_OPTIMIZER = {"adamw": 2, "sgd_momentum": 1, "sgd": 0}
OPTIMIZERS = (*COPIES_OF_OPTIMIZER, "adamw_8bit")
LOGITS_BYTES = 512 * 2**20  # of a chunk of our fused head
TILE_OF_TRL = 4096 * 32768  # logits of a tile of TRL's fused head
CHUNK_OF_SURGERY = 512  # tokens
SUB_GROUP = 10**9  # parameters that ZeRO-3 steps at a time, with float32 gradients


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters by part. A head tied to the embedding counts once in `total`.

    layers: of each repeated layer. experts: routed experts of all layers. active: what a token is multiplied with, so
    without the embedding, with the head, and with the chosen experts only.
    """

    name: str
    total: int
    embedding: int
    head: int
    layers: tuple[int, ...]
    experts: int
    active: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    hidden_size: int
    attention_width: int  # heads x size of a head
    is_tied: bool


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained.

    batch_size: of one GPU and pass, in sequences, pairs (rainbowpo) or rows of each term (surgery). terms: of a
    surgery. reference: "none", "copy", or "cache" (surgery: the head alone stays in memory).
    """

    engine: str = "single"
    gpus: int = 1
    gpus_per_node: int = 8
    batch_size: int = 8
    sequence_length: int = 2048
    accumulation: int = 1
    checkpointing: bool = False
    precision: str = "mixed"
    optimizer: str = "adamw"
    kernels: str = "fused"
    trainer: str = "cpt"
    reference: str = "none"
    terms: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("engine", ENGINES),
            ("trainer", TRAINERS),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
            ("kernels", KERNELS),
            ("reference", ("none", "copy", "cache")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose from {', '.join(allowed)}.")
        for name in ("gpus", "gpus_per_node", "batch_size", "sequence_length", "accumulation", "terms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    def sequences(self) -> int:
        """Sequences of one forward pass on one GPU."""
        return self.batch_size * (2 if self.trainer == "rainbowpo" else 1)

    @property
    def passes(self) -> int:
        """Backward passes of an optimizer step."""
        return self.accumulation * (self.terms if self.trainer == "surgery" else 1)

    @property
    def ranks_of_node(self) -> int:
        """GPUs of a node that work on this."""
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the fullest GPU at the fullest moment, by what they hold; `moment` is "begin" or "end"."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    head: int
    workspace: int
    moment: str

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return sum(getattr(self, entry.name) for entry in fields(self) if entry.name != "moment")


def training_memory(size: ModelSize, kept: KeptBytes, setup: TrainingSetup) -> TrainingMemory:
    """What one GPU holds at the fuller of the two moments.

    kept: of the decoder, counted with the setup's precision, kernels and sequence length.
    """
    weight, held = PRECISIONS[setup.precision], parameters_held(size, setup)
    sharded = setup.engine in ("fsdp2", "hsdp", "zero3", "ep")
    weights, gradients, optimizer = _states(held, weight, setup)
    reference = _reference(size, held, weight, setup)
    workspace = _gathered(size, setup) if sharded else 0
    if setup.engine == "ddp" and setup.gpus > 1:
        workspace += gradients  # the buckets that are reduced: a second copy of all gradients
    if setup.engine == "zero3":
        workspace += min(held, SUB_GROUP) * 4
    one_layer = setup.sequences * max(kept.layers, default=0)
    fixed = kept.fixed
    if sharded and setup.precision == "mixed":  # gathered weights are in the computed type already: no copies
        fixed -= min(fixed, COMPUTED * (size.total - size.embedding - size.head))
    activations = kept.of_batch(setup.sequences, setup.checkpointing) + fixed
    at_work, its_gradients = head_bytes(size, setup)
    head = max(at_work, its_gradients + one_layer)
    earlier = gradients if setup.passes > 1 else 0
    begin = earlier + activations + head
    end = gradients + one_layer
    parts = {"weights": weights, "optimizer": optimizer, "reference": reference}
    if begin >= end:
        return TrainingMemory(
            **parts,
            gradients=earlier,
            activations=activations,
            head=min(head, at_work),
            workspace=workspace + head - min(head, at_work),
            moment="begin",
        )
    return TrainingMemory(
        **parts, gradients=gradients, activations=one_layer, head=0, workspace=workspace, moment="end"
    )


def parameters_held(size: ModelSize, setup: TrainingSetup) -> int:
    """Parameters that live on the fullest GPU between steps.

    FSDP2 cuts a tensor by its first dimension: experts go to ranks whole, 31 on 8 ranks as 4 on each but one, and on
    64 ranks one on each of 31. ZeRO-3 cuts anywhere. Expert parallelism pads, which comes to the same. Raises
    ValueError for expert parallelism without experts.
    """
    if setup.engine in ("single", "ddp"):
        return size.total
    if setup.engine == "zero3":
        return -(-size.total // setup.gpus)
    if setup.engine == "ep" and not size.num_experts:
        raise ValueError(f"engine='ep' spreads experts, and {size.name} has none: take 'fsdp2'.")
    ranks = setup.gpus if setup.engine in ("fsdp2", "ep") else setup.ranks_of_node
    ranks_of_experts = setup.ranks_of_node if setup.engine == "ep" else ranks
    of_one = size.experts // max(1, size.num_experts)
    return -(-(size.total - size.experts) // ranks) + of_one * -(-size.num_experts // ranks_of_experts)


def head_bytes(size: ModelSize, setup: TrainingSetup) -> tuple[int, int]:
    """Bytes of head and loss while they work, and of the gradients they leave for the layers' backward pass.

    Without a fused head: log-probabilities and two gradients of the logits in float32. Ours: both gradients and a
    chunk of logits. TRL's (rainbowpo): float32 gradients and a tile. Surgery: three chunks of logits in float32.
    """
    tokens, weight = setup.sequences * setup.sequence_length, PRECISIONS[setup.precision]
    states, matrix = tokens * size.hidden_size, size.head
    if setup.trainer == "rainbowpo":
        left = 4 * (states + matrix)
        return left + COMPUTED * min(TILE_OF_TRL, tokens * size.vocab_size), left
    if setup.trainer == "surgery":
        left = 4 * (states + matrix)
        chunks = 3 * 4 * min(CHUNK_OF_SURGERY, tokens) * size.vocab_size
        return left + chunks + (4 + COMPUTED) * matrix, left
    if setup.kernels != "fused":
        return 3 * 4 * tokens * size.vocab_size, weight * (states + matrix)
    left = weight * (states + matrix)
    casts = COMPUTED * (states + matrix) if setup.precision == "mixed" else 0
    return left + casts + min(LOGITS_BYTES, COMPUTED * tokens * size.vocab_size), left


def _states(held: int, weight: int, setup: TrainingSetup) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer."""
    state = 2 if setup.optimizer == "adamw_8bit" else weight * COPIES_OF_OPTIMIZER[setup.optimizer]
    if setup.engine == "zero3" and setup.precision == "mixed":
        return held * COMPUTED, held * COMPUTED, held * (weight + state)  # float32 weights are the optimizer's
    return held * weight, held * weight, held * state


def _reference(size: ModelSize, held: int, weight: int, setup: TrainingSetup) -> int:
    if setup.reference == "none":
        return 0
    if setup.reference == "cache":
        return size.head * weight
    return held * weight


def _gathered(size: ModelSize, setup: TrainingSetup) -> int:
    """Whole weights and gradients of what is at work: two layers and the root, and the gradients being reduced."""
    layer, root = max(size.layers, default=0), size.embedding + (0 if size.is_tied else size.head)
    exchanged = 0
    if setup.engine == "ep":
        layer -= size.experts // max(1, len(size.layers))
        tokens = setup.sequences * setup.sequence_length
        exchanged = 2 * tokens * size.experts_per_token * size.hidden_size  # sent and received
    return COMPUTED * (4 * layer + 2 * root + exchanged)
