"""What of a folder is published: a list of kinds, no link, no pickle, no secret, no path of this machine.

Everything of another kind stays at home and is named. Files other than weights are read once: the bytes that
were looked at are those that are uploaded. Nothing in the folder is changed, executed or unpickled.

Secrets are known by the form that their issuers give them, or by a name such as api_key before them; in texts that
hold no vocabulary, also by letters that follow no pattern (their entropy); the forms are those that the issuers
document.

Then what the folder says about the run that made it: config.json or adapter_config.json (the model), training_run.json
(arguments, parents, machine, versions; written by our trainers), trainer_state.json (the log), all_results.json (the
last evaluation), cpt_state.json, rainbowpo.json and surgery.json (what a method keeps). Each may be missing; then the
card is silent about it. And what it must be: a whole checkpoint that loads anywhere, with the tensors and shapes that
its configuration says and finite numbers in them. Source: ours.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import pickletools
import re
import struct
import tokenize
import unicodedata
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from hf_moe_cpt.reading import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    check_weights,
    reading,
    require_numbers,
    shards_of,
)
from hf_moe_cpt.reading import read_json as read_any_json


CARD, RUN_FILE = "README.md", "training_run.json"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
# Vocabularies hold any word there is: none of them is rewritten, and a word that looks like noise is a word.
_VOCABULARIES = {*TOKENIZER_FILES, "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json"}
# How the tokenizer's last reader reached it, which transformers writes down with what the tokenizer is.
_READING = ("is_local", "local_files_only")
_FACTS = (
    "training_run.json trainer_state.json all_results.json eval_results.json train_results.json cpt_state.json "
    "rainbowpo.json surgery.json upcycling.json"
).split()
_TERMS = {f"{name}{end}" for name in ("LICENSE", "NOTICE", "USE_POLICY") for end in ("", ".md", ".txt")}
KINDS = {CARD, CONFIG, "generation_config.json", ADAPTER_CONFIG, *_VOCABULARIES, *_FACTS, *_TERMS}
_PLOT = re.compile(r"plots/[\w-]+\.svg")
_SIBLING_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
MAX_FACT = 300  # characters of a name or a sentence among the facts of a run
MAX_HEADER_TEXT = 200  # characters of a note in the header of a safetensors file

_SECRETS = {
    "a Hub token": r"\b(?:hf_|api_org_|hf_oauth_)[A-Za-z0-9]{30,}",
    "a private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File|AGE-SECRET-KEY-1[A-Z0-9]{20,}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{40,}",
    "a token of GitLab": r"\bglpat-[\w-]{20,}",
    "a key of a model's API": r"\bsk-[A-Za-z0-9_-]{20,}|\bgsk_[A-Za-z0-9]{40,}|\br8_[A-Za-z0-9]{36,}",
    "a key of Google": r"\bAIza[\w-]{35}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}",
    "a token of Slack": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/\w+/\w+/\w+",
    "a token of Discord or Telegram": r"discord(?:app)?\.com/api/webhooks/\d+/[\w-]{20,}|\b\d{8,10}:AA[\w-]{33}\b",
    "a key of Stripe": r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "a key of SendGrid": r"\bSG\.[\w-]{16,}\.[\w-]{16,}",
    "a token of a package index": r"\bpypi-[\w-]{40,}|\bnpm_[A-Za-z0-9]{30,}",
    "a signed token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
    "a key of Azure": r"AccountKey=[A-Za-z0-9+/]{40,}|[?&]sig=[A-Za-z0-9%+/]{30,}",
    "a password in an address": r"\w://[^/\s:@\"']{1,80}:[^/\s:@\"'{}<$*][^/\s:@\"']{2,80}@[\w.-]",
    "a token of a service": r"\bdo[opr]_v1_[0-9a-f]{64}|\b(?:dapi|shp[a-z]{2}_)[0-9a-f]{32}|\bhvs\.[\w-]{24,}",
    "a header with a secret": r"(?i:authorization)[\"']?\s*[:=]\s*[\"']?(?i:bearer|basic)\s+[\w.+/=-]{12,}",
    "an entry of a .netrc": r"\bmachine\s+\S+\s+login\s+\S+\s+password\s+\S+",
}
_FORMS = re.compile("|".join(f"(?P<k{number}>{form})" for number, form in enumerate(_SECRETS.values())))
_NAMED = re.compile(
    r"(?i:(?:^|[^a-z])(?:[a-z]+[_-])*(?:password|passwd|passphrase|secret(?:[_-]?(?:access)?[_-]?key)?|"
    r"(?:api|access|private|wandb|account|signing|master|service)[_-]?key|credentials?|"
    r"(?:auth|access|api|hub|hf|refresh|bot|wandb|session)[_-]?token)|"
    r"(?:^|[\"'])token)[\"']?\s*[:=]\s*[\"']?(?P<value>[^\s\"',;}{\[\]()<>]{8,})"
)
# Forty letters with "/" and "+" are how AWS writes its secrets; longer ones are paths.
_NOISE = re.compile(r"[A-Za-z0-9+=]{24,}|(?<![A-Za-z0-9+/=._-])[A-Za-z0-9+/]{40}(?![A-Za-z0-9+/=._-])")
_NO_LETTERS = "0123456789+/"
_RUN, _NOISE_LETTERS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+|[+/=]+"), 2.9  # letters of one kind in a row, on average
_NOISE_BITS = 3.9  # of entropy a character: 24 random letters and digits have 4.3 on average, names of any kind less

_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]|\\\\+(?=[_*`~-])")  # what a page does not show
_ESCAPED, _BASE64 = re.compile(r"\\+u00([0-7][0-9a-fA-F])"), re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{40,}")
# A drawing that does something, or brings what is no drawing; and where it holds words.
_ACTIVE = re.compile(
    r"(?i)<\s*(?:script|foreignobject|iframe|object|embed)\b|<[^>]*\son\w+\s*=|javascript:|"
    r"(?:href|src)\s*=\s*[\"']?(?!#|[\"']|data:image/(?:png|jpeg))"
)
_WORDS_OF_DRAWING = re.compile(r"<style.*?</style>|<!--(.*?)-->|>([^<>]+)<", re.DOTALL)
_JINJA_NOTE = re.compile(r"\{#.*?#\}", re.DOTALL)

_ROOTS = (
    "home root Users tmp var mnt data work opt scratch srv media workspace content private export gpfs lustre fsx nfs "
    "net storage project projects dev shared datasets models checkpoints kaggle dbfs efs raid ssd cluster ceph beegfs"
)
_PATH = re.compile(
    r"(?<![\w.:/~>)\]-])(?:file://)?(?:(?:~\w*|/(?:" + "|".join(_ROOTS.split()) + r"|vol\w*|data\d+|nvme\w*|mnt\w*))"
    r"(?:/[^\s/\"'`<>|:,;()\[\]{}]+)+|[A-Za-z]:\\{1,2}[^\s\\\"'`<>|:,;()]+(?:\\{1,2}[^\s\\\"'`<>|:,;()]+)*"
    r"|\\\\[\w.-]+(?:\\{1,2}[^\s\\\"'`<>|:,;()]+)+)/?"
)
_HOME = re.compile(r"(?:file://)?(?:/(?:home|Users)/[^/]+|[A-Za-z]:[\\/]+Users[\\/]+[^\\/]+)[\\/]*")
_WHOLE_PATH = re.compile(r"(?:file://)?(?:(?:~\w*)?/[^\n]*|[A-Za-z]:[\\/][^\n]*|\\\\[^\n]*)")


@dataclass(frozen=True)
class Contents:
    """What goes and what stays: paths below the folder, "/" between their parts.

    weights: files that go as they are. texts: the bytes of all others. left: path -> why it stays.
    """

    weights: tuple[str, ...]
    texts: dict[str, bytes]
    left: dict[str, str]


def read_contents(folder: str | Path, include: Sequence[str] = ()) -> Contents:
    """Sort a folder, and read what of it goes. Raises ValueError, in one line, for a secret in it, an index or
    configuration that cannot be read, and an included file that cannot go.

    include: paths of further files, each asked for by name.
    """
    root = Path(folder)
    wanted = KINDS | code_files(root) | weight_files(root)
    extra = [_included(root, name) for name in include]
    names, left = [], {}
    for name, kind in entries_of(root):
        if kind == "file" and (name in wanted or name in extra or _PLOT.fullmatch(name)):
            names.append(name)
        else:
            left[name] = "no kind that is published" if kind == "file" else kind
    for name in names:
        if (found := find_secret(name, is_vocabulary=True)) is not None:
            raise ValueError(f"the name of a file in {str(root)!r} holds what looks like {found[0]}: rename it.")
    going = {name: clean(root / name, name, name in extra) for name in names if not name.endswith(".safetensors")}
    tensors = tuple(name for name in names if name not in going)
    for name in tensors:
        check_header(root / name)
    return Contents(tensors, going, left)


def weight_files(root: Path) -> set[str]:
    """Names of the safetensors files that a loader reads: shards of the index unless there is a single file."""
    if (root / WEIGHTS).is_file():
        return {WEIGHTS}
    if (root / INDEX).is_file():
        require_no_link(root / INDEX)
        return {INDEX, *shards_of(root / INDEX).values()}
    return {ADAPTER_WEIGHTS}


def code_files(root: Path) -> set[str]:
    """Names of the modules that configuration and tokenizer name in `auto_map`, with what these import beside them."""
    places: list[Any] = []
    for name in (CONFIG, "tokenizer_config.json"):
        if (root / name).is_file():
            found = read_json(root / name).get("auto_map")
            for value in found.values() if isinstance(found, dict) else ():
                places += value if isinstance(value, list) else [value]
    waiting = [place.rpartition(".")[0] for place in places if isinstance(place, str) and "--" not in place]
    seen: set[str] = set()
    while waiting:
        module = waiting.pop()
        if f"{module}.py" in seen or not module.isidentifier():
            continue
        seen.add(f"{module}.py")
        path = root / f"{module}.py"
        if path.is_file() and not path.is_symlink():
            waiting += _SIBLING_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
    return seen


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of what is published, which is no link."""
    require_no_link(path)
    return read_any_json(path)


