"""A Hub on the loopback interface, spoken to by the unmodified huggingface_hub over HTTP, that can fail on demand.

`HF_ENDPOINT` is read when huggingface_hub is imported, so whoever uses the Hub runs in a process of its own with
`LoopbackHub.environment()`. The server runs in threads of the test, which looks into its store and orders failures:

    with LoopbackHub() as hub:
        hub.fail("PUT /lfs/", drop=True)            # cut the next upload of a large file in the middle
        hub.fail("POST .*/commit/", status=503, times=2)

Endpoints: create, preupload, LFS batch, PUT and verify, commit, commits, branch, resolve, info, tree, whoami,
validate-yaml.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


WRITER, READER = "hf_writer", "hf_reader"  # tokens; the user of both is "someone"
USER = "someone"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
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

    def info(self, commit: Commit) -> dict:
        """What `model_info` and its like read."""
        counts = {"tags": [], "downloads": 0, "likes": 0}
        files = [{"rfilename": path} for path in sorted(commit.files)]
        named = {"_id": "0" * 24, "id": self.name, "modelId": self.name, "private": self.private, "sha": commit.oid}
        return {**named, **counts, "siblings": files}


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


def object_id(content: bytes, large: bool) -> str:
    """Git's id of a regular file, the sha256 of a large one."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """The next `times` requests whose "METHOD /path" matches are answered with a status and headers, or dropped.

    drop: half of them is read and the connection closed. meanwhile: called when half of a dropped request has come.
    """

    pattern: str
    status: int | None = None
    drop: bool = False
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    meanwhile: Callable[[], None] | None = None


class LoopbackHub:
    """A running server. `log` holds "METHOD /path" of each request, `store` what was published."""

    def __init__(self) -> None:
        self.reset()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Forget everything: what was published, what was asked, which failures were ordered."""
        self.store, self.log, self.faults = Store(), [], []
        self.tokens_seen: set[str | None] = set()

    @property
    def url(self) -> str:
        """The address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """Variables for a process that is to use this Hub, with an empty cache at `home`."""
        off = {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        direct = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        return {
            **off,
            **direct,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token or "",
        }

    def fail(self, *fault: object, **more: object) -> None:
        """Order a `Fault`."""
        self.faults.append(Fault(*fault, **more))

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        return self.store.find(kind, name).at(revision).files

    def commits(self, name: str, kind: str = "model") -> list[Commit]:
        """Commits of a repository, oldest first, without the one that created it."""
        return list(self.store.find(kind, name).commits.values())[1:]

    def take_fault(self, request: str) -> Fault | None:
        """The order for this request, used up by one."""
        with self.store.lock:
            self.log.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.take_fault(f"{self.command} {path}")
        if fault is not None and fault.drop:
            self.rfile.read(length // 2)
            if fault.meanwhile is not None:
                fault.meanwhile()
            self.close_connection = True
            self.connection.close()
            return
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        self.hub.tokens_seen.add(self._token())
        try:
            if fault is not None:
                raise Refused(fault.status, "Injected", f"injected {fault.status}")
            with self.hub.store.lock:
                self._route(path, body)
        except Refused as refused:
            extra = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            facts = {**refused.facts, "url": f"{self.hub.url}/{refused.facts['name']}"} if refused.facts else {}
            headers = {**extra, **(fault.headers if fault else {})}
            self._answer({"error": refused.message, **facts}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _require_user(self) -> None:
        if self._token() not in (WRITER, READER):
            raise Refused(401, "Unauthorized", "Invalid username or password.")

    def _require_writer(self, name: str) -> None:
        self._require_user()
        if self._token() != WRITER or name.partition("/")[0] != USER:
            raise Refused(403, "Forbidden", f"You don't have the rights to write to {name}")

    def _route(self, path: str, body: bytes) -> None:
        for methods, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                return action(self, body, **match.groupdict())
        raise Refused(404, "NotFound", f"no such endpoint: {self.command} {path}")

    def _whoami(self, body: bytes) -> None:
        self._require_user()
        role = "write" if self._token() == WRITER else "read"
        token = {"accessToken": {"displayName": "test", "role": role}}
        self._answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", **token}})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        self._require_user()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self._require_writer(name)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.store.create(asked.get("type") or "model", name, private)
        self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": "0" * 24})

    def _validate(self, body: bytes) -> None:
        """What the Hub checks of a card: that its head is YAML, and what a `model-index` must have."""
        content = json.loads(body)["content"]
        errors = []
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
        try:
            head = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            head, errors = {}, [{"message": f"YAML: {error}"}]
        for entry in head.get("model-index") or []:
            for result in entry.get("results") or [{}]:
                missing = [name for name in ("task", "dataset", "metrics") if not result.get(name)]
                errors += [{"message": f"model-index: {name} is required"} for name in missing]
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _info(self, body: bytes, kind: str, name: str, revision: str | None = None) -> None:
        repository = self._readable(kind, name)
        self._answer(repository.info(repository.at(revision or "main")))

    def _tree(self, body: bytes, kind: str, name: str, revision: str) -> None:
        commit = self._readable(kind, name).at(revision)
        entries = []
        for path, content in sorted(commit.files.items()):
            oid = object_id(content, path in commit.large)
            entries.append({"type": "file", "path": path, "size": len(content), "oid": oid})
            if path in commit.large:
                entries[-1]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        self._answer(entries)

    def _readable(self, kind: str, name: str) -> Repository:
        repository = self.hub.store.find(KINDS[kind], name)
        if repository.private and self._token() not in (WRITER, READER):
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repository

    def _preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        self._require_writer(name)
        there = self.hub.store.find(KINDS[kind], name).at(revision)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            old = there.files.get(path)
            mode = "lfs" if path.endswith(LARGE_ENDINGS) or file["size"] >= LARGE_FROM else "regular"
            oid = None if old is None else object_id(old, path in there.large)
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": answers})

    def _batch(self, body: bytes, name: str, prefix: str | None = None) -> None:
        self._require_writer(name)
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.store.large_files:
                links = {"upload": f"{self.hub.url}/lfs/{wanted['oid']}", "verify": f"{self.hub.url}/lfs-verify"}
                entry["actions"] = {action: {"href": link, "header": {}} for action, link in links.items()}
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        self.hub.store.put(oid, body)
        self._answer({})

    def _verify(self, body: bytes) -> None:
        known = json.loads(body)["oid"] in self.hub.store.large_files
        self._answer({}, 200 if known else 404)

    def _commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        self._require_writer(name)
        commit = self.hub.store.commit(self.hub.store.find(KINDS[kind], name), revision, body)
        self._answer({"commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{name}/commit/{commit.oid}"})

    def _commits(self, body: bytes, kind: str, name: str, revision: str) -> None:
        """Newest first; of one branch only, as the tests make them."""
        repository = self._readable(kind, name)
        repository.at(revision)
        told = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "message": ""}
        self._answer([{**told, "id": c.oid, "title": c.message} for c in reversed(repository.commits.values())])

    def _branch(self, body: bytes, kind: str, name: str, revision: str) -> None:
        self._require_writer(name)
        repository = self.hub.store.find(KINDS[kind], name)
        if revision in repository.branches:
            raise Refused(409, "BranchExists", "Reference already exists")
        start = (json.loads(body or b"{}") or {}).get("startingPoint") or "main"
        repository.branches[revision] = repository.at(start).oid
        self._answer({})

    def _resolve(self, body: bytes, name: str, revision: str, path: str, prefix: str | None = None) -> None:
        commit = self._readable((prefix or "models/").rstrip("/"), name).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            self._answer({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        content, large = commit.files[path], path in commit.large
        headers |= {"ETag": f'"{object_id(content, large)}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._answer(content, 200, headers)
            return
        first, last = int(span[1]), int(span[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(content[first : last + 1], 206, headers)


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_NAME}"
_PREFIX = r"/(?P<prefix>datasets/|spaces/)?"
_ROUTES = (
    (("GET",), "/api/whoami-v2", _Handler._whoami),
    (("POST",), "/api/repos/create", _Handler._create),
    (("POST",), "/api/validate-yaml", _Handler._validate),
    (("GET",), rf"{_API}(/revision/(?P<revision>.+))?", _Handler._info),
    (("GET",), rf"{_API}/tree/(?P<revision>[^/]+)", _Handler._tree),
    (("POST",), rf"{_API}/preupload/(?P<revision>.+)", _Handler._preupload),
    (("POST",), rf"{_API}/commit/(?P<revision>.+)", _Handler._commit),
    (("GET",), rf"{_API}/commits/(?P<revision>[^/]+)", _Handler._commits),
    (("POST",), rf"{_API}/branch/(?P<revision>.+)", _Handler._branch),
    (("POST",), rf"{_PREFIX}{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler._put),
    (("POST",), "/lfs-verify", _Handler._verify),
    (("GET", "HEAD"), rf"{_PREFIX}{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
)
