"""Rewrite a checkpoint that may be larger than memory: read tensor by tensor, planned, written shard by shard.

Reading: a folder here, or a repository on the Hub, of which the small files come first, so that a model that cannot be
rewritten is refused before its weights are downloaded; then the files that its index names, and no second copy of the
weights in another format. Names, shapes and wholeness are checked first. A file is open, and mapped, only while one
tensor is read from it.

Planning: a planned tensor knows name, shape and type, and yields its values in pieces when it is written.

Writing: memory holds one shard and the piece that is being computed. Everything goes into a hidden neighbour of the
output folder, which gets its name in the last step; an error removes it, and a killed run leaves it to be deleted.

Source: ours; download, cache, retries and the cut into shards are huggingface_hub's, the files are safetensors'.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from hf_moe_cpt.hub.contents import CONFIG, HUB_ID, WEIGHTS
from hf_moe_cpt.hub.publishing import may_pass
from hf_moe_cpt.reading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    read_adapter,
    read_config,
    read_generation_config,
    reading,
    shards_of,
)


# What travels along unchanged: how text becomes tokens, how the model generates, what one may do with it.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_SMALL_FILES = (CONFIG, "*.safetensors.index.json", *COMPANIONS)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_SHARD_SIZE = "5GB"
_NEVER_NEEDED = re.compile(r"rotary_emb\.inv_freq$")
_PARTIAL = ".partial"
_SPARE_BYTES = 32 * 2**20  # tokenizer, code and whatever the disk itself needs


def _download(name: str, revision: str | None, files: Iterable[str]) -> Path:
    """The folder of a snapshot in the cache; files of the repository's own folders are left out. Raises ValueError, in
    one line, for a repository that may not be read; ConnectionError where the Hub does not answer.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except Exception as error:
        raise _explained(error, name, revision) from error