def require_no_link(path: Path) -> None:
    """Raise ValueError for a link: what is behind it is another folder's."""
    if path.is_symlink():
        raise ValueError(f"{str(path)!r} is a link, and nothing is published through one: put the file in its place.")


def check_header(path: Path) -> set[str]:
    """Names of the tensors of a safetensors file whose header agrees with the size of the file.

    Raises ValueError for a header that does not, or that carries a text.
    """
    require_no_link(path)
    if not path.is_file():
        raise ValueError(f"{str(path.parent)!r} lacks {path.name}: save the checkpoint again.")
    try:
        with safe_open(path, framework="numpy") as file:
            names, notes = set(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is corrupt or cut short ({error}): save the checkpoint again, or copy it anew."
        ) from error
    said = json.dumps(notes, ensure_ascii=False)
    too_long = next((name for name, note in notes.items() if len(name) + len(note) > MAX_HEADER_TEXT), None)
    if too_long is not None or _PATH.search(said):
        what = f"a note of {len(said):,} characters" if too_long is not None else "a path of this machine"
        raise ValueError(f"{str(path)!r} carries {what} in its header: save the checkpoint again (save_pretrained).")
    refuse_secrets(path, f"{said}\n" + "\n".join(sorted(names)), is_vocabulary=True)
    return names


