"""Which files of a Python installation make a corpus: a listing that is the same on every run. Source: ours.

A file is known by its path inside its root ("json/decoder.py", "torch/nn/functional.py"), never by where the root
lies, so the same packages give the same order and the same train and held-out sides on any machine.
"""

import hashlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


# Test code repeats itself, and vendored packages repeat others.
SKIPPED_FOLDERS = frozenset(
    "__pycache__ site-packages dist-packages test tests testing _testing idle_test _vendor vendor _vendored vendored "
    "_distutils node_modules hf_moe_cpt".split()
)
SKIPPED_FILES = re.compile(r"^(test_.*|.*_test|conftest|_sysconfigdata_.*)\.py$")
LARGEST_FILE = 300_000  # bytes; beyond it a source is nearly always a table
DEPENDENCIES = ("torch", "transformers", "datasets", "accelerate", "numpy")  # installed wherever this package is


@dataclass(frozen=True)
class PythonFile:
    """One file of the installation: where it is, its name inside its root, its size in bytes."""

    location: Path
    name: str
    size: int

    @property
    def package(self) -> str:
        """First part of the name: the unit that the quota per package counts."""
        return self.name.split("/", 1)[0]

    @property
    def is_description(self) -> bool:
        """Whether this is a package description (METADATA) and not a source."""
        return self.name.endswith("METADATA")


def installation_roots() -> list[Path]:
    """Standard library first, then the folders of installed packages: the interpreter's and our dependencies'."""
    candidates = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    specs = (importlib.util.find_spec(name) for name in DEPENDENCIES)
    candidates += [str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin]
    return list(dict.fromkeys(Path(path).resolve() for path in candidates if os.path.isdir(path)))


def list_files(roots: Iterable[Path]) -> list[PythonFile]:
    """Sources and package descriptions below the roots, sorted by name; the first root that has a name wins."""
    found: dict[str, PythonFile] = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
            inside = os.path.relpath(folder, root).replace(os.sep, "/").removeprefix(".").removeprefix("/")
            for name in names:
                label = _label(inside, name)
                location = os.path.join(folder, name)
                if label is not None and label not in found and os.path.isfile(location):
                    size = os.path.getsize(location)
                    if 0 < size <= LARGEST_FILE:
                        found[label] = PythonFile(Path(location), label, size)
    return [found[name] for name in sorted(found)]


def _label(folder: str, name: str) -> str | None:
    """Name of a file in the listing, or None if it is of no use; descriptions lose their folder's version."""
    if folder.endswith(".dist-info"):
        return f"{folder.split('-', 1)[0].lower()}/METADATA" if name == "METADATA" else None
    if not name.endswith(".py") or SKIPPED_FILES.match(name):
        return None
    return f"{folder}/{name}" if folder else name


def stable_fraction(name: str, seed: int, purpose: str) -> float:
    """Number in [0, 1) that depends on name, seed and purpose alone: no process, platform or listing enters."""
    digest = hashlib.blake2b(f"{purpose}:{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