def _explained(error: Exception, name: str, revision: str | None) -> Exception:
    """An error of huggingface_hub said in one line with what to do; others come back as they are."""
    cause = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, HfHubHTTPError):
        error = cause  # neither the Hub's answer nor the cache helped: the answer says why
    if isinstance(error, GatedRepoError):
        return ValueError(f"{name!r} is gated: accept its conditions on the Hub, then log in with `hf auth login`.")
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return ValueError(
            f"{name!r} is no folder here and no repository on the Hub that you may read: check the spelling, and for "
            "a private one log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{name!r} has no revision {revision!r}: name a branch, a tag or a commit of it.")
    if isinstance(error, LocalEntryNotFoundError):
        return ConnectionError(
            f"{name!r} is no folder here, and the Hub cannot be reached (or HF_HUB_OFFLINE is set) while the cache "
            "does not hold it: name a folder, or go online."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return ConnectionError(f"the Hub answered with status {status} for {name!r}: try again later.")
    if may_pass(error):
        return ConnectionError(
            f"the connection to the Hub broke while fetching {name!r} ({type(error).__name__}): run the same command "
            "again, what has arrived is not fetched twice."
        )
    return error


@dataclass(frozen=True)
class _Place:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """The configuration and the tensors that `save_pretrained` wrote, in a folder or in a repository on the Hub.

    source: a folder, or a Hub id; revision: a branch, tag or commit of the latter. name: as it was given; short_name:
    without the path; folder: where the files are; commit: None for a folder. Raises ValueError, in one line, for what
    is no checkpoint, files that are missing, cut short or damaged, and types that are no plain floats; ConnectionError
    where the Hub does not answer. The weights are fetched and checked when the first of them is asked for.
    """

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        self.name, self.folder = str(source), Path(source)
        is_here = self.folder.exists() or not HUB_ID.fullmatch(self.name)
        if is_here and revision is not None:
            raise ValueError(
                f"--revision {revision!r} is for repositories on the Hub, and {self.name!r} is not one here."
            )
        if not is_here:
            self.folder = _download(self.name, revision, _SMALL_FILES)
        self.commit = None if is_here else self.folder.name
        self.short_name = self.folder.resolve().name if is_here else self.name
        self.config = _read_config(self.folder, self.name)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: place.shape for name, place in self._places.items()}

    def require(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        """The type of a tensor; raises ValueError if it is missing or its shape is not what the configuration says."""
        if name not in self._places:
            raise ValueError(f"{self.name} has no tensor {name}, which its config.json promises.")
        place = self._places[name]
        if place.shape != tuple(shape):
            raise ValueError(f"{self.name}: {name} has shape {place.shape}, but its config.json means {tuple(shape)}.")
        return place.dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        with safe_open(self._places[name].file, framework="pt") as file:
            return self._finite(name, file.get_tensor(name))

    def _finite(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if value.numel() and not all(bound.isfinite() for bound in value.aminmax()):
            raise ValueError(f"{self.name}: {name} holds values that are no finite numbers: use a sound checkpoint.")
        return value

    def row(self, name: str, index: int) -> torch.Tensor:
        """Entry `index` of a tensor's first dimension, and no more than that is read: (A, B, ...) -> (B, ...)."""
        with safe_open(self._places[name].file, framework="pt") as file:
            return self._finite(name, file.get_slice(name)[index : index + 1][0])

    @cached_property
    def _places(self) -> dict[str, _Place]:
        """Where every tensor is; brings the weights here first."""
        indexed = _indexed_files(self.folder)
        files = sorted(set(indexed.values())) or [WEIGHTS]
        if self.commit is not None:
            _download(self.name, self.commit, files)
        places: dict[str, _Place] = {}
        for file in files:
            places |= self._read_header(self.folder / file)
        for name, file in indexed.items():
            if name not in places or places[name].file != self.folder / file:
                raise ValueError(
                    f"{self.folder / file} lacks {name}, which {INDEX} says is in it: fetch the checkpoint again."
                )
        return places

    def _read_header(self, path: Path) -> dict[str, _Place]:
        if not path.is_file():
            raise ValueError(f"{path} is missing: {self.name} is no whole checkpoint in safetensors.")
        places = {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    view = file.get_slice(name)
                    if view.get_dtype() not in DTYPES:
                        raise ValueError(
                            f"{path}: {name} has type {view.get_dtype()}, allowed are {', '.join(DTYPES)}: "
                            "save the model unquantised."
                        )
                    places[name] = _Place(path, tuple(view.get_shape()), DTYPES[view.get_dtype()])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut short or damaged ({error}): fetch it again.") from error
        return places


def _read_config(folder: Path, name: str) -> PreTrainedConfig:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{name!r} is no checkpoint (no config.json): name a folder of one, or a Hub id (me/model).")
    config = read_config(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name!r} is quantised: its weights cannot be rewritten; use the original.")
    return config


def _indexed_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint; empty for one of a single file."""
    path = folder / INDEX
    return shards_of(path) if path.is_file() else {}


@dataclass(frozen=True)
class PlannedTensor:
    """pieces: yields tensors that, concatenated along the first dimension, are the value; called once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[torch.Tensor]]
    sources: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def copied(
    reader: CheckpointReader, name: str, shape: tuple[int, ...], new_name: str | None = None, factor: float = 1.0
) -> PlannedTensor:
    """A tensor of the source, under the same name if no other is given, times a factor."""
    dtype = reader.require(name, shape)

    def pieces() -> Iterator[torch.Tensor]:
        yield scaled(reader.tensor(name), factor)

    return PlannedTensor(new_name or name, tuple(shape), dtype, pieces, (name,))


def constant(name: str, shape: tuple[int, ...], dtype: torch.dtype, value: float = 0.0) -> PlannedTensor:
    """A tensor with the same number everywhere."""
    return PlannedTensor(name, tuple(shape), dtype, lambda: iter([torch.full(shape, value, dtype=dtype)]))


def scaled(weight: torch.Tensor, factor: float) -> torch.Tensor:
    """weight x factor in its own type, rounded once."""
    if factor == 1.0:
        return weight
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) * factor).to(weight.dtype)


def skeleton(reader: CheckpointReader, model: PreTrainedModel) -> list[PlannedTensor]:
    """Everything outside the feed-forward blocks, whose names all Llama-like families share.

    model: a `cpt_moe` model on the meta device, the source's or the target's.
    """
    return [copied(reader, name, shape) for name, shape in shapes_of(model).items() if ".mlp." not in name]


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shape by name of what a checkpoint of the model holds: a tied head is not stored."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def refuse_unused(reader: CheckpointReader, plan: Iterable[PlannedTensor], also_used: Iterable[str] = ()) -> None:
    """Raise ValueError if the source holds a tensor that the plan has no place for.

    Biases that are zero throughout, the copy of a tied embedding and stored rotary frequencies mean nothing and pass.
    """
    used = {name for tensor in plan for name in tensor.sources} | set(also_used)
    for name in sorted(set(reader.shapes) - used):
        tied = name == "lm_head.weight" and reader.config.tie_word_embeddings
        if tied or _NEVER_NEEDED.search(name):
            continue
        kind = "bias" if name.endswith(".bias") else "tensor"
        if kind == "tensor" or reader.tensor(name).any():
            raise ValueError(
                f"{reader.name}: {name} cannot be carried over (the target has no such {kind}): this model stays what "
                "it is."
            )


