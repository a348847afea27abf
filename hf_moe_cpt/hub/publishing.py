"""Publish a finished folder: checked first, uploaded in one commit, so that a repository is never half of a model.

The one way out: the command `push` and every `push_to_hub` go through the same looks (`contents.py`) and the same
calls. Every call is tried again while what went wrong may pass, and a Hub that says nothing is given up.
Large files that an interrupted upload has already sent are not sent again: the Hub knows them by their hash. The
protocol is huggingface_hub's. Nothing is written into the folder. Source: ours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_session, get_token
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_moe_cpt.hub.cards import Card
from hf_moe_cpt.hub.contents import CARD, check_checkpoint, clean, entries_of, read_contents


GOES_ON = "run the same command again, what has arrived is not sent twice."
WAITS = (1, 4, 15)  # seconds before each new attempt
SILENCE = 120.0  # seconds without a byte, after which a call has failed; huggingface_hub 2.4 waits for ever
PASSING = (408, 409, 429, 500, 502, 503, 504)  # 409: another commit came first

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Upload:
    """What will be published of a folder, by path in the repository.

    weights: files that go as they are. texts: the bytes of all others, the card among them. left: what stays at home,
    and why.
    """

    folder: Path
    weights: tuple[str, ...]
    texts: Mapping[str, bytes]
    left: Mapping[str, str]

    @property
    def card(self) -> str:
        """Text of README.md, "" without one."""
        return self.texts.get(CARD, b"").decode(errors="replace")

    def with_card(self, card: Card) -> Upload:
        """The same with a card and its plots in place of files of the same names, looked through as files are."""
        made = {CARD: card.text, **card.plots}
        looked_through = {name: clean(self.folder / name, name, data=text.encode()) for name, text in made.items()}
        return replace(self, texts={**self.texts, **looked_through})

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, the card among them."""
        sizes = {name: (self.folder / name).stat().st_size for name in self.weights}
        return {**sizes, **{name: len(data) for name, data in self.texts.items()}}

    def operations(self, below: str = "") -> list[CommitOperationAdd]:
        """The files as parts of one commit. below: the folder of the repository that they go into, with its "/"."""
        tensors = [CommitOperationAdd(below + name, self.folder / name) for name in self.weights]
        return [*tensors, *(CommitOperationAdd(below + name, data) for name, data in self.texts.items())]


def plan_upload(
    folder: str | Path,
    card: Card | None = None,
    needs_tokenizer: bool = True,
    needs_base: bool = True,
    include: Sequence[str] = (),
) -> Upload:
    """Check a folder and list what of it is published. Raises ValueError for a folder that would not load elsewhere,
    and for a secret in what would go.

    card: README.md and its plots, if not the folder's. needs_tokenizer: whether a folder without a tokenizer is
    refused. needs_base: whether an adapter is whose base is not on the Hub. include: further files, by name.
    """
    check_checkpoint(folder, needs_tokenizer, needs_base)
    contents = read_contents(folder, include)
    upload = Upload(Path(folder), contents.weights, contents.texts, contents.left)
    return upload if card is None else upload.with_card(card)


def plan_files(folder: str | Path, data: Sequence[str], texts: Sequence[str]) -> Upload:
    """What of a folder that is no model is published: the files named, none of them through a link.

    data: files that go as they are. texts: those that are looked through as a model's are. Raises ValueError for one
    that is not there.
    """
    root = Path(folder)
    found = dict(entries_of(root))
    for name in (*data, *texts):
        if found.get(name) != "file":
            what = found.get(name, "missing, or behind a link")
            raise ValueError(f"{str(root / name)!r} is {what}, and nothing is published through a link: make it anew.")
    left = {name: "no kind that is published" if kind == "file" else kind for name, kind in found.items()}
    going = {name: clean(root / name, name) for name in texts}
    return Upload(root, tuple(data), going, {name: left[name] for name in left if name not in (*data, *texts)})


