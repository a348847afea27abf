"""Where a checkpoint lies: a folder here, or a repository on the Hub, of which the weights come when they are read.

Small files come first, so that a model that cannot be rewritten is refused before its weights are downloaded; then the
files that its index names, and no second copy of the weights in another format. Source: ours; the download, its cache
and its retries are huggingface_hub's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_moe_cpt.hub.folder_checks import HUB_ID
from hf_moe_cpt.hub.publishing import may_pass


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
_SMALL_FILES = ("config.json", "*.safetensors.index.json", *COMPANIONS)


@dataclass(frozen=True)
class Location:
    """name: as it was given. folder: where its files are or will be. commit: of the repository, None for a folder."""

    name: str
    folder: Path
    commit: str | None = None

    @property
    def short_name(self) -> str:
        """The Hub id, or the last part of the path."""
        return self.name if self.commit else self.folder.resolve().name

    def fetch(self, files: Iterable[str]) -> None:
        """Bring files of the repository into the folder; nothing to do for a folder. Raises as `locate` does."""
        if self.commit is not None:
            _download(self.name, self.commit, tuple(files))


def locate(source: str | Path, revision: str | None = None) -> Location:
    """Find a folder, or fetch everything but the weights of the repository with that id.

    revision: a branch, tag or commit of a repository. Raises ValueError, in one line, for what is neither, for a
    repository that may not be read and for a revision of a folder; ConnectionError where the Hub does not answer.
    """
    name, folder = str(source), Path(source)
    if folder.exists() or not HUB_ID.fullmatch(name):
        if revision is not None:
            raise ValueError(f"--revision {revision!r} is for repositories on the Hub, and {name!r} is not one here.")
        return Location(name, folder)
    snapshot = _download(name, revision, _SMALL_FILES)
    return Location(name, snapshot, commit=snapshot.name)


def _download(name: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """The folder of a snapshot in the cache; files of the repository's own folders are left out."""
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
