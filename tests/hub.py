"""A small Hub on the loopback interface: real HTTP, and of the protocol what `huggingface_hub` uses to fetch and to push."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_owner"


@dataclass
class Repository:
    """Commits, each a full picture of the files, and the branches that name them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes] | Path, branch: str = "main", parent: bool = False) -> str:
        """Add a commit (of all files in a folder, if a path is given) and return its id."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        before = self.commits[self.branches[branch]] if parent and branch in self.branches else {}
        commit = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[commit] = {**before, **files}
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


class Hub:
    """What the server holds, what it was asked, and what a test makes go wrong.

    Attributes:
        repositories: by id.
        requests: "METHOD /path" of every request, in order.
        tokens: the token that came with each.
        ranges: the `Range` header of every request for bytes of a large file.
        break_after: the next answer with bytes of a large file ends after as many bytes, and the connection with it.
        before: called with the line of each request before it is answered.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        # Large files come from another host, which is not to be given the token.
        self.large_url = url.replace("127.0.0.1", "localhost") + "/large/"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.ranges: list[str | None] = []
        self.break_after: int | None = None
        self.before: Callable[[str], None] = lambda line: None
        self.large: dict[str, bytes] = {}

    def repository(self, name: str, private: bool = False) -> Repository:
        return self.repositories.setdefault(name, Repository(private))


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers at `hub.url` while this lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def as_the_real_one(folder: Path) -> Iterator[Hub]:
    """A Hub that this process takes for the real one while this lasts, with an empty cache in `folder`."""
    from huggingface_hub import constants, file_download, hf_api

    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(hf_api.api, "endpoint", hub.url)  # of the functions that are one object's methods
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # some releases have a copy
            patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(b"")

    do_GET = do_HEAD

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        self._answer(self.rfile.read(int(length)) if length else self._chunks())

    do_PUT = do_POST

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.hub.before(line)
        token = self.headers.get("Authorization")
        self.hub.requests.append(line)
        self.hub.tokens.append(token and token.removeprefix("Bearer "))
        # Cut before it is unquoted: the name of a reference may hold a slash.
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "large":
            return self._large(parts[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[0] == "api":
            return self._api(parts[1:], body)
        return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    # -- fetching

    def _open(self, name: str) -> Repository | None:
        """The repository, or None once the client has been told that it may not see it."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.hub.tokens[-1] != TOKEN):
            # The same answer to both: who may not see a repository may not learn that it is there.
            self._error(401, "RepoNotFound", "Invalid username or password.")
            return None
        return repository

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._open(name)
        if repository is None:
            return None
        commit = repository.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[commit].get(path)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        common = {"X-Repo-Commit": commit}
        if not _is_large(path):
            # As the real one does: the file itself has an address that names its commit.
            place = f"/api/resolve-cache/models/{name}/{commit}/{path}"
            return self._send(307, b"", {**common, "Location": place, "ETag": _etag(content)})
        oid = hashlib.sha256(content).hexdigest()
        self.hub.large[oid] = content
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return self._send(302, b"", {**common, **linked, "Location": self.hub.large_url + oid})

    def _large(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            self.hub.large[oid] = body
            return self._send(200, b"", {"ETag": f'"{oid}"'})
        content = self.hub.large[oid]
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.hub.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if wanted else 200, content[start:], headers, self.command == "GET")
        return None

    # -- the API

    def _api(self, parts: list[str], body: bytes) -> None:
        if parts[:2] == ["resolve-cache", "models"]:
            commit, path = parts[4], "/".join(parts[5:])
            content = self.hub.repositories["/".join(parts[2:4])].commits[commit][path]
            return self._send(200, content, {"X-Repo-Commit": commit, "ETag": _etag(content)})
        if parts == ["validate-yaml"]:
            return self._validate(json.loads(body)["content"])
        if parts == ["repos", "create"]:
            return self._create(json.loads(body))
        name, what = "/".join(parts[1:3]), parts[3] if len(parts) > 3 else "revision"
        repository = self._open(name)
        if repository is None:
            return None
        revision = "/".join(parts[4:]) or "main"
        if self.command == "POST" and self.hub.tokens[-1] != TOKEN:
            return self._error(403, "", "Forbidden: you need write access")
        actions: dict[str, Callable[[Repository, str, str, bytes], None]] = {
            "revision": self._info, "tree": self._tree, "preupload": self._preupload,
            "commit": self._commit, "branch": self._branch,
        }  # fmt: skip
        actions[what](repository, name, revision, body)
        return None

    def _validate(self, card: str) -> None:
        """The real one's rule that people meet most: the base model is an id."""
        import yaml

        base = yaml.safe_load(card.split("---")[1]).get("base_model", "a/b") if card.startswith("---") else "a/b"
        if not base or base.startswith("/"):
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            return self._json(400, {"errors": [{"message": message}], "warnings": []})
        return self._json(200, {"errors": [], "warnings": []})

    def _create(self, wanted: dict[str, Any]) -> None:
        if self.hub.tokens[-1] != TOKEN:
            return self._error(401, "", "Invalid username or password.")
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            return self._json(409, {"error": "You already created this model repo", "url": url})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.repository(name, private).commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._json(200, {"url": url, "name": name})

    def _info(self, repository: Repository, name: str, revision: str, body: bytes) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        return self._json(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings})

    def _tree(self, repository: Repository, name: str, revision: str, body: bytes) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit].items()
        return self._json(200, [{"type": "file", "path": p, "size": len(c), "oid": _blob(c)} for p, c in sorted(files)])

    def _preupload(self, repository: Repository, name: str, revision: str, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": p, "uploadMode": "lfs" if _is_large(p) else "regular", "shouldIgnore": False} for p in paths]
        return self._json(200, {"files": modes})

    def _batch(self, wanted: dict[str, Any]) -> None:
        place = self.hub.large_url
        objects = [{**o, "actions": {"upload": {"href": place + o["oid"]}}} for o in wanted["objects"]]
        return self._json(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, name: str, revision: str, body: bytes) -> None:
        files = {}
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        answer: dict[str, Any] = {"success": True}
        if "create_pr=1" in urlsplit(self.path).query:
            # A commit on a reference of its own; the branch that it is meant for stays where it is.
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
            pull = f"refs/pr/{number}"
            repository.branches[pull] = repository.branches[revision]
            revision, answer["pullRequestUrl"] = pull, f"{self.hub.url}/{name}/discussions/{number}"
        commit = repository.commit(files, revision, parent=True)
        answer |= {"commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}
        return self._json(200, answer)

    def _branch(self, repository: Repository, name: str, revision: str, body: bytes) -> None:
        if revision in repository.branches:
            return self._error(409, "", "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        return self._json(200, {})

    # -- answers

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], may_break: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if may_break and self.hub.break_after is not None:
            content, self.hub.break_after, self.close_connection = content[: self.hub.break_after], None, True
        self.wfile.write(content)


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _etag(content: bytes) -> str:
    return f'"{_blob(content)}"'
