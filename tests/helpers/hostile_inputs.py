"""Inputs that should be refused: tiny material for every command, ways to damage it, and what a command made of it.

A case names a command, options that differ from a run that works, and damage to one file of that run. It runs in a
child of a warm process, so that nothing of one case is left for the next. Source: ours.
"""

import dataclasses
import importlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from hf_moe_cpt.cli import COMMANDS
from hf_moe_cpt.data.surgery_bench import SETS, SurgeryBench
from hf_moe_cpt.rounds import OF_THE_LOOP
from hf_moe_cpt.routing.trace import checksum_of_json
from tests.helpers.fresh_process import command_words
from tests.helpers.preference_runs import pairs
from tests.helpers.routings import random_trace
from tests.helpers.tiny_models import QUICK, SIZES, tiny_model, two_domains, word_tokenizer
from tests.helpers.warm_process import WarmProcess


SECONDS = 20
RUN = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS} + 5))
from hf_moe_cpt.cli import main
if sys.argv[1] == "quickstart":  # to where its text is read: the acts after it are those of the other commands
    from hf_moe_cpt import quickstart
    quickstart.run_stage = lambda *_: sys.exit(0)
sys.exit(main())
"""
TRAINED = {**QUICK, "max_steps": 1, "max_length": 16, "per_device_train_batch_size": 2, "output_dir": "out"}
JUDGED = {"output_dir": "out", "device": "cpu", "commit": "abc"}
# Words and options of a run of each command that works, in the folder that `make_material` fills; after a slash, what
# it is given instead: a run to go on with, an adapter, weights in shards, a trace.
WORKING: dict[str, tuple[list[str], dict[str, Any]]] = {
    "schedule": ([], {"max_steps": 100}),
    "plan": ([], {"model": "moe", "seq_length": 32, "tokens": 1e9, "price_per_gpu_hour": 2.0}),
    "card": (["run"], {"print": True}),
    "push": (["run", "me/model"], {"dry_run": True}),
    "upcycle": (["dense"], {"to": "mixture.json", "output_dir": "out"}),
    "convert": (["moe"], {"to": "qwen2_moe", "output_dir": "out"}),
    "analyze": (
        ["moe"],
        {"data": "words=text.jsonl", "tokens_per_domain": 200, "max_length": 16, "min_occurrences": 1, "device": "cpu"}
        | {"output_dir": "out", "log_history": "log"},
    ),
    "cpt": (
        [],
        {**TRAINED, "model_name_or_path": "moe", "dataset_name": "text.jsonl", "replay_dataset_name": "old.jsonl"}
        | {"replay_ratio": 0.5, "held_out_fraction": 0.2},
    ),
    "merge": (
        [],
        {"checkpoints": ["moe", "shards"], "output_dir": "out", "held_out": ["words=text.jsonl"], "use_cpu": True}
        | {"max_length": 16, "weights": [1, 2]},
    ),
    "quickstart": ([], {"data_dir": "texts", "output_dir": "out", "device": "cpu"}),
    "rainbowpo": (
        [],
        {**TRAINED, "model_name_or_path": "dense", "dataset_name": "pairs.jsonl", "max_length": 32, "bf16": False}
        | {"gradient_checkpointing": False},
    ),
    "surgery": (
        [],
        {**TRAINED, "model_name_or_path": "dense", "per_device_train_batch_size": None, "save_strategy": None}
        | {"eval_rows": 2}
        | {f"{name}_dataset_name": f"{name}.jsonl" for name in SETS},
    ),
    "surgery-eval": (
        [],
        {**JUDGED, "before": "dense", "after": "dense", "bench": "bench", "max_questions": 1, "max_documents": 1}
        | {"new_tokens": 2, "resamples": 5, "parts": "texts", "robustness": "none"},
    ),
    "rejection-sample": (
        [],
        {"dataset_name": "prompts.jsonl", "model_name_or_path": "dense", "reward_model_name_or_path": "reward"}
        | {"num_samples": 2, "num_accepted": 2, "max_new_tokens": 4, "output_dir": "out", "device": "cpu"},
    ),
    "eval-preference": (
        [],
        {**JUDGED, "model_name_or_path": "dense", "ref_model_name_or_path": "dense", "prompts": "prompts.jsonl"}
        | {"reward_model_name_or_path": "reward", "dataset_name": "pairs.jsonl", "max_new_tokens": 4},
    ),
}
_FROM_TEXT = {**WORKING["cpt"][1], "replay_dataset_name": None, "dataset_name": None, "replay_ratio": None}
_FROM_TEXT |= {"sources": ["words=text.jsonl:3", "before=old.jsonl:1:replay"]}
WORKING["tokenize"] = ([], {**_FROM_TEXT, "tokenized_data": "written"})
WORKING["rewarm"] = ([], {**_FROM_TEXT, "trial_steps": 2, "rates": [1e-4, 1e-3]})
WORKING["cpt/tokenized"] = ([], {**_FROM_TEXT, "tokenized_data": "tokenized"})
WORKING["merge/adapters"] = ([], {**WORKING["merge"][1], "checkpoints": ["adapter", "adapter"]})
STAGES = {"sample": "rejection-sample", "train": "rainbowpo", "evaluate": "eval-preference"}
STAGE_OPTIONS: dict[str, dict[str, Any]] = {
    stage: {name: value for name, value in WORKING[command][1].items() if value and name not in OF_THE_LOOP[command]}
    for stage, command in STAGES.items()
}
WORKING["iterate"] = (
    [],
    {"model_name_or_path": "dense", "output_dir": "out", "rounds": 1}
    | {stage: json.dumps(options) for stage, options in STAGE_OPTIONS.items()},
)
SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "output_dir": "begun"}
WORKING["analyze/trace"] = (["trace"], {"output_dir": "out", "min_occurrences": 1})
WORKING["convert/shards"] = (["shards"], WORKING["convert"][1])
WORKING["cpt/shards"] = ([], {**WORKING["cpt"][1], "model_name_or_path": "shards"})
WORKING["push/shards"] = (["shards", "me/model"], {"dry_run": True, "method": "cpt"})
WORKING["surgery-eval/adapter"] = ([], {**WORKING["surgery-eval"][1], "after": "adapter"})
_ADAPTED = {**WORKING["cpt"][1], "model_name_or_path": "dense", "use_peft": True, "lora_target_modules": "q_proj"}
RESUMED = {name: WORKING[name][1] for name in ("cpt", "rainbowpo", "surgery")} | {"cpt/adapter": _ADAPTED}
for _name, _options in RESUMED.items():
    _options = {**_options, **SAVING, "eval_steps": 1, "output_dir": f"begun-{_name.replace('/', '-')}"}
    _options["resume_from_checkpoint"] = "last"
    WORKING[f"{_name}/resume"] = ([], _options)
GONE_ON = ("rejection-sample", "surgery-eval", "eval-preference", "iterate", "quickstart")  # their folders tell
for _name in GONE_ON:
    WORKING[f"{_name}/resume"] = ([], {**WORKING[_name][1], "output_dir": f"begun-{_name}"})
_OF_A_CHECKPOINT = (
    "trainer_state.json run_state.json bad_steps.json optimizer.pt scheduler.pt rng_state.pth training_args.bin"
).split()
_ITS_OWN = {
    "cpt": ["model.safetensors", "config.json", "cpt_state.json"],
    "rainbowpo": ["model.safetensors", "config.json", "rainbowpo.json"],
    "surgery": ["model.safetensors", "config.json", "surgery.json"],
    "cpt-adapter": ["adapter_model.safetensors", "adapter_config.json", "cpt_state.json"],
}
FILES_OF = {
    **dict.fromkeys(("reward", "run"), ["config.json", "model.safetensors", "tokenizer.json"]),
    **dict.fromkeys(
        ("moe", "dense"), ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
    ),
    "tokenized": ["tokenized.json", "train/words/dataset_info.json", "train/words/state.json"]
    + ["train/words/data-00000-of-00001.arrow", "held_out/before/state.json"],
    "texts": ["1-words/rows.jsonl", "2-numbers/rows.jsonl"],
    "bench": ["bench.json", "documents/unlearn.parquet", "questions/test.parquet"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors"],
    "shards": ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "config.json"],
    "log": ["trainer_state.json"],
    "trace": ["trace.json", "shard_00000.safetensors"],
    **{
        f"begun-{name}": [f"checkpoint-1/{file}" for file in (*_OF_A_CHECKPOINT, *own)]
        for name, own in _ITS_OWN.items()
    },
}
FILES_OF["run"] = [*FILES_OF["run"], "trainer_state.json", "cpt_state.json", "training_run.json"]
_STAGES = "responses-policy rewards-reference logps-policy".split()
FILES_OF |= {
    "begun-rejection-sample": ["rejection_sample.json", "summary.json", "data/train.parquet"]
    + [f"stages/{stage}" for stage in ("generate", "score", "select")],
    "begun-surgery-eval": ["eval_surgery.json", "results.json", "work/after/texts.json"],
    "begun-eval-preference": ["eval_preference.json", "summary.json"]
    + [f"work/{stage}/00000.jsonl" for stage in _STAGES],
    "begun-iterate": ["iterate.json", "report.json", "round-1/evaluation/summary.json", "round-1/pairs/summary.json"],
    "begun-quickstart": ["quickstart.json", "corpus/manifest.json", "corpus/1-words/train.arrow"]
    + ["tokenizer/tokenizer.json"],
}


def make_material(folder: Path) -> Path:
    """Models, texts, pairs, prompts, sets, a bench, a mixture and a run with its log; returns the folder."""
    rows = pairs(8)
    for name in ("text", "old"):
        texts = [{"text": " ".join([row["prompt"], row["chosen"], row["rejected"]])} for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, texts)))
    rows.to_json(folder / "pairs.jsonl")
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": row["prompt"]}) for row in rows))
    for seed, name in enumerate(SETS):
        rows = pairs(4, seed).rename_column("chosen", "completion").remove_columns("rejected")
        rows.to_json(folder / f"{name}.jsonl")
    SurgeryBench.generate(num_subjects=15, kinds=("person",), forms=("quiz",)).save(folder / "bench")
    models = {"moe": tiny_model("cpt_moe", partial_rotary_factor=1.0), "run": tiny_model("cpt_moe")}
    models["dense"] = tiny_model("llama", max_position_embeddings=512)
    models["dense"].get_output_embeddings().weight.data *= 30
    torch.manual_seed(1)
    reward = LlamaConfig(**{**SIZES, "pad_token_id": 1, "max_position_embeddings": 512}, num_labels=1)
    models["reward"] = LlamaForSequenceClassification(reward)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 0, "moe_intermediate_size": 16}
    (folder / "mixture.json").write_text(json.dumps(mixture | {"norm_topk_prob": True}))
    entry = {"step": 1, "loss": 3.5, "eval_new_loss": 3.4}
    entry |= {f"{name}/layer_0{layer}": 0.5 for layer in range(2) for name in ("mri", "mri_normalized")}
    state = {"global_step": 1, "log_history": [entry]}
    for name, facts in {"trainer_state": state, "cpt_state": {"phase": "anneal"}, "training_run": {}}.items():
        (folder / "run" / f"{name}.json").write_text(json.dumps(facts))
    (folder / "log").mkdir()
    shutil.copy(folder / "run" / "trainer_state.json", folder / "log")
    models["moe"].save_pretrained(folder / "shards", max_shard_size="30KB")
    word_tokenizer().save_pretrained(folder / "shards")
    adapted = get_peft_model(models["dense"], LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = "dense"
    adapted.save_pretrained(folder / "adapter")
    word_tokenizer().save_pretrained(folder / "adapter")
    random_trace(folder / "trace")
    for domain in two_domains(folder / "texts").iterdir():
        rows = [json.dumps({"text": path.read_text()}) for path in sorted(domain.iterdir())]
        for path in domain.iterdir():
            path.unlink()
        (domain / "rows.jsonl").write_text("\n".join(rows))
    return folder


def _with(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _flip(path: Path) -> None:
    data, draw = bytearray(path.read_bytes()), random.Random(1)
    for _ in range(8):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)


DAMAGE: dict[Any, Callable[[Path], object]] = {
    "empty": _with(""),
    "zeros": _with(bytes(300)),
    "no text": _with(b"\xff\xfe\xfa{}"),
    "list": _with("[1, 2]"),
    "number": _with("7"),
    "null": _with("null"),
    "word": _with('"words"'),
    "deep": _with("[" * 100_000),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "gone": Path.unlink,
    "flipped": _flip,
}
_ROWS = {
    "beyond the vocabulary": {"input_ids": [1, 2, 99999]},
    "negative": {"input_ids": [1, -2, 3]},
    "64 bits and more": {"input_ids": [10**20]},
    "no text": {"text": None, "prompt": None, "chosen": None, "rejected": None},
    "nothing": {"text": "", "prompt": "", "chosen": "", "rejected": ""},
    "numbers": {"text": 5, "prompt": 5, "chosen": 5, "rejected": 5},
    "lists": {"text": ["a"], "prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
    "turns without words": {"prompt": [{"role": "user"}], "chosen": [{"x": 1}], "rejected": []},
    "others": {"other": 1},
}
ROWS = {name: _with(f"{json.dumps(row)}\n" * 8) for name, row in _ROWS.items()}


def _setting(key: str, value: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        data = json.loads(path.read_text()) | {key: value}
        signed = {"checksum": checksum_of_json(data)} if "checksum" in data and key != "checksum" else {}
        path.write_text(json.dumps(data | signed))

    return change


_KEYS = "vocab_size hidden_size num_hidden_layers num_attention_heads rope_parameters model_type dtype num_experts"
_OF_STATE = (
    "num_experts_per_tok architectures log_history global_step phase epoch max_steps settings tokens_seen losses sum "
    "left_out in_a_row count start dispersion_scale starts_from stopped_by weight_map base_model_name_or_path "
    "peft_type r lora_alpha target_modules description shards checksum format stateful_callbacks base_model_class "
    "pairs mean_score measures settings model version rows features splits _data_files source seed model_max_length "
    "added_tokens chat_template transformers_version eos_token_id bos_token_id"
)
VALUES = {
    (key, str(value) if isinstance(value, list | dict) else value): _setting(key, value)
    for key in (*_KEYS.split(), *_OF_STATE.split())
    for value in (None, -1, 0, 1.5, "words", float("nan"), [1], {"a": 1}, True)
}
VALUES["num_hidden_layers", 10**9] = _setting("num_hidden_layers", 10**9)


def _tensors(change: Callable[[dict[str, torch.Tensor], str], object], part: str) -> Callable[[Path], object]:
    """Damage to the first tensor whose name has the part, to the first of all if none has."""

    def damage(path: Path) -> None:
        tensors = load_file(path)
        change(tensors, min(tensors, key=lambda name: (part not in name, name)))
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


WEIGHTS = {
    "lost": _tensors(lambda tensors, name: tensors.pop(name), "layers.1"),
    "NaN": _tensors(lambda tensors, name: tensors.update({name: torch.full(tensors[name].shape, torch.nan)}), "mlp."),
    "infinite": _tensors(
        lambda tensors, name: tensors.update({name: torch.full(tensors[name].shape, torch.inf)}), "embed"
    ),
    "narrow": _tensors(lambda tensors, name: tensors.update({name: tensors[name][..., :-1].contiguous()}), "layers.0"),
    "renamed": _tensors(lambda tensors, name: tensors.update({f"{name}_x": tensors.pop(name)}), "layers.0"),
}


def _torch_file(value: Any) -> Callable[[Path], object]:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return _with(buffer.getvalue())


TORCH_FILES = {
    "no object": _torch_file([1]),
    "nothing in it": _torch_file({}),
    "of another": _torch_file({"state": {}, "param_groups": [{"params": [0], "lr": 1.0}], "python": 1}),
    "words": _torch_file({"state": "words", "param_groups": None, "last_epoch": "words", "cpu": "words"}),
}


READ_NO_WEIGHTS = ("plan", "tokenize")  # the configuration alone


def files_read(command: str) -> list[str]:
    """Files below the material that the working run of a command reads."""
    files, (words, options) = [], WORKING[command]
    for name in dict.fromkeys(re.findall(r"[\w.-]+", " ".join([*words, *map(str, options.values())]))):
        files += [f"{name}/{file}" for file in FILES_OF.get(name, ())]
        files += [name] if name.endswith((".json", ".jsonl")) else []
    if command in READ_NO_WEIGHTS:
        files = [file for file in files if not file.endswith(".safetensors")]
    return files or ["text.jsonl"]


def damages_of(file: str) -> dict[Any, Callable[[Path], object]]:
    """What can be done to a file of its kind, by name."""
    kinds = {".safetensors": WEIGHTS, ".jsonl": ROWS, "": ROWS, ".json": VALUES}  # a folder is one of rows
    kinds |= dict.fromkeys((".pt", ".pth", ".bin"), TORCH_FILES)
    return {**DAMAGE, **kinds.get(Path(file).suffix, {})}


def options_of(command: str) -> list[str]:
    """Names of all options of a command but those that reach out, say where it writes, or compile."""
    kinds = importlib.import_module(COMMANDS[command.partition("/")[0]].module).ARGUMENTS
    names = {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}
    return sorted(names - {"push_to_hub", "output_dir", "folder", "repository", "launcher", "torch_compile"})


def numbers_of(kind: type) -> dict[str, bool]:
    """Names of a dataclass's options that are numbers, and whether they are lists of them."""
    found = {}
    for option in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[option.name]
        parts = set(typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,))
        kinds = {typing.get_args(part)[0] if typing.get_origin(part) is list else part for part in parts}
        if option.init and kinds & {int, float}:
            found[option.name] = not parts & {int, float}
    return found