def decay_weights(count: int, decay: str = "linear") -> list[float]:
    """Weights of checkpoints, oldest first, whose mean stands for having decayed the rate from the first to the last.

    A step is in the mean with the weights of all later checkpoints, so that a decay d(s) of the rate is the weight
    d((j - 1) / n) - d(j / n) of checkpoint j of n. linear: all the same; one_minus_sqrt: as WSD decays. Source: WSM,
    arXiv 2507.17634.
    """
    known = {"linear": lambda s: 1 - s, "one_minus_sqrt": lambda s: 1 - s**0.5}
    if decay not in known:
        raise ValueError(f"decay={decay!r} is unknown: choose {', '.join(known)}.")
    ends = [known[decay](place / count) for place in range(count + 1)]
    return [begin - end for begin, end in zip(ends, ends[1:], strict=False)]


def merge(sources: Sequence[str | Path], output_dir: str | Path, weights: Sequence[float]) -> Path:
    """Write the weighted mean of checkpoints of one model, or of adapters of one kind, and return the folder.

    weights: one each, of any sum above 0. Sums are taken in float32, of float32 weights in float64, and rounded once.
    Adapters (peft's LoRA) are joined by rank, which makes the update exactly the mean of theirs. Tokenizer and
    configuration are those of the last. Raises ValueError, in one line, for what does not belong together.
    """
    if len(sources) < 2 or len(weights) != len(sources) or not sum(weights) > 0 or min(weights) < 0:
        raise ValueError(
            f"{len(sources)} checkpoints and the weights {list(weights)}: name at least two, and for each a weight of "
            "at least 0."
        )
    shares, folders = [weight / sum(weights) for weight in weights], [Path(source) for source in sources]
    if any((folder / ADAPTER_CONFIG).is_file() for folder in folders):
        output = check_output(output_dir, folders[-1])
        with appearing_whole(output) as folder:
            _merge_adapters(folders, shares, folder)
            copy_companions(folders[-1], folder)
        return output
    readers = [CheckpointReader(source) for source in sources]
    last = readers[-1]
    output = check_output(output_dir, last.folder)
    for reader in readers:
        if reader.shapes.keys() != last.shapes.keys():
            odd = min(reader.shapes.keys() ^ last.shapes.keys())
            raise ValueError(f"{reader.name} and {last.name} are not of one model: only one of them has {odd}.")
        for name, shape in last.shapes.items():
            reader.require(name, shape)
    plan = [_mean_of(readers, shares, name) for name in last.shapes]
    check_disk_space(output, sum(tensor.num_bytes for tensor in plan))
    with appearing_whole(output) as folder:
        write_weights(folder, plan)
        shutil.copyfile(last.folder / CONFIG, folder / CONFIG)
        copy_companions(last.folder, folder)
    return output


def _mean_of(readers: Sequence[CheckpointReader], shares: Sequence[float], name: str) -> PlannedTensor:
    dtype = readers[-1].require(name, readers[-1].shapes[name])
    exact = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32

    def pieces() -> Iterator[torch.Tensor]:
        total = torch.zeros(readers[-1].shapes[name], dtype=exact)
        for reader, share in zip(readers, shares, strict=True):
            total.add_(reader.tensor(name).to(exact), alpha=share)
        yield total.to(dtype).reshape(readers[-1].shapes[name])

    return PlannedTensor(name, readers[-1].shapes[name], dtype, pieces)


ROUTER_BIAS = "router_bias.safetensors"  # beside an adapter of a mixture that a bias balances
_OF_ONE_ADAPTER = ("r", "lora_alpha", "use_rslora")  # may differ; all else that shapes an adapter must be the same
_NOT_MERGED = {
    "use_dora": "DoRA's magnitudes have no mean",
    "rank_pattern": "ranks by layer are not read",
    "alpha_pattern": "scales by layer are not read",
}