def refuse_secrets(path: Path, text: str, is_vocabulary: bool = False, row: int | None = None) -> None:
    """Raise ValueError, which does not show it, for what looks like a secret in the text of a file.

    is_vocabulary: whether words without a pattern are words. row: of a table, from 0, that the text is.
    """
    found = find_secret(text, is_vocabulary)
    if found is not None:
        kind, line = found
        place = f"line {line}" if row is None else f"row {row}"
        raise ValueError(f"{str(path)!r} holds what looks like {kind} ({place}): remove it, and revoke it.")


def find_secret(text: str, is_vocabulary: bool = False) -> tuple[str, int] | None:
    """The kind of the first secret in a text, as it is written or as a page shows it, and its line, from 1; None if
    there is none."""
    for reading_of_it in _readings(text):
        match = _FORMS.search(reading_of_it)
        if match:
            return list(_SECRETS)[int(match.lastgroup[1:])], reading_of_it.count("\n", 0, match.start()) + 1
    if is_vocabulary:
        return None
    for match in _NAMED.finditer(text):
        value = match["value"].rstrip("\\")
        if len(value) >= 8 and entropy(value) > 2.5 and not re.fullmatch(r"[\w.]*[a-z]\.[\w.]+|[a-z_]+|\$\S+", value):
            return "a secret after its name", text.count("\n", 0, match.start()) + 1
    for match in _NOISE.finditer(text):
        word = match[0].strip("=")
        kinds = [sum(map(test, word)) for test in (lambda c: c in _NO_LETTERS, str.islower, str.isupper)]
        of_words = len(word) > _NOISE_LETTERS * len(_RUN.findall(word))  # NamesInCamelCase are
        if min(kinds) >= 2 and entropy(word) > _NOISE_BITS and not of_words:
            return "a key (letters without a pattern)", text.count("\n", 0, match.start()) + 1
    return None