def is_no_value(command: str, option: str, value: Any) -> bool:
    """Whether no run can mean it: the option is a number or a switch, and the value, a word or of YAML, is neither.

    True is no number; 1.5 is no count; NaN is nothing.
    """
    kinds = importlib.import_module(COMMANDS[command.partition("/")[0]].module).ARGUMENTS
    hint = next(typing.get_type_hints(kind)[option] for kind in kinds if option in typing.get_type_hints(kind))
    hints = set(typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,))
    if not hints <= {int, float, bool, types.NoneType} or hints <= {bool, types.NoneType}:
        return False
    if isinstance(value, bool) or value is None:
        return value is not None and bool not in hints
    try:
        number = float(value)
    except (TypeError, ValueError):
        return bool not in hints
    return math.isnan(number) or (float not in hints and number != round(number) if math.isfinite(number) else False)


@dataclass(frozen=True)
class Case:
    """options: changes of those that work, None leaves one out. settings: text of a --config file, if there is one.

    damage: done to `file` before, called `name`. option, value: what is changed, of `owner` if not of the command.
    """

    command: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: str | None = None
    file: str | None = None
    name: object = None
    damage: Callable[[Path], object] | None = None
    option: str | None = None
    value: Any = None
    owner: str | None = None


@dataclass(frozen=True)
class Outcome:
    """code: of the process; said: the end of its errors; shown: what it printed."""

    command: str
    code: int
    said: str
    shown: str

    @property
    def fault(self) -> str | None:
        """What no input may bring about, None if it did not."""
        if self.code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
            return "hang"
        if self.code not in (0, 2) or "Traceback (most recent call last)" in self.said:
            return "traceback"
        if self.code == 2 and not re.search(r"(?m)^error: .+$", self.said):
            return "silent"
        if self.code == 0 and re.search(r"(?<![\w./'-])(nan|-?inf)(?![\w/])", self.shown):
            return "no number"
        if self.code == 0 and self.command in ("plan", "schedule") and re.search(r"(?<![\w.-])-\d", self.shown):
            return "below zero"
        return None

    @property
    def numbers(self) -> list[str]:
        """All that was printed but how long it took."""
        clocks = r"[\w/]*(runtime|per_second|tflops)[\w/]*'?(:| +=) *'?[\d.:e-]+|[\d.]+ (ms|s|min|tokens/s)\b"
        return re.findall(r"[\d.]+", re.sub(clocks, "", self.shown))


