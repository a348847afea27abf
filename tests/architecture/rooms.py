"""The table of rooms: which folder holds what, and whom it may import. CONTRIBUTING.md tells the same to people."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """What files of a package may import, besides Python's own library and the package itself.

    ours: packages of this project, with everything below them. others: top-level names of installed packages.
    """

    ours: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def _room(ours: str, others: str = "") -> Room:
    """From words; those of ours without hf_moe_cpt in front, which "." is."""
    return Room(tuple(f"hf_moe_cpt.{name}".rstrip(".") for name in ours.split()), tuple(others.split()))


_FRONT = "extras machine reading settings"
_COMMON = f"{_FRONT} data evaluation hub kernels optim planning reports routing trainers.common"
_TRAINING = "accelerate datasets numpy safetensors torch transformers"
_NUMBERS = "numpy safetensors torch tqdm transformers"

# The longest matching package decides. What the front door imports at its top is a rule of its own: nothing.
_ROOMS = {
    "": _room(".", f"{_TRAINING} tqdm trl yaml"),
    "analysis": _room("routing reports"),  # the old name of these rooms
    "data": _room(_FRONT, "datasets jinja2 numpy pyarrow tokenizers torch tqdm transformers yaml"),
    # trainers.surgery.chunked: hidden states, head and KL of the anchor, measured as trained; routing: old routes
    "evaluation": _room(
        f"{_FRONT} data generation reports routing trainers.surgery.chunked",
        f"{_NUMBERS} accelerate datasets peft yaml",
    ),
    # arguments: what a command is told is checked where its settings live
    "generation": _room(f"{_FRONT} arguments data evaluation", f"{_NUMBERS} datasets"),
    "hub": _room(
        f"{_FRONT} hub_cards modeling reports routing", "huggingface_hub safetensors torch tqdm transformers yaml"
    ),
    "hub_cards": Room(),
    "kernels": _room(f"{_FRONT} modeling", "liger_kernel torch transformers triton"),
    "metrics": _room("evaluation routing", "datasets evaluate numpy torch"),
    "modeling": _room("", "huggingface_hub torch transformers"),
    "optim": _room("", "torch triton"),
    "planning": _room(f"{_FRONT} modeling reports routing", f"{_NUMBERS} accelerate huggingface_hub"),
    "reports": _room(_FRONT),
    "routing": _room(f"{_FRONT} data lazy_names reports", f"{_NUMBERS} accelerate datasets"),
    "scripts": _room(".", f"{_TRAINING} huggingface_hub tokenizers tqdm trl yaml"),
    "trainers": Room(),
    "trainers.common": _room(_COMMON, _TRAINING),
    "trainers.cpt": _room(_COMMON, _TRAINING),
    "trainers.rainbowpo": _room(_COMMON, f"{_TRAINING} tqdm trl yaml"),
    "trainers.surgery": _room(_COMMON, _TRAINING),
}
ROOMS = {f"hf_moe_cpt.{name}".rstrip("."): room for name, room in _ROOMS.items()}
NAMED = {*ROOMS, *(ours for room in ROOMS.values() for ours in room.ours)}


def room_of(package: str) -> tuple[str, Room]:
    """The room that a package of ours belongs to. A package in no room raises KeyError: add it to the table."""
    while package not in ROOMS:
        if "." not in package:
            raise KeyError(package)
        package = package.rpartition(".")[0]
    return package, ROOMS[package]
