"""A small Hub on this machine that huggingface_hub's own client talks to over HTTP.

It keeps repositories in memory and knows as much of the API as pushing and loading a model takes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load as load_bytes
from tiny_models import tiny_batch

TOKEN = "hf_of_the_stand_in"
USER = "me"


@dataclass
class Repo:
    """A repository: files by path at the head of each branch, and what was said of the commits."""

    visibility: str | None
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]

    def at(self, revision: str) -> dict[str, bytes]:
        """The files of a branch; a commit, which the client asks for too, is the last of main."""
        return self.branches.get(revision, self.files)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


class StandIn:
    """The server; `repos` maps ids to repositories."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        hub = self

        class Handler(_Handler):
            repos = hub.repos

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        Handler.endpoint = self.endpoint
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: dict[str, Repo]
    endpoint: str

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def repo(self, parts):
        return self.repos.get("/".join(parts[:2]))

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "", "Invalid username or password.")
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if parts[1:2] == ["validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        repo = self.repo(parts[2:])
        if repo is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if parts[4] == "preupload":
            asked = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer({"files": [{"path": file["path"], **modes} for file in asked]})
        if parts[4] == "branch":
            known = parts[5] in repo.branches
            repo.branches.setdefault(parts[5], dict(repo.files))
            return self.answer(status=409 if known else 200)
        return self.commit("/".join(parts[2:4]), repo, repo.branches[parts[5]], body)

    def create(self, asked):
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        status = 409 if name in self.repos else 200
        self.repos.setdefault(name, Repo(asked.get("visibility")))
        self.answer({"url": f"{self.endpoint}/{name}"}, status)

    def commit(self, name, repo, content, body):
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        for line in lines:
            if line["key"] == "deletedFile":
                del content[line["value"]["path"]]
        content |= added
        repo.commits.append({"summary": header["summary"], "files": sorted(added)})
        self.answer(
            {
                "success": True,
                "commitOid": repo.sha,
                "commitUrl": f"{self.endpoint}/{name}/commit/{repo.sha}",
            }
        )

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            return self.answer({"name": USER, "type": "user", "orgs": []})
        is_api = parts[:2] == ["api", "models"]
        repo = self.repo(parts[2:] if is_api else parts)
        if repo is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if is_api and parts[4:5] == ["tree"]:
            listed = repo.at(parts[5])
            return self.answer(
                [{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in listed]
            )
        if is_api:
            siblings = [{"rfilename": path} for path in repo.files]
            name = "/".join(parts[2:4])
            return self.answer(
                {"id": name, "sha": repo.sha, "siblings": siblings, "tags": [], "private": False}
            )
        path = "/".join(parts[4:])
        content = repo.at(parts[3])
        if path not in content:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha1(content[path]).hexdigest()
        self.answer(content[path], ETag=f'"{etag}"', X_Repo_Commit=repo.sha)

    do_HEAD = do_GET


def files(hub, repo_id) -> dict[str, bytes]:
    return hub.repos[repo_id].files


def card_of(hub, repo_id) -> ModelCard:
    return ModelCard(files(hub, repo_id)["README.md"].decode())


def assert_published(hub, repo_id, model, *, with_norms: bool) -> None:
    """The plain or the standalone form is there, as the model computes it, without the sidecar."""
    content = files(hub, repo_id)
    assert not [name for name in content if "hf_stable_state" in name]
    assert ("modeling_hf_stable.py" in content) != with_norms
    model_type = json.loads(content["config.json"])["model_type"]
    assert model_type.startswith("hf_stable_") != with_norms
    weights = load_bytes(content["model.safetensors"])
    assert not [name for name in weights if name.endswith((".gamma", ".sigma_u"))]
    loaded = transformers.AutoModelForImageClassification.from_pretrained(repo_id)
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)