class Trials:
    """Runs cases, each in a fresh copy of the material. environment: of the processes."""

    def __init__(self, material: Path, folder: Path, environment: dict[str, str]) -> None:
        self.material, self.folder, self.environment, self.count = material, folder, environment, 0
        modules = ("trl", *(command.module for command in COMMANDS.values()))
        self.process = WarmProcess(environment, ("hf_moe_cpt.cli", *modules))
        (self.material / "case.py").write_text(RUN)
        self._make("tokenize", tokenized_data="tokenized")
        for name in RESUMED:
            self._begin(name)
        for name in GONE_ON:
            self._make(name, output_dir=f"begun-{name}")

    def _make(self, name: str, **changes: Any) -> None:
        words, options = WORKING[name]
        words = [name.partition("/")[0], *words, *command_words({**options, **changes})]
        done = self.process.run(self.material / "case.py", words, self.environment, seconds=300)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-3000:]}")

    def _begin(self, name: str) -> None:
        """Leave the first checkpoint of a run in the material, without the list that says what was written."""
        self._make(f"{name}/resume", resume_from_checkpoint=None)
        run = self.material / WORKING[f"{name}/resume"][1]["output_dir"]
        for path in run.iterdir():
            if path.name not in ("checkpoint-1", "_run.lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (run / "checkpoint-1" / "checkpoint_files.json").unlink()

    def run(self, case: Case, keep: bool = False) -> Outcome:
        """What became of it; keep: leave the folder."""
        self.count += 1
        place = self.folder / f"case-{self.count}"
        shutil.copytree(self.material, place)
        words, options = WORKING[case.command]
        words = [*words, *command_words({**options, **case.options})]
        if case.settings is not None:
            (place / "settings.yaml").write_text(case.settings)
            words += ["--config", "settings.yaml"]
        if case.damage is not None:
            path = place / case.file
            case.damage(min(path.iterdir()) if path.is_dir() else path)  # its name may hold a checksum
        (place / "case.py").write_text(RUN)
        words = [case.command.partition("/")[0], *words]
        crowd = max(1.0, os.getloadavg()[0] / os.cpu_count())  # others on this machine take their share of the time
        done = self.process.run(place / "case.py", words, self.environment, seconds=int(SECONDS * crowd))
        if not keep:
            shutil.rmtree(place)
        return Outcome(case.command, done.returncode, done.stderr[-3000:], done.stdout)

    def close(self) -> None:
        """End the warm process."""
        self.process.close()
