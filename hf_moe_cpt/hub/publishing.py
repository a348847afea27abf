"""Publish a finished folder: checked first, uploaded in one commit, so that a repository is never half of a model.

Large files that an interrupted upload has already sent are not sent again: the Hub knows them by their hash. Retries
and the protocol are huggingface_hub's. Nothing is written into the folder. Source: ours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_moe_cpt.hub.cards import Card
from hf_moe_cpt.hub.folder import CARD, check_checkpoint, published_files


GOES_ON = "run the same command again, what has arrived is not sent twice."
WAITS = (1, 4, 15)  # seconds before each new attempt
PASSING = (408, 409, 429, 500, 502, 503, 504)  # 409: another commit came first

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Upload:
    """What will be published: files of a folder by their path in the repository, and the texts made for it.

    texts: the card and its plots by path; they take the place of files of the same name.
    """

    folder: Path
    files: tuple[str, ...]
    texts: Mapping[str, str]

    @property
    def card(self) -> str:
        """Text of README.md."""
        return self.texts[CARD]

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, the card among them."""
        sizes = {name: (self.folder / name).stat().st_size for name in self.files}
        return {**sizes, **{name: len(text.encode()) for name, text in self.texts.items()}}

    def operations(self) -> list[CommitOperationAdd]:
        """The files as parts of one commit."""
        of_folder = [CommitOperationAdd(name, self.folder / name) for name in self.files]
        return [*of_folder, *(CommitOperationAdd(name, text.encode()) for name, text in self.texts.items())]


def plan_upload(folder: str | Path, card: Card, needs_tokenizer: bool = True) -> Upload:
    """Check a folder and list what of it is published. Raises ValueError for a folder that would not load elsewhere.

    card: README.md and its plots. needs_tokenizer: whether a folder without a tokenizer is refused.
    """
    check_checkpoint(folder, needs_tokenizer)
    texts = {CARD: card.text, **card.plots}
    return Upload(Path(folder), tuple(name for name in published_files(folder) if name not in texts), texts)


def publish(
    upload: Upload,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model with hf_moe_cpt",
) -> str:
    """Upload in one commit and return the commit's address; an interrupted upload goes on when called again.

    private: of a new repository. revision: a branch, made if it is missing. The token is that of `hf auth login` or
    HF_TOKEN. Raises ValueError or ConnectionError in one line: no token, no permission, a name that is taken by
    another type, files that the Hub refuses, a connection that stays broken.
    """
    api = HfApi()
    require_place(repository)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        operations = upload.operations()
        commit = retried(
            lambda: api.create_commit(repository, operations, commit_message=message, revision=revision), repository
        )
    except Exception as error:
        raise explained(error, repository) from error
    return str(commit.commit_url)


def retried(action: Callable[[], T], repository: str) -> T:
    """What `action` returns; it is called anew while what went wrong may pass. huggingface_hub retries large files.

    repository: for the warnings. Raises the last error as it came.
    """
    for wait in WAITS:
        try:
            return action()
        except Exception as error:
            if not may_pass(error):
                raise
            logger.warning("Publishing to %s failed (%s): trying again in %d s.", repository, brief(error), wait)
            time.sleep(wait)
    return action()


def may_pass(error: Exception) -> bool:
    """Whether an error is one of the moment: a broken connection, a server in trouble, too many requests."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _is_of_connection(error) if status is None else status in PASSING


def brief(error: BaseException) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def make_branch(repository: str, branch: str, token: str | None = None) -> None:
    """Make a branch of a repository unless there is one."""
    HfApi().create_branch(repository, branch=branch, token=token, exist_ok=True)


def upload_run(folder: str, repository: str, message: str, revision: str | None, token: str | None) -> CommitInfo:
    """What `Trainer.push_to_hub` uploads of its output folder, in one commit, tried anew as `retried` does."""
    return retried(
        lambda: HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            token=token,
            ignore_patterns=["_*", "checkpoint-*"],
        ),
        repository,
    )


def require_place(repository: str, token: str | None = None) -> None:
    """Raise ValueError or ConnectionError, in one line, where a model cannot be published under this name.

    repository: owner/name; a name alone is the user's own. token: by default the one of the machine.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{repository!r} cannot be a repository: write it as owner/name ({error}).") from error
    if not (token or get_token()):
        raise ValueError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    if "/" not in repository:
        return
    try:
        kind = _taken_by(HfApi(), repository, token)
    except Exception as error:
        raise explained(error, repository) from error
    if kind is not None:
        raise ValueError(
            f"{repository!r} is the name of a {kind} on the Hub: give the model another name, so that nobody "
            "takes one for the other."
        )


def _taken_by(api: HfApi, repository: str, token: str | None) -> str | None:
    """The kind of repository, other than a model, that has this name and no model beside it."""
    if api.repo_exists(repository, token=token):
        return None
    kinds = ("dataset", "space")
    return next((kind for kind in kinds if api.repo_exists(repository, repo_type=kind, token=token)), None)


def explained(error: Exception, repository: str) -> Exception:
    """An error of huggingface_hub said in one line with what to do; others come back as they are."""
    if isinstance(error, ValueError) and not isinstance(error, BadRequestError):
        return error
    if isinstance(error, HfHubHTTPError):
        return _explained_answer(error, repository)
    if _is_of_connection(error):
        return ConnectionError(
            f"the connection to the Hub broke while publishing to {repository!r} ({type(error).__name__}): {GOES_ON}"
        )
    return error


def _explained_answer(error: HfHubHTTPError, repository: str) -> Exception:
    status = getattr(error.response, "status_code", None)
    said = error.server_message or str(error).splitlines()[0]
    if status == 401:
        return ValueError(f"the Hub does not know this token (401): log in again with `hf auth login`, said: {said}")
    if status == 403:
        return ValueError(
            f"the token may not write to {repository!r} (403: {said}): use a token with write permission, or a name "
            "below your own user or organisation."
        )
    if isinstance(error, RevisionNotFoundError | RepositoryNotFoundError):
        return ValueError(f"{repository!r} was not found on the Hub ({said}): check the name and the token.")
    if status == 409:
        return ValueError(f"{repository!r} is in conflict with what the Hub holds (409: {said}): run it again.")
    if status == 429:
        return ConnectionError(f"the Hub asks for patience (429: {said}): wait, then run the same command again.")
    if status is not None and status >= 500:
        return ConnectionError(f"the Hub failed ({status}: {said}): nothing was published; {GOES_ON}")
    return ValueError(f"the Hub refused the upload to {repository!r} ({status}: {said}).")


def _is_of_connection(error: BaseException) -> bool:
    """Also of the HTTP library, whichever of its versions huggingface_hub uses."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ConnectionError", "TransportError", "RequestException", "TimeoutException"})