def _merge_adapters(folders: Sequence[Path], shares: Sequence[float], output: Path) -> None:
    """B A of the result is the mean of s B A of the parts: A below one another, B, times share and s, side by side."""
    for folder in folders:
        if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
            raise ValueError(f"{folder} is no adapter in safetensors, and others are: name checkpoints of one kind.")
    configs, parts = zip(*map(read_adapter, folders), strict=True)
    for folder, config in zip(folders, configs, strict=True):
        if config.get("peft_type") != "LORA":
            raise ValueError(f"{folder} is an adapter of the kind {config.get('peft_type')}: only LORA is merged.")
        for name, reason in _NOT_MERGED.items():
            if config.get(name):
                raise ValueError(f"{folder} has {name}: {reason}; merge the whole models instead.")
        for name in ("base_model_name_or_path", "target_modules", "target_parameters", "modules_to_save", "bias"):
            both = (config.get(name), configs[-1].get(name))
            one, other = (sorted(value) if isinstance(value, list) else value for value in both)
            if one != other:
                raise ValueError(f"{folder} has {name}={one} and {folders[-1]} {other}: merge adapters of one kind.")
    rank = sum(config["r"] for config in configs)
    scales = [config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1) for config in configs]
    for folder, part in zip(folders, parts, strict=True):
        if differs := sorted(part.keys() ^ parts[-1].keys()):
            raise ValueError(f"{folder} and {folders[-1]} are not of one kind: only one of them has {differs[0]}.")
    merged = {}
    with reading(f"the adapters {', '.join(map(str, folders))} together", "merge those of one run"):
        for name, last in parts[-1].items():
            values = [part[name].float() for part in parts]
            if "lora_A" in name or "lora_embedding_A" in name:  # of experts: (E * r, in), an expert's rows together
                rows = [v.reshape(-1, c["r"], v.shape[1]) for v, c in zip(values, configs, strict=True)]
                value = torch.cat(rows, dim=1).flatten(0, 1)
            elif "lora_B" in name or "lora_embedding_B" in name:  # (out, r * E), a rank's columns together
                value = torch.cat([v * w * s for v, w, s in zip(values, shares, scales, strict=True)], dim=1)
            else:
                value = sum(v * w for v, w in zip(values, shares, strict=True))
            merged[name] = value.to(last.dtype).contiguous()
    save_file(merged, output / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    biases = [folder / ROUTER_BIAS for folder in folders if (folder / ROUTER_BIAS).is_file()]
    if biases:
        if len(biases) < len(folders):
            raise ValueError(f"{ROUTER_BIAS} lies beside some of the adapters only: merge checkpoints of one run.")
        with reading(f"{ROUTER_BIAS} beside {', '.join(map(str, folders))}"):
            parts = [load_file(path) for path in biases]
            mean = {name: sum(p[name] * w for p, w in zip(parts, shares, strict=True)) for name in parts[-1]}
        save_file(mean, output / ROUTER_BIAS)
    config = configs[-1] | {"r": rank, "lora_alpha": rank, "use_rslora": False}
    (output / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_output(output_dir: str | Path, source: Path | None, option: str = "--output_dir") -> Path:
    """The output folder; raises ValueError if it is in use or lies inside the checkpoint that is read."""
    output = Path(output_dir).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{option} {str(output_dir)!r} is in use: name a new or an empty folder.")
    if source is not None and source.resolve() in output.resolve().parents:
        raise ValueError(f"--output_dir {str(output_dir)!r} lies inside the checkpoint {str(source)!r}: name another.")
    return output


def check_disk_space(output: Path, num_bytes: int) -> None:
    """Raise ValueError if the disk of the output folder cannot hold so much."""
    parent = next(folder for folder in output.parents if folder.exists())
    free, needed = shutil.disk_usage(parent).free, num_bytes + _SPARE_BYTES
    if free < needed:
        raise ValueError(
            f"--output_dir {str(output)!r} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: "
            f"make room{''.join(f', such as by deleting {path}' for path in leftovers(output)[:1])}."
        )


def leftovers(output: Path) -> list[Path]:
    """Folders in which earlier runs towards this output were killed."""
    return sorted(output.parent.glob(f".{output.name}.*{_PARTIAL}"))


@contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `output` if the block ends well and is removed if it does not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.{uuid.uuid4().hex}{_PARTIAL}"
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(folder: Path, plan: Sequence[PlannedTensor], max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Compute and store all tensors, in files of at most max_shard_size ("5GB", or bytes) unless one is larger."""
    planned = {tensor.name: tensor for tensor in plan}
    on_meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in planned.items()}
    split = split_torch_state_dict_into_shards(on_meta, max_shard_size=max_shard_size)
    with tqdm(total=len(planned), desc="tensors", disable=None) as progress:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = _filled(planned[name])
                progress.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
            del shard
            _to_disk(folder / file)
    if split.is_sharded:
        total = sum(tensor.num_bytes for tensor in planned.values())
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, generation settings and licence; returns the names."""
    found = sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})
    if source / "generation_config.json" in found:
        read_generation_config(source)
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in found]


def _filled(planned: PlannedTensor) -> torch.Tensor:
    value = torch.empty(planned.shape, dtype=planned.dtype)
    start = 0
    for piece in planned.pieces():
        value[start : start + len(piece)] = piece
        start += len(piece)
    if start != planned.shape[0]:
        raise RuntimeError(f"{planned.name}: {start} of {planned.shape[0]} rows were made.")
    return value


def _to_disk(path: Path) -> None:
    """Wait until the file is on the disk: a full one may say so only now."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
