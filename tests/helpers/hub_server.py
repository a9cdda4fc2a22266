"""
A Hub on loopback: enough of its protocol for the real clients to push to it and load from it.

It keeps repositories in memory as git does (blobs, commits that are whole trees, branches, tags, pull requests), speaks
LFS with single and multipart uploads, and answers in the Hub's headers and error codes. Faults can be injected at any
request: a status, a connection that drops before, in the middle of, or after the work, or a function to call.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from helpers import fork_server

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "gpl-3.0", "other"}
LARGE = (".safetensors", ".gguf", ".onnx", ".bin", ".png")
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
CHUNK = 1 << 16


class Refused(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        if code is not None:
            self.headers["X-Error-Code"] = code
        self.headers["X-Error-Message"] = message


class Dropped(Exception):
    """The connection ends without an answer."""


@dataclass
class Fault:
    """
    What goes wrong, at which requests, and how often.

    Attributes:
        method, path: of the request; `path` is a regular expression that is searched for.
        kind: "status", or where the connection ends: "before" the work, in the "middle" of the body that is read or
            written, "after" the work and before the answer; "none": nothing goes wrong.
        html: the answer is a page and no JSON.
        call, after: called with the request's path when it goes wrong (with "none": before the work), and after the
            work.
    """

    method: str
    path: str
    kind: str = "status"
    status: int = 500
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    html: bool = False
    call: Callable[[str], None] = lambda path: None
    after: Callable[[str], None] = lambda path: None
    happened: int = 0


@dataclass
class Repository:
    """Commits by id (each a tree: path to blob and whether it is LFS), and what points at them."""

    id: str
    type: str
    private: bool
    settings: dict[str, Any]
    commits: dict[str, dict[str, Any]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, dict[str, Any]] = field(default_factory=dict)

    def commit(self, tree: dict[str, tuple[bytes, bool]], parent: str | None, title: str) -> str:
        listing = [(path, hashlib.sha256(content).hexdigest()) for path, (content, _) in sorted(tree.items())]
        oid = hashlib.sha1(json.dumps([parent, title, listing]).encode()).hexdigest()
        self.commits[oid] = {"tree": tree, "parent": parent, "title": title}
        return oid

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag, pull request or commit id means."""
        if match := re.fullmatch(r"refs/pr/(\d+)", revision):
            pull_request = self.pull_requests.get(int(match[1]))
            if pull_request is not None:
                return pull_request["head"]
        name = "main" if revision == "HEAD" else revision.removeprefix("refs/heads/")
        found = self.branches.get(name) or self.tags.get(revision) or (revision if revision in self.commits else None)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def history(self, revision: str = "main") -> list[str]:
        """The titles of the commits, the newest first."""
        titles, oid = [], self.branches.get(revision)
        while oid is not None:
            titles.append(self.commits[oid]["title"])
            oid = self.commits[oid]["parent"]
        return titles

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.commits[self.resolve(revision)]["tree"].items()}


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(value: Any, status: int = 200, **headers: str) -> "Response":
        return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class HubServer:
    """
    The state of the Hub, and its answers.

    Attributes:
        url: what HF_ENDPOINT has to be.
        storage: where large files are.
        users: tokens and the names they stand for.
        organizations: those that a user may write to, by name of the user.
        read_only: tokens that may not write.
        requests: (method, path) of every request, in order.
        headers_seen: (path, Authorization header) of every request.
        received: bytes of LFS content that arrived, repeated uploads counted.
        part_size: LFS objects above it are uploaded in parts of it; `None`: never.
    """

    def __init__(self) -> None:
        self.users = {"hf_" + "a" * 34: "user"}
        self.organizations: dict[str, list[str]] = {"user": ["team"]}
        self.read_only: set[str] = set()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.headers_seen: list[tuple[str, str]] = []
        self.received = 0
        self.part_size: int | None = None
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Another host for the clients, as on the Hub: they must not follow a HEAD there, nor send their token.
        self.storage = self.url.replace("127.0.0.1", "localhost")

    def environment(self, home: Path) -> dict[str, str]:
        """What makes a process talk to this Hub, with a token; `home` is for its caches."""
        return {
            "HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": self.token,
            "HF_HOME": str(home),
        }  # fmt: skip

    def use(self, monkeypatch: Any, home: Path) -> None:
        """Makes this process, and those that it starts, talk to this Hub: the client has read its settings already."""
        import huggingface_hub
        from huggingface_hub import constants

        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "executable", fork_server.python())
        huggingface_hub.utils.close_session()

    @property
    def token(self) -> str:
        return next(iter(self.users))

    @contextlib.contextmanager
    def running(self) -> Iterator["HubServer"]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()

    def count(self, method: str, path: str) -> int:
        """How many requests there were whose path has this regular expression in it."""
        return sum(1 for m, p in self.requests if m == method and re.search(path, p))

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    # Who asks, and for what.

    def user_of(self, request: Request) -> str | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        name = self.users.get(header.removeprefix("Bearer "))
        if name is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return name

    def may_write(self, request: Request, namespace: str) -> bool:
        user = self.user_of(request)
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        owns = user is not None and (namespace == user or namespace in self.organizations.get(user, []))
        return owns and token not in self.read_only

    def repository(self, request: Request, type_: str, name: str, write: bool = False) -> Repository:
        user = self.user_of(request)
        found = self.repositories.get((type_, name))
        is_hidden = found is not None and found.private and not (user and name.split("/")[0] in self.names_of(user))
        if found is None or is_hidden:
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and not self.may_write(request, name.split("/")[0]):
            raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return found

    def names_of(self, user: str) -> list[str]:
        return [user, *self.organizations.get(user, [])]

    # The answers, each for a method and a path.

    def answer(self, request: Request) -> Response:
        for method, pattern, name in ROUTES:
            if match := method == request.method and re.fullmatch(pattern, request.path):
                groups = {key: unquote(value) if value else value for key, value in match.groupdict().items()}
                if "type" in groups:
                    groups["type"] = (groups["type"] or "models").removesuffix("s")
                with self.lock:
                    return getattr(self, name)(request, **groups)
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    def who_am_i(self, request: Request) -> Response:
        user = self.user_of(request)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        organizations = [{"type": "org", "name": name} for name in self.organizations.get(user, [])]
        return Response.of({"type": "user", "name": user, "orgs": organizations, "auth": {"type": "access_token"}})

    def create_repository(self, request: Request) -> Response:
        body = request.json()
        user = self.user_of(request)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        namespace, type_ = body.get("organization") or user, body.get("type", "model")
        if not self.may_write(request, namespace):
            raise Refused(403, f'You don\'t have the rights to create a {type_} under the namespace "{namespace}"')
        name = f"{namespace}/{body['name']}"
        answer = {"url": f"{self.url}/{PREFIXES[type_]}{name}", "name": name}
        if (type_, name) in self.repositories:
            return Response.of({"error": f"You already created this {type_} repo", **answer}, 409)
        if type_ == "space" and body.get("sdk") not in ("gradio", "docker", "static"):
            raise Refused(400, "sdk is required")
        private = body.get("visibility") == "private" or body.get("private") is True
        repository = Repository(name, type_, private, body)
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE).encode()
        first = repository.commit({".gitattributes": (attributes, False)}, None, "initial commit")
        repository.branches["main"] = first
        self.repositories[type_, name] = repository
        return Response.of(answer)

    def validate_yaml(self, request: Request) -> Response:
        content, type_ = request.json()["content"], request.json()["repoType"]
        match = re.match(r"^---\r?\n(.*?)\r?\n---", content, flags=re.DOTALL)
        errors, warnings = [], []
        if match is None:
            warnings.append("empty or missing yaml metadata in repo card")
        else:
            try:
                errors += errors_in_metadata(yaml.safe_load(match[1]), type_)
            except yaml.YAMLError as error:
                errors.append(str(error))
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return Response.of(answer, 400 if errors else 200)

    def preupload(self, request: Request, type: str, name: str, revision: str) -> Response:
        is_proposal = request.query.get("create_pr") == "1"
        repository = self.repository(request, type, name, write=not is_proposal)
        tree = repository.commits[repository.resolve(revision)]["tree"]
        files = []
        for file in request.json()["files"]:
            path = file["path"]
            is_large = path.endswith(LARGE) or file["size"] > 10_000_000
            answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if path in tree:
                answer["oid"] = lfs_oid(tree[path][0]) if tree[path][1] else blob_oid(tree[path][0])
            files.append(answer)
        return Response.of({"files": files, "commitOid": repository.resolve(revision)})

    def lfs_batch(self, request: Request, type: str, name: str) -> Response:
        self.repository(request, type, name)
        if self.user_of(request) is None:
            raise Refused(401, "Invalid username or password.")
        answers = []
        for wanted in request.json()["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.objects:
                header = {}
                url = f"{self.storage}/lfs-storage/{wanted['oid']}?X-Amz-Signature=secret"
                if self.part_size is not None and wanted["size"] > self.part_size:
                    count = -(-wanted["size"] // self.part_size)
                    parts = f"{self.storage}/lfs-parts/{wanted['oid']}"
                    header = {
                        "chunk_size": str(self.part_size),
                        **{str(n + 1): f"{parts}/{n + 1}" for n in range(count)},
                    }
                    url = f"{self.url}/api/complete_multipart"
                verify = {"href": f"{self.url}/{name}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": {"href": url, "header": header}, "verify": verify}
            answers.append(answer)
        return Response.of({"transfer": "basic", "objects": answers})

    def lfs_put(self, request: Request, oid: str) -> Response:
        if request.headers.get("Authorization"):
            raise Refused(400, "Only one auth mechanism allowed")  # as S3 says of a signed address
        if lfs_oid(request.body) != oid:
            raise Refused(400, "BadDigest")
        self.objects[oid] = request.body
        return Response(headers={"ETag": f'"{oid}"'})

    def lfs_put_part(self, request: Request, oid: str, number: str) -> Response:
        self.parts[oid, int(number)] = request.body
        return Response(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def lfs_complete(self, request: Request) -> Response:
        body = request.json()
        content = b"".join(self.parts.pop((body["oid"], part["partNumber"])) for part in body["parts"])
        if lfs_oid(content) != body["oid"]:
            raise Refused(400, "BadDigest")
        self.objects[body["oid"]] = content
        return Response.of({})

    def lfs_verify(self, request: Request, type: str, name: str) -> Response:
        body = request.json()
        if len(self.objects.get(body["oid"], b"")) != body["size"]:
            raise Refused(404, "Object does not exist")
        return Response.of({})

    def commit(self, request: Request, type: str, name: str, revision: str) -> Response:
        is_proposal = request.query.get("create_pr") == "1"
        repository = self.repository(request, type, name, write=not is_proposal)
        if self.user_of(request) is None:
            raise Refused(401, "Invalid username or password.")
        head = repository.resolve(revision)
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        if header["value"].get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repository.commits[head]["tree"])
        for operation in operations:
            value = operation["value"]
            path = value["path"]
            if operation["key"] == "file":
                tree[path] = (base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
                tree[path] = (self.objects[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                if path not in tree:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                del tree[path]
            else:
                raise Refused(400, f"unknown operation {operation['key']}")
        title = header["value"]["summary"]
        oid = repository.commit(tree, head, title)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{PREFIXES[type]}{name}/commit/{oid}"}
        if is_proposal:
            number = len(repository.pull_requests) + 1
            author = self.user_of(request)
            repository.pull_requests[number] = {"head": oid, "title": title, "author": author, "base": revision}
            answer["pullRequestUrl"] = f"{self.url}/{PREFIXES[type]}{name}/discussions/{number}"
        elif match := re.fullmatch(r"refs/pr/(\d+)", revision):
            repository.pull_requests[int(match[1])]["head"] = oid
        else:
            repository.branches[revision] = oid
        return Response.of(answer)

    def create_branch(self, request: Request, type: str, name: str, branch: str) -> Response:
        repository = self.repository(request, type, name, write=True)
        if branch in repository.branches:
            raise Refused(409, "Reference already exists")
        start = (request.json() or {}).get("startingPoint", "main") if request.body else "main"
        repository.branches[branch] = repository.resolve(start)
        return Response()

    def create_tag(self, request: Request, type: str, name: str, revision: str) -> Response:
        repository = self.repository(request, type, name, write=True)
        tag = request.json()["tag"]
        if tag in repository.tags:
            raise Refused(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = repository.resolve(revision)
        return Response()

    def references(self, request: Request, type: str, name: str) -> Response:
        repository = self.repository(request, type, name)

        def listed(kind: str, named: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in named.items()]

        answer = {
            "branches": listed("heads", repository.branches),
            "tags": listed("tags", repository.tags),
            "converts": [],
        }
        if request.query.get("include_prs"):
            heads = {str(number): each["head"] for number, each in repository.pull_requests.items()}
            answer["pullRequests"] = listed("pr", heads)
        return Response.of(answer)

    def discussions(self, request: Request, type: str, name: str) -> Response:
        repository = self.repository(request, type, name)
        found = [
            {
                "num": number, "title": each["title"], "author": {"name": each["author"]}, "status": "open",
                "createdAt": "2026-11-25T12:00:00.000Z", "isPullRequest": True, "repo": {"name": name, "type": type},
            }
            for number, each in repository.pull_requests.items()
            if request.query.get("author") in (None, each["author"])
        ]  # fmt: skip
        return Response.of({"discussions": found, "count": len(found), "start": 0})

    def information(self, request: Request, type: str, name: str, revision: str | None = None) -> Response:
        repository = self.repository(request, type, name)
        oid = repository.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid]["tree"])]
        answer = {"_id": "0" * 24, "id": name, "modelId": name, "sha": oid, "private": repository.private, "tags": []}
        answer |= {"siblings": siblings, "downloads": 0, "likes": 0, "gated": False, "author": name.split("/")[0]}
        answer |= {"lastModified": "2026-11-25T12:00:00.000Z", "createdAt": "2026-11-25T12:00:00.000Z"}
        if type == "space":
            answer["sdk"] = repository.settings["sdk"]
        return Response.of(answer)

    def tree(self, request: Request, type: str, name: str, revision: str, folder: str | None = None) -> Response:
        repository = self.repository(request, type, name)
        files = repository.commits[repository.resolve(revision)]["tree"]
        inside = {path: file for path, file in files.items() if folder is None or path.startswith(f"{folder}/")}
        if folder is not None and not inside:
            raise Refused(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        recursive = request.query.get("recursive", "false").lower() in ("true", "1")
        start = len(folder) + 1 if folder else 0
        entries: dict[str, dict[str, Any]] = {}
        for path, (content, is_lfs) in sorted(inside.items()):
            parts = path[start:].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name_of_folder = path[:start] + "/".join(parts[:depth])
                entries[name_of_folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name_of_folder}
            if recursive or len(parts) == 1:
                entries[path] = path_information(path, content, is_lfs)
        return Response.of(list(entries.values()))

    def paths_information(self, request: Request, type: str, name: str, revision: str) -> Response:
        repository = self.repository(request, type, name)
        files = repository.commits[repository.resolve(revision)]["tree"]
        if request.headers.get("Content-Type", "").startswith("application/json"):
            paths = request.json()["paths"]
        else:
            paths = parse_qs(request.body.decode()).get("paths", [])
        return Response.of([path_information(path, *files[path]) for path in paths if path in files])

    def resolve(self, request: Request, type: str, name: str, revision: str, path: str) -> Response:
        repository = self.repository(request, type, name)
        oid = repository.resolve(revision)
        files = repository.commits[oid]["tree"]
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        content, is_lfs = files[path]
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes", "Content-Disposition": "inline"}
        if is_lfs:
            etag = lfs_oid(content)
            self.objects[etag] = content
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            # As the Hub does: large files come from elsewhere, at an address that is signed.
            return Response(302, b"", headers | {"Location": f"{self.storage}/cdn/{etag}?Signature=secret"})
        return ranged(request, content, headers | {"ETag": f'"{blob_oid(content)}"'})

    def raw(self, request: Request, type: str, name: str, revision: str, path: str) -> Response:
        """What git holds: of a large file, the pointer."""
        repository = self.repository(request, type, name)
        oid = repository.resolve(revision)
        files = repository.commits[oid]["tree"]
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content, is_lfs = files[path]
        return ranged(request, lfs_pointer(content) if is_lfs else content, {"X-Repo-Commit": oid})

    def cdn(self, request: Request, oid: str) -> Response:
        return ranged(request, self.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def nothing(self, request: Request) -> Response:
        return Response.of({})


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """The content, or the part of it that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if match is None:
        return Response(200, content, headers)
    start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
    if start >= len(content):
        raise Refused(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
    return Response(206, content[start : end + 1], headers)


def path_information(path: str, content: bytes, is_lfs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_oid(content)}
    if is_lfs:
        pointer = lfs_pointer(content)
        entry["oid"] = blob_oid(pointer)
        entry["lfs"] = {"oid": lfs_oid(content), "size": len(content), "pointerSize": len(pointer)}
    return entry


def lfs_pointer(content: bytes) -> bytes:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{lfs_oid(content)}\nsize {len(content)}\n"
    return text.encode()


def errors_in_metadata(metadata: Any, type_: str) -> list[str]:
    """Some of the rules of the Hub."""
    if not isinstance(metadata, dict):
        return ['"metadata" must be of type object']
    errors = []
    if "license" in metadata and metadata["license"] not in LICENSES:
        errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    for key in ("tags", "datasets"):
        if key in metadata and not isinstance(metadata[key], list):
            errors.append(f'"{key}" must be an array')
    for model in metadata.get("model-index", []):
        if not model.get("name"):
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            if not (result.get("task", {}).get("type") and result.get("metrics")):
                errors.append('"model-index[0].results[0]" lacks a task or metrics')
            for metric in result.get("metrics", []):
                if not metric.get("type") or "value" not in metric:
                    errors.append('"model-index[0].results[0].metrics[0]" lacks a type or a value')
            if not (result.get("dataset", {}).get("type") and result["dataset"].get("name")):
                errors.append('"model-index[0].results[0].dataset" lacks a type or a name')
    if type_ == "space":
        errors += [f'"{key}" is required' for key in ("sdk", "app_file") if key not in metadata]
    return errors


def blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


REPO = r"/api/(?P<type>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<type>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "who_am_i"),
    ("POST", "/api/repos/create", "create_repository"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", REPO + "/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", PAGE + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", "/lfs-storage/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("PUT", "/lfs-parts/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)", "lfs_put_part"),
    ("POST", "/api/complete_multipart", "lfs_complete"),
    ("POST", PAGE + r"\.git/info/lfs/objects/verify", "lfs_verify"),
    ("POST", REPO + "/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", REPO + "/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", REPO + "/tag/(?P<revision>[^/]+)", "create_tag"),
    ("GET", REPO + "/refs", "references"),
    ("GET", REPO + "/discussions", "discussions"),
    ("GET", REPO, "information"),
    ("GET", REPO + "/revision/(?P<revision>[^/]+)", "information"),
    ("GET", REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("POST", REPO + "/paths-info/(?P<revision>[^/]+)", "paths_information"),
    ("GET", PAGE + "/resolve/(?P<revision>[^/]+|refs/pr/[0-9]+)/(?P<path>.+)", "resolve"),
    ("GET", PAGE + "/raw/(?P<revision>[^/]+)/(?P<path>.+)", "raw"),
    ("GET", "/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
    ("GET", "/api/agent-harnesses", "nothing"),
]


class Handler(BaseHTTPRequestHandler):
    """HTTP around the answers, with the faults in between."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    hub: HubServer

    def handle_request(self) -> None:
        split = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        self.hub.requests.append((self.command, self.path))
        self.hub.headers_seen.append((self.path, self.headers.get("Authorization") or ""))
        # HEAD is GET without the body, for faults too.
        fault = self.fault_of("GET" if self.command == "HEAD" else self.command)
        try:
            if fault is not None and fault.kind == "before":
                raise Dropped
            body = self.read_body(fault)
            request = Request("GET" if self.command == "HEAD" else self.command, split.path, query, self.headers, body)
            if fault is not None and fault.html:
                page = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
                return self.respond(Response(fault.status, page, {"Content-Type": "text/html"}))
            try:
                if fault is not None and fault.kind == "status":
                    raise Refused(fault.status, fault.message, headers=fault.headers)
                response = self.hub.answer(request)
            except Refused as refused:
                response = Response.of({"error": refused.message}, refused.status, **refused.headers)
            if fault is not None:
                fault.after(self.path)
            if fault is not None and fault.kind == "after":
                fault.call(self.path)
                raise Dropped
            self.respond(response, cut=fault is not None and fault.kind == "middle")
        except (Dropped, ConnectionError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)

    def fault_of(self, method: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.method == method and fault.happened < fault.times and re.search(fault.path, self.path):
                    fault.happened += 1
                    if fault.kind in ("before", "status", "none"):
                        fault.call(self.path)
                    return fault
        return None

    def read_body(self, fault: Fault | None) -> bytes:
        length, pieces, got = int(self.headers.get("Content-Length") or 0), [], 0
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            got = length = sum(map(len, pieces))
        stop = length // 2 if fault is not None and fault.kind == "middle" and length else length
        while got < stop:
            piece = self.rfile.read(min(CHUNK, stop - got))
            if not piece:
                raise ConnectionError
            pieces.append(piece)
            got += len(piece)
        body = b"".join(pieces)
        if self.command == "PUT":
            with self.hub.lock:
                self.hub.received += len(body)
        if stop < length:
            fault.call(self.path)
            raise Dropped
        return body

    def respond(self, response: Response, cut: bool = False) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, quote(value, safe="!#$%&'()*+,/:;=?@[] \"-._~{}`<>|^") if value else value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if cut else response.body)
        self.wfile.flush()
        if cut:
            raise Dropped

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *arguments: object) -> None:
        pass
