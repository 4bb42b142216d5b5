"""A hub on this machine: the endpoints that huggingface_hub calls to push and to download, with
repositories in memory. Content is stored as it comes; nothing is taken for granted of the caller.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of_the_tests"
LARGE = (".safetensors", ".png")
"""Files that the hub keeps outside git."""

NAME = r"([\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    """Of its commits."""

    @property
    def head(self) -> str:
        return hashlib.sha1(repr((self.messages, sorted(self.files.items()))).encode()).hexdigest()


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, **more: str):
        self.status, self.answer = status, {"error": message, **more}


class Hub:
    """The repositories, and what each kind of request does with them."""

    def __init__(self):
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.routes: dict[tuple[str, str], Callable[..., Any]] = {
            ("POST", "/api/repos/create"): self.create,
            ("POST", "/api/validate-yaml"): self.validate,
            ("POST", f"/api/models/{NAME}/preupload/main"): self.preupload,
            ("POST", f"/{NAME}.git/info/lfs/objects/batch"): self.batch,
            ("PUT", r"/large/(\w+)"): self.store,
            ("POST", f"/api/models/{NAME}/commit/main"): self.commit,
            ("GET", f"/api/models/{NAME}(?:/revision/main)?"): self.info,
            ("GET", f"/api/models/{NAME}/tree/\\w+"): self.tree,
            ("GET", f"/{NAME}/resolve/\\w+/(.+)"): self.file,
        }

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Any:
        for (verb, pattern), action in self.routes.items():
            found = re.fullmatch(pattern, path)
            if found and verb == method.replace("HEAD", "GET"):
                name = found[1] if found.groups() else ""
                hidden = name in self.repositories and self.repositories[name].private
                if token != TOKEN and (verb == "POST" or hidden):  # links to PUT to are secret
                    raise Refused(401, "Invalid credentials")
                if "/" in name and name not in self.repositories:
                    raise Refused(404, "Repository not found")
                return action(*found.groups(), *([] if verb == "GET" else [body]))
        raise Refused(404, f"no {method} {path}")

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            raise Refused(409, "You already created this model repo", url=f"{self.url}/{name}")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repositories[name] = Repository(bool(private))
        return {"url": f"{self.url}/{name}"}

    def validate(self, body: bytes) -> Any:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        if head is None or not isinstance(yaml.safe_load(head[1]), dict):
            raise Refused(400, "README.md has no metadata")
        return {"warnings": [], "errors": []}

    def preupload(self, name: str, body: bytes) -> Any:
        def kind(path: str) -> str:
            return "lfs" if path.endswith(LARGE) else "regular"

        paths = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": p, "uploadMode": kind(p), "shouldIgnore": False} for p in paths]}

    def batch(self, name: str, body: bytes) -> Any:
        objects = json.loads(body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.url}/large/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def store(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "other content than announced")
        self.large[oid] = body
        return {}

    def commit(self, name: str, body: bytes) -> Any:
        repository = self.repositories[name]
        for line in map(json.loads, body.splitlines()):
            match line["key"], line["value"]:
                case "header", value:
                    repository.messages.append(value["summary"])
                case "file", value:
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile", value:
                    repository.files[value["path"]] = self.large[value["oid"]]
                case "deletedFile", value:
                    del repository.files[value["path"]]
        return {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": repository.head}

    def info(self, name: str) -> Any:
        found = self.repositories[name]
        siblings = [{"rfilename": path} for path in found.files]
        return {"id": name, "sha": found.head, "private": found.private, "siblings": siblings}

    def tree(self, name: str) -> Any:
        files = self.repositories[name].files.items()
        return [
            {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for p, c in files
        ]

    def file(self, name: str, path: str) -> Any:
        repository = self.repositories[name]
        if path not in repository.files:
            raise Refused(404, "Entry not found")
        return repository.files[path], repository.head


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub that answers at its url."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            body = self.rfile.read(length)
            status, headers = 200, {}
            try:
                found = hub.answer(self.command, self.path.split("?")[0], body, token)
            except Refused as refused:
                status, found = refused.status, refused.answer
                headers["X-Error-Message"] = refused.answer["error"]
            if isinstance(found, tuple):
                content, head = found
                headers |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": head}
            else:
                content = json.dumps(found).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
