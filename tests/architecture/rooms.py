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
_SHARED_BY_TRAINERS = ("accelerate", "datasets", "numpy", "safetensors", "torch", "transformers")
_TRAINER = Room(
    ours=(
        "hf_moe_cpt.analysis",
        "hf_moe_cpt.data",
        "hf_moe_cpt.extras",
        "hf_moe_cpt.hub",
        "hf_moe_cpt.optim",
        "hf_moe_cpt.trainers.instruments",
    ),
    others=_SHARED_BY_TRAINERS,
)

# The longest matching package decides. What the front door imports at its top is a rule of its own: nothing.
ROOMS = {
    "hf_moe_cpt": Room(ours=_EVERY_ROOM),
    "hf_moe_cpt.analysis": Room(others=("numpy", "safetensors", "torch", "tqdm")),
    "hf_moe_cpt.metrics": Room(("hf_moe_cpt.analysis",), ("datasets", "evaluate", "numpy", "torch")),
    "hf_moe_cpt.data": Room(
        ours=("hf_moe_cpt.extras",),
        others=("datasets", "jinja2", "numpy", "pyarrow", "tokenizers", "torch", "tqdm", "transformers"),
    ),
    "hf_moe_cpt.optim": Room(others=("torch",)),
    "hf_moe_cpt.kernels": Room(
        ours=("hf_moe_cpt.extras",), others=("liger_kernel", "torch", "transformers", "triton")
    ),
    "hf_moe_cpt.modeling": Room(others=("huggingface_hub", "torch", "transformers")),
    "hf_moe_cpt.trainers": Room(),
    "hf_moe_cpt.trainers.instruments": _TRAINER,
    "hf_moe_cpt.trainers.cpt": _TRAINER,
    "hf_moe_cpt.trainers.surgery": _TRAINER,
    "hf_moe_cpt.trainers.rainbowpo": Room(_TRAINER.ours, (*_SHARED_BY_TRAINERS, "tqdm", "trl")),
    "hf_moe_cpt.scripts": Room(
        ours=_EVERY_ROOM,
        others=(*_SHARED_BY_TRAINERS, "huggingface_hub", "tokenizers", "tqdm", "trl", "yaml"),
    ),
    "hf_moe_cpt.hub": Room(
        ours=("hf_moe_cpt.analysis", "hf_moe_cpt.extras", "hf_moe_cpt.hub_cards", "hf_moe_cpt.modeling"),
        others=("huggingface_hub", "safetensors", "torch", "tqdm", "transformers", "yaml"),
    ),
    "hf_moe_cpt.hub_cards": Room(),
}


def room_of(package: str) -> tuple[str, Room]:
    """The room that a package of ours belongs to. A package in no room raises KeyError: add it to the table."""
    while package not in ROOMS:
        if "." not in package:
            raise KeyError(package)
        package = package.rpartition(".")[0]
    return package, ROOMS[package]