def _readings(text: str) -> set[str]:
    """A text as it is written, as a page shows it, escaped once or twice, and with what stands in base64."""
    shown = text
    for _ in range(2):
        shown = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), html.unescape(unquote(shown)))
    plain = _UNSEEN.sub("", unicodedata.normalize("NFKC", shown))
    decoded = _BASE64.sub(lambda match: b64decode(match[0][: len(match[0]) // 4 * 4]).decode("latin-1"), text)
    return {text, plain, decoded}


def entropy(word: str) -> float:
    """Bits a character, of the characters' frequencies in the word."""
    return -sum(n / len(word) * math.log2(n / len(word)) for n in Counter(word).values())


def without_paths(text: str) -> str:
    """The text with paths of a machine reduced to their last names."""
    here = {str(Path.home()), os.getcwd()} - {"/"}
    own = re.compile("|".join(re.escape(path) + r"(?:/[^\s\"'`<>|:,;()\[\]{}]+)*/?" for path in sorted(here)))
    return own.sub(lambda match: _last(match[0]), _PATH.sub(lambda match: _last(match[0]), text))


def _without_paths_in_notes(code: str, kind: str) -> str:
    """The same of the comments of Python's or a template's code, which does as before. kind: "py" or "jinja"."""
    if kind == "jinja":
        return _JINJA_NOTE.sub(lambda note: without_paths(note[0]), code)
    lines = io.StringIO(code).readlines()
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                line = lines[row - 1]
                lines[row - 1] = line[:column] + without_paths(token.string) + line[column + len(token.string) :]
    except (tokenize.TokenError, SyntaxError):
        return code  # no Python
    return "".join(lines)


def _last(path: str) -> str:
    if _HOME.fullmatch(path):
        return "home"  # its last name is a person's
    return re.split(r"[\\/]+", path.rstrip("\\/"))[-1] or "folder"


def _without_paths(value: Any) -> Any:
    """The same of everything in a value of JSON, whole strings that are a path among it."""
    if isinstance(value, str):
        return _last(value) if len(value) > 1 and _WHOLE_PATH.fullmatch(value) else without_paths(value)
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    if isinstance(value, dict):
        return {without_paths(name): _without_paths(part) for name, part in value.items()}
    return value


def _require_facts(path: Path, value: Any, field: str = "") -> None:
    """Raise ValueError for a text among facts or settings: a string of a log, or one longer than names are."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            _require_facts(path, str(name))
            _require_facts(path, part, f"{field}.{name}".lstrip("."))
    elif isinstance(value, str) and (
        # a verdict is a sentence for each thing that is wrong; where an adapter goes may be a long pattern
        (
            max(map(len, value.split("; ") if field == "verdict" else [value])) > MAX_FACT
            and not field.endswith("_modules")
        )
        or field.startswith("log_history")
    ):
        raise ValueError(
            f"{str(path)!r}: {field[:80] or 'a name'} is a text ({len(value)} characters), and numbers and names "
            "are published: take it out of the file."
        )


def _require_drawing(path: Path, text: str) -> None:
    """Raise ValueError for a drawing with something that acts, or with a text longer than labels are."""
    if active := _ACTIVE.search(text):
        raise ValueError(f"{str(path)!r} holds more than a drawing ({active[0][:40]!r}): save the plot again.")
    longest = max((len(note or label) for note, label in _WORDS_OF_DRAWING.findall(text)), default=0)
    if longest > MAX_FACT:
        raise ValueError(f"{str(path)!r} holds a text of {longest} characters: take it out of the drawing.")


def entries_of(root: Path) -> Iterator[tuple[str, str]]:
    """Every entry but plain folders, sorted, as "file", "a link" or "no plain file"; nothing behind a link."""
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            for name, kind in entries_of(Path(entry.path)):
                yield f"{entry.name}/{name}", kind
        elif entry.is_symlink():
            yield entry.name, "a link"
        else:
            yield entry.name, "file" if entry.is_file(follow_symlinks=False) else "no plain file"


def _included(root: Path, name: str) -> str:
    """A path asked for by name, as it stands in the folder."""
    path = Path(name)
    steps = [root.joinpath(*path.parts[: n + 1]) for n in range(len(path.parts))]
    if path.is_absolute() or ".." in path.parts or not steps or not steps[-1].is_file():
        raise ValueError(f"--include {name!r} is no file of {str(root)!r}: name files by their path below the folder.")
    for step in steps:
        require_no_link(step)
    return path.as_posix()


def clean(path: Path, name: str, is_included: bool = False, data: bytes | None = None) -> bytes:
    """The bytes of a file that is no weight, looked through, paths of the machine reduced to names.

    name: its path in the repository. is_included: somebody asked for it as it is. data: what to look through in place
    of the file. Raises ValueError for a pickle or an archive, a secret, and JSON that is no object.
    """
    data = path.read_bytes() if data is None else data
    if is_pickle_or_archive(data):
        raise ValueError(f"{str(path)!r} is a pickle or an archive, which nobody looks into: publish what it holds.")
    text = data.replace(b"\0", b"").decode("utf-8", errors="replace")  # without zeros UTF-16 reads as well
    is_vocabulary = name in _VOCABULARIES or b"\0" in data
    refuse_secrets(path, text, is_vocabulary)
    if path.suffix == ".json":
        value = read_json(path)
        refuse_secrets(path, json.dumps(value, ensure_ascii=False), is_vocabulary)  # letters may stand as \\u0068
        if name == "tokenizer_config.json":
            words = ("added_tokens_decoder", "chat_template")
            kept = {k: v for k, v in value.items() if k not in _READING}
            _require_facts(path, {k: v for k, v in kept.items() if k not in words and not is_included})
            reduced = {k: v if k in words or k.endswith("_token") else _without_paths(v) for k, v in kept.items()}
            if isinstance(value.get("chat_template"), str):
                reduced["chat_template"] = _without_paths_in_notes(value["chat_template"], "jinja")
        else:
            _require_facts(path, {} if is_vocabulary or is_included else value)
            reduced = value if is_vocabulary or is_included else _without_paths(value)
        return data if reduced == value else (json.dumps(reduced, indent=2) + "\n").encode()
    if path.suffix == ".svg":
        _require_drawing(path, text)
    is_code = path.suffix in (".py", ".jinja")
    if is_included or (is_vocabulary and not is_code):
        return data
    reduced_text = _without_paths_in_notes(text, path.suffix[1:]) if is_code else without_paths(text)
    return data if reduced_text == text else reduced_text.encode()


def is_pickle_or_archive(data: bytes) -> bool:
    """Whether bytes are a pickle of any protocol or a compressed or packed file, by what they hold."""
    if data.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")):
        return True
    if data[257:262] == b"ustar" or (data[:1] == b"\x80" and data[1:2] in b"\x02\x03\x04\x05"):
        return True
    try:
        return sum(1 for _ in pickletools.genops(data[: 1 << 20])) > 2
    except (ValueError, IndexError, OverflowError, struct.error):  # no opcode, or one without its argument
        return False


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
METHODS = ("cpt", "rainbowpo", "surgery")
_METHOD_OF_FILE = {"cpt_state.json": "cpt", "rainbowpo.json": "rainbowpo", "surgery.json": "surgery"}
# Of the training log: how many tokens went through the model, by the trainer's name for it.
_TOKEN_COUNTS = ("tokens_seen", "num_tokens", "num_input_tokens_seen")


def check_checkpoint(folder: str | Path, needs_tokenizer: bool = True, needs_base: bool = True) -> None:
    """Raise ValueError, in one line, for the first reason why `folder` would not load where it is published.

    needs_tokenizer: whether a folder without a tokenizer is refused. needs_base: whether an adapter is whose base is
    not on the Hub.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder: name the folder of a saved model.")
    is_adapter = not (root / CONFIG).is_file() and (root / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (root / CONFIG).is_file():
        inside = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
        where = f" (but {inside[-1]!r} inside does: publish that one, or save the model)" if inside else ""
        raise ValueError(f"{str(folder)!r} is no checkpoint: it holds no {CONFIG}{where}.")
    config = read_json(root / (ADAPTER_CONFIG if is_adapter else CONFIG))
    if is_adapter:
        if needs_base:
            _check_adapter(root, config)
        check_header(root / ADAPTER_WEIGHTS)
    else:
        _check_weights(root)
        _check_code(root, config)
    if needs_tokenizer and not any((root / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer: save one into it, or publish without (--without_tokenizer)."
        )
    if config.get("model_type") in CONFIG_MAPPING and not is_adapter:  # others need code that is not run here
        with _no_progress_bar():  # nothing is read
            how = {"local_files_only": True, "experts_implementation": "eager"}
            check_weights(AutoModelForCausalLM, root, may_hold_more=False, **how)
    for name in sorted(weight_files(root) - {INDEX}):
        require_finite_file(root / name)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def require_finite_file(path: Path) -> None:
    """Raise ValueError for a safetensors file with NaN or infinity in it; a tensor is in memory at a time."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            value = file.get_tensor(name)
            if value.is_floating_point() and value.itemsize > 1 and value.numel():
                if not all(bound.isfinite() for bound in value.aminmax()):
                    raise ValueError(
                        f"{str(path)!r}: {name} holds values that are no finite numbers: publish a checkpoint from "
                        "before the run diverged."
                    )


def _check_adapter(root: Path, config: dict[str, Any]) -> None:
    """An adapter names a base that others can load, and no class that only we can import."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not HUB_ID.fullmatch(base) or Path(base).exists():
        raise ValueError(
            f"{str(root / ADAPTER_CONFIG)!r} names the base {base!r}, which is no Hub id: publish the base and set "
            "base_model_name_or_path to its id, or publish the merged model (merge_and_unload)."
        )
    library = (config.get("auto_mapping") or {}).get("parent_library") or ""
    if library.partition(".")[0] in ("hf_moe_cpt", "transformers_modules"):
        raise ValueError(
            f"{str(root / ADAPTER_CONFIG)!r} names the class of its base by the module {library!r}, which others "
            'cannot import: give the adapter task_type="CAUSAL_LM" and save it again.'
        )


def _check_weights(root: Path) -> None:
    if (root / WEIGHTS).is_file():
        check_header(root / WEIGHTS)
    elif (root / INDEX).is_file():
        _check_shards(root)
    else:
        pickled = next(root.glob("pytorch_model*.bin"), None)
        what = f"only {pickled.name}" if pickled else "no weights"
        raise ValueError(f"{str(root)!r} holds {what}: save the model as safetensors (save_pretrained does).")


def _check_shards(root: Path) -> None:
    require_no_link(root / INDEX)
    placed = shards_of(root / INDEX)
    for shard in sorted(set(placed.values())):
        there = check_header(root / shard)
        missing = next((name for name, file in placed.items() if file == shard and name not in there), None)
        if missing:
            raise ValueError(
                f"{str(root / shard)!r} lacks the tensor {missing!r} that {INDEX} places there: save the "
                "checkpoint again."
            )


def _check_code(root: Path, config: dict[str, Any]) -> None:
    """The files that `auto_map` names are there, with all that they import from beside them."""
    places = config.get("auto_map") or {}
    if config.get("model_type") == "cpt_moe" and not {"AutoConfig", "AutoModelForCausalLM"} <= set(places):
        raise ValueError(
            f"{str(root / CONFIG)!r} has no auto_map, so the model would load only where hf_moe_cpt is installed: "
            "save it with save_pretrained."
        )
    for name in sorted(code_files(root)):
        require_no_link(root / name)
        if not (root / name).is_file():
            raise ValueError(
                f"{str(root)!r} lacks {name}, which its config needs to load elsewhere: save the model "
                "with save_pretrained, which copies the code."
            )


@dataclass
class RunFacts:
    """Facts of a folder, as found.

    method: "cpt", "rainbowpo" or "surgery". config: of the model, or {} for an adapter. adapter: of PEFT, or {}.
    run: training_run.json. log: entries of the training log. final: the last value of each evaluated measure; start:
    its value at step 0. kept: what the method itself kept.
    """

    method: str
    config: dict[str, Any]
    adapter: dict[str, Any]
    run: dict[str, Any]
    log: list[dict[str, Any]]
    state: dict[str, Any]
    final: dict[str, float]
    start: dict[str, float]
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the run by name."""
        return self.run.get("arguments") or self.kept.get("settings") or self.kept.get("arguments") or {}

    @property
    def parent(self) -> str | None:
        """Hub id or name of the checkpoint that the run started from; of an adapter first the base that it names."""
        of_adapter = self.adapter.get("base_model_name_or_path")
        if of_adapter and HUB_ID.fullmatch(of_adapter) and not Path(of_adapter).exists():
            return str(of_adapter)
        return self.run.get("started_from") or self.kept.get("started_from") or of_adapter or None

    @property
    def tokens(self) -> int | None:
        """Tokens that went through the model in training."""
        counts = [entry[name] for entry in self.log for name in _TOKEN_COUNTS if entry.get(name)]
        return int(max(counts)) if counts else self.kept.get("tokens_seen")

    @property
    def steps(self) -> int | None:
        """Optimizer steps."""
        return self.state.get("global_step")

    @property
    def seconds(self) -> float | None:
        """Wall clock of the training, as the Trainer measured it."""
        return next((entry["train_runtime"] for entry in reversed(self.log) if "train_runtime" in entry), None)


def read_facts(folder: str | Path, method: str | None = None) -> RunFacts:
    """Everything a folder says about its run.

    method: which of METHODS made it, if the folder does not say. Raises ValueError for a folder without a model, an
    unreadable file, an unknown method, or one that neither `method` nor the folder tells.
    """
    root = Path(folder)
    if not any((root / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        raise ValueError(f"{str(folder)!r} holds neither {CONFIG} nor {ADAPTER_CONFIG}: name the folder of a model.")
    state, run, results = (_optional(root / name) for name in ("trainer_state.json", RUN_FILE, "all_results.json"))
    with reading(root / "trainer_state.json"):
        log = [entry for entry in state.get("log_history", []) if isinstance(entry, dict)]
    method = method or run.get("method") or _method_of(root, log)
    if method not in METHODS:
        raise ValueError(
            f"{str(folder)!r} does not say which method made it (method={method!r}): choose one of "
            f"{', '.join(METHODS)} with --method."
        )
    kept: dict[str, Any] = {}
    for name, owner in _METHOD_OF_FILE.items():
        kept |= _optional(root / name) if owner == method else {}
    final, start = _evaluated(log)
    measured = kept.get("measured") if isinstance(kept.get("measured"), dict) else {}  # of the weights in the folder
    final |= {f"eval_{name}": value for name, value in measured.items() if isinstance(value, int | float)}
    final |= {name: value for name, value in results.items() if _is_measure(name) and isinstance(value, int | float)}
    return RunFacts(
        method, _optional(root / CONFIG), _optional(root / ADAPTER_CONFIG), run, log, state, final, start, kept
    )


def _optional(path: Path) -> dict[str, Any]:
    facts = read_json(path) if path.is_file() else {}
    with reading(path):
        require_numbers(facts)
    return facts


def _method_of(root: Path, log: list[dict[str, Any]]) -> str | None:
    for name, method in _METHOD_OF_FILE.items():
        if (root / name).is_file():
            return method
    return "surgery" if any("eval_surgery_gap" in entry for entry in log) else None


def _is_measure(name: str) -> bool:
    clocks = ("_runtime", "_per_second", "_preparation_time")
    return (name.startswith("eval_") and not name.endswith(clocks)) or name in ("forgetting", "adaptation")


def _evaluated(log: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    final: dict[str, float] = {}
    start: dict[str, float] = {}
    for entry in log:
        values = {k: v for k, v in entry.items() if _is_measure(k) and isinstance(v, int | float)}
        final |= values
        if entry.get("step") == 0:
            start |= {name: value for name, value in values.items() if name.startswith("eval_")}
    return final, start
