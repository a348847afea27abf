"""The table of rooms: which folder holds what, and whom it may import. CONTRIBUTING.md tells the same to people."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """What files of a package may import, besides Python's own library and the package itself.

    ours: packages of this project, with everything below them. others: top-level names of installed packages.
    """

    ours: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


_EVERY_ROOM = ("hf_moe_cpt",)
_FRONT = ("hf_moe_cpt.extras", "hf_moe_cpt.lazy", "hf_moe_cpt.machine")
_TRAINER = Room(
    ours=(
        *_FRONT,
        "hf_moe_cpt.data",
        "hf_moe_cpt.evaluation",
        "hf_moe_cpt.hub",
        "hf_moe_cpt.kernels",
        "hf_moe_cpt.optim",
        "hf_moe_cpt.planning",
        "hf_moe_cpt.reports",
        "hf_moe_cpt.routing",
        "hf_moe_cpt.trainers.common",
    ),
    others=("accelerate", "datasets", "numpy", "safetensors", "torch", "transformers"),
)
_NUMBERS = ("numpy", "safetensors", "torch", "tqdm", "transformers")

# The longest matching package decides. What the front door imports at its top is a rule of its own: nothing.
ROOMS = {
    "hf_moe_cpt": Room(_EVERY_ROOM, (*_TRAINER.others, "tqdm", "trl", "yaml")),
    "hf_moe_cpt.analysis": Room(("hf_moe_cpt.routing", "hf_moe_cpt.reports")),  # the old name of these rooms
    "hf_moe_cpt.data": Room(
        _FRONT, ("datasets", "jinja2", "numpy", "pyarrow", "tokenizers", "torch", "tqdm", "transformers", "yaml")
    ),
    "hf_moe_cpt.evaluation": Room(
        (
            *_FRONT,
            "hf_moe_cpt.data",
            "hf_moe_cpt.generation",
            "hf_moe_cpt.reports",
            "hf_moe_cpt.trainers.surgery.chunked",  # hidden states, head and KL of the anchor: measured as trained
        ),
        (*_NUMBERS, "accelerate", "datasets", "peft"),
    ),
    "hf_moe_cpt.generation": Room(
        # arguments: what a command is told is checked where its settings live
        (*_FRONT, "hf_moe_cpt.arguments", "hf_moe_cpt.data", "hf_moe_cpt.evaluation"),
        (*_NUMBERS, "datasets", "huggingface_hub"),
    ),
    "hf_moe_cpt.hub": Room(
        (*_FRONT, "hf_moe_cpt.hub_cards", "hf_moe_cpt.modeling", "hf_moe_cpt.reports", "hf_moe_cpt.routing"),
        ("huggingface_hub", "safetensors", "torch", "tqdm", "transformers", "yaml"),
    ),
    "hf_moe_cpt.hub_cards": Room(),
    "hf_moe_cpt.kernels": Room((*_FRONT, "hf_moe_cpt.modeling"), ("liger_kernel", "torch", "transformers", "triton")),
    "hf_moe_cpt.metrics": Room(
        ("hf_moe_cpt.evaluation", "hf_moe_cpt.routing"), ("datasets", "evaluate", "numpy", "torch")
    ),
    "hf_moe_cpt.modeling": Room(others=("huggingface_hub", "torch", "transformers")),
    "hf_moe_cpt.optim": Room(others=("torch", "triton")),
    "hf_moe_cpt.planning": Room(
        (*_FRONT, "hf_moe_cpt.modeling", "hf_moe_cpt.reports", "hf_moe_cpt.routing"), (*_NUMBERS, "huggingface_hub")
    ),
    "hf_moe_cpt.reports": Room(_FRONT),
    "hf_moe_cpt.routing": Room(
        (*_FRONT, "hf_moe_cpt.data", "hf_moe_cpt.reports"), (*_NUMBERS, "accelerate", "datasets")
    ),
    "hf_moe_cpt.scripts": Room(
        _EVERY_ROOM, (*_TRAINER.others, "huggingface_hub", "tokenizers", "tqdm", "trl", "yaml")
    ),
    "hf_moe_cpt.trainers": Room(),
    "hf_moe_cpt.trainers.common": _TRAINER,
    "hf_moe_cpt.trainers.cpt": _TRAINER,
    "hf_moe_cpt.trainers.rainbowpo": Room(_TRAINER.ours, (*_TRAINER.others, "tqdm", "trl")),
    "hf_moe_cpt.trainers.surgery": _TRAINER,
}


def room_of(package: str) -> tuple[str, Room]:
    """The room that a package of ours belongs to. A package in no room raises KeyError: add it to the table."""
    while package not in ROOMS:
        if "." not in package:
            raise KeyError(package)
        package = package.rpartition(".")[0]
    return package, ROOMS[package]