def publish(
    upload: Upload,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model with hf_moe_cpt",
    kind: str = "model",
) -> str:
    """Upload in one commit and return the commit's address; an interrupted upload goes on when called again.

    private: of a new repository. revision: a branch, made if it is missing. kind: of the repository, "model" or
    "dataset". The token is that of `hf auth login` or HF_TOKEN. Raises ValueError or ConnectionError in one line: no
    token, no permission, a name that is taken by another type, files that the Hub refuses, a connection that stays
    broken.
    """
    require_place(repository, kind=kind)
    make_repository(repository, private=private or None, revision=revision, kind=kind)
    return str(commit(upload.operations(), repository, message, revision, kind=kind).commit_url)


def make_repository(
    repository: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    kind: str = "model",
) -> str:
    """Make the repository of a model or data set, and a branch, unless they are there; its name with the owner's."""
    api = HfApi(token=token)
    try:
        url = retried(lambda: api.create_repo(repository, repo_type=kind, private=private, exist_ok=True), repository)
        if revision is not None:
            branch = {"branch": revision, "repo_type": kind, "exist_ok": True}
            retried(lambda: api.create_branch(url.repo_id, **branch), repository)
    except Exception as error:
        raise explained(error, repository) from error
    return str(url.repo_id)


def commit(
    operations: Sequence[CommitOperationAdd],
    repository: str,
    message: str,
    revision: str | None = None,
    token: str | None = None,
    kind: str = "model",
) -> CommitInfo:
    """The last step of every upload. Raises what `publish` does."""
    api = HfApi(token=token)

    def send() -> CommitInfo:
        how = {"commit_message": message, "revision": revision, "repo_type": kind}
        return api.create_commit(repository, list(operations), **how)

    try:
        return retried(send, repository)
    except Exception as error:
        raise explained(error, repository) from error


def in_background(action: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
    """Start it in the thread in which huggingface_hub uploads, one after the other."""
    return HfApi().run_as_future(action, *args, **kwargs)


def retried(action: Callable[[], T], repository: str) -> T:
    """What `action` returns; it is called anew while what went wrong may pass. huggingface_hub retries large files.

    repository: for the warnings. Raises the last error as it came.
    """
    for wait in WAITS:
        try:
            return _in_time(action)
        except Exception as error:
            if not may_pass(error):
                raise
            logger.warning("Publishing to %s failed (%s): trying again in %d s.", repository, brief(error), wait)
            time.sleep(wait)
    return _in_time(action)


def _in_time(action: Callable[[], T]) -> T:
    """Call it with a limit on the Hub's silence; one that somebody else has set stands."""
    session = get_session()  # a new one after some errors
    if session.timeout.read is None:
        session.timeout = SILENCE
    return action()


def may_pass(error: Exception) -> bool:
    """Whether an error is one of the moment: a broken connection, a server in trouble, too many requests."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _is_of_connection(error) if status is None else status in PASSING


def brief(error: BaseException) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def require_name(repository: str) -> None:
    """Raise ValueError for what cannot be the name of a repository."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{repository!r} cannot be a repository: write it as owner/name ({error}).") from error


def require_place(repository: str, token: str | None = None, kind: str = "model") -> None:
    """Raise ValueError or ConnectionError, in one line, where nothing can be published under this name.

    repository: owner/name; a name alone is the user's own. token: by default the one of the machine. kind: "model" or
    "dataset".
    """
    require_name(repository)
    if not (token or get_token()):
        raise ValueError("no token for the Hub: log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    if "/" not in repository:
        return
    try:
        other = _taken_by(HfApi(), repository, token, kind)
    except Exception as error:
        raise explained(error, repository) from error
    if other is not None:
        raise ValueError(
            f"{repository!r} is the name of a {other} on the Hub: give the {kind} another name, so that nobody "
            "takes one for the other."
        )


def _taken_by(api: HfApi, repository: str, token: str | None, wanted: str) -> str | None:
    """The kind of repository, other than the wanted one, that has this name and no wanted one beside it."""

    def exists(kind: str) -> bool:
        return retried(lambda: api.repo_exists(repository, repo_type=kind, token=token), repository)

    others = (kind for kind in ("model", "dataset", "space") if kind != wanted)
    return None if exists(wanted) else next(filter(exists, others), None)


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
