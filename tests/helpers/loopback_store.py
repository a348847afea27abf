"""What a Hub keeps, in memory: repositories as lists of commits, large files by their sha256. For loopback_hub.py."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field


LARGE_ENDINGS = (".safetensors", ".bin", ".pt", ".parquet", ".png")
LARGE_FROM = 200_000  # bytes; other files are large from here on


class Refused(Exception):
    """A request that the Hub answers with an error: status, the code in X-Error-Code, and a sentence."""

    def __init__(self, status: int, code: str, message: str, facts: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.facts = status, code, message, facts or {}


@dataclass
class Commit:
    """One state of a repository: file name -> content."""

    oid: str
    message: str
    files: dict[str, bytes]
    large: frozenset[str]


@dataclass
class Repository:
    """Branches and commits of one repository."""

    name: str
    kind: str  # model, dataset or space
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit that a branch or an object id names."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def add(self, branch: str, message: str, files: dict[str, bytes], large: frozenset[str]) -> Commit:
        """Put a new commit at the head of a branch."""
        text = f"{self.kind}/{self.name}/{len(self.commits)}/{message}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), message, files, large)
        self.commits[commit.oid], self.branches[branch] = commit, commit.oid
        return commit

    def history(self) -> list[Commit]:
        """Commits, oldest first."""
        return list(self.commits.values())

    def info(self, commit: Commit) -> dict:
        """What `model_info` and its like read."""
        return {
            "_id": "0" * 24,
            "id": self.name,
            "modelId": self.name,
            "private": self.private,
            "sha": commit.oid,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }


class Store:
    """All repositories and uploaded large files of a Hub."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.lock = threading.RLock()

    def find(self, kind: str, name: str) -> Repository:
        """A repository that exists; else 404 as the Hub says it."""
        if (kind, name) not in self.repositories:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return self.repositories[kind, name]

    def create(self, kind: str, name: str, private: bool) -> Repository:
        """A new repository with a first commit; 409 if there is one."""
        if (kind, name) in self.repositories:
            raise Refused(409, "RepoExists", "You already created this repo", {"name": name, "id": "0" * 24})
        repository = self.repositories[kind, name] = Repository(name, kind, private)
        repository.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, frozenset())
        return repository

    def commit(self, repository: Repository, branch: str, body: bytes) -> Commit:
        """Apply the lines of a commit request all together or, if one of them cannot be, not at all."""
        parent = repository.at(branch)
        files, large, message = dict(parent.files), set(parent.large), ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                large.discard(value["path"])
            elif key == "lfsFile":
                if value["oid"] not in self.large_files:
                    raise Refused(400, "BadRequest", f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = self.large_files[value["oid"]]
                large.add(value["path"])
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                raise Refused(400, "BadRequest", f"unknown key {key}")
        return repository.add(branch, message, files, frozenset(large))

    def put(self, oid: str, content: bytes) -> None:
        """Keep a large file under its sha256, which is checked."""
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "BadRequest", "content does not have this sha256")
        self.large_files[oid] = content


def is_large(path: str, size: int) -> bool:
    """Whether a file goes through LFS."""
    return path.endswith(LARGE_ENDINGS) or size >= LARGE_FROM


def object_id(content: bytes, large: bool) -> str:
    """Git's id of a regular file, the sha256 of a large one."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
