# SPDX-License-Identifier: Apache-2.0
"""The hub's API for uploads: repositories, branches, large files, commits, and the check of a card."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
import urllib.parse
from collections.abc import Iterator
from typing import Any

import yaml

OBJECTS = ".objects"  # folder of the large files, by their SHA-256
# of the identifiers that the hub knows, those that cards here have
LICENSES = ("apache-2.0", "creativeml-openrail-m", "openrail++", "mit", "other")
ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Uploads:
    """The hub's answers to POST, beside `server._Hub`."""

    def do_POST(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.state.requests.append(("POST", path))
        body = b"".join(blocks_of(self))
        with contextlib.suppress(OSError):  # the client may have gone
            self._take(path, body)

    def _take(self, path: str, body: bytes) -> None:
        fault = self.state.take_fault(path)
        if fault.isdigit():
            return self.refuse(int(fault), "", "refused by the test")
        if fault:
            return self.hang_up()
        if self.headers.get("Authorization") != f"Bearer {self.state.token}":
            return self.refuse(401, "", "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self._check_card(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        repository, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if self.state.snapshot(repository, "main") is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        answers = {"branch": self._branch, "preupload": self._preupload, "commit": self._commit}
        return answers[kind](repository, revision, body)

    def _check_card(self, content: str) -> None:
        """As strict as the hub where it refuses a card."""
        try:
            values = yaml.safe_load(content.split("---\n")[1])
            errors = [] if values["license"] in LICENSES else [f"license {values['license']!r}"]
            for result in values.get("model-index", []):
                errors += [] if result.get("name") and result.get("results") else ["model-index"]
        except (IndexError, KeyError, TypeError, yaml.YAMLError) as error:
            errors = [repr(error)]
        answer = {"errors": [{"message": e} for e in errors], "warnings": []}
        self.give(400 if errors else 200, json.dumps(answer).encode(), Content_Type="application/json")

    def _create(self, values: dict[str, Any]) -> None:
        repository = f"{values['organization']}/{values['name']}"
        root = self.state.folder / repository / "main"
        known = root.is_dir()
        if not known:
            root.mkdir(parents=True)
            (root / ".gitattributes").write_text(ATTRIBUTES)
            self.state.private |= {repository} if values.get("visibility") == "private" else set()
        answer = json.dumps({"url": f"{self.state.endpoint}/{repository}"}).encode()
        self.give(409 if known else 200, answer, Content_Type="application/json")

    def _branch(self, repository: str, branch: str, _: bytes) -> None:
        root = self.state.folder / repository
        target = root / urllib.parse.quote(branch, safe="")
        if target.is_dir():
            return self.refuse(409, "", "Reference already exists")
        shutil.copytree(root / "main", target)
        return self.give_json({})

    def _preupload(self, repository: str, revision: str, body: bytes) -> None:
        """Which files are large, and the ids of those that are there."""
        from .server import LARGE, git_id, sha256

        there = self.state.snapshot(repository, revision)
        if there is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        answers = []
        for name in (file["path"] for file in json.loads(body)["files"]):
            large, known = name.endswith(LARGE), there.files.get(name)
            identify = sha256 if large else git_id
            answer = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": identify(known)} if known else {}))
        return self.give_json({"files": answers})

    def _batch(self, values: dict[str, Any]) -> None:
        """Where to send the large files that are not there."""
        objects = []
        for wanted in values["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.state.folder / OBJECTS / wanted["oid"]).is_file():
                href = f"{self.state.storage}/{OBJECTS}/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self.give_json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, revision: str, body: bytes) -> None:
        """Makes the next state of a branch beside it, then puts it in its place."""
        root = self.state.folder / repository / urllib.parse.quote(revision, safe="")
        following = self.state.folder / OBJECTS / "next"
        shutil.rmtree(following, ignore_errors=True)
        shutil.copytree(root, following)
        for line in (json.loads(line) for line in body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                continue
            target = following / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "deletedFile":
                target.unlink()
            elif line["key"] == "file":
                target.write_bytes(base64.b64decode(value["content"]))
            else:
                shutil.copyfile(self.state.folder / OBJECTS / value["oid"], target)
        shutil.rmtree(root)
        following.rename(root)
        self.state.forget(root)
        self.state.commits.append((repository, revision))
        oid = self.state.commit(repository, revision)
        url = f"{self.state.endpoint}/{repository}/commit/{oid}"
        self.give_json({"success": True, "commitUrl": url, "commitOid": oid})


class Receives:
    """The content network's answer to PUT, beside `server._Storage`."""

    def do_PUT(self) -> None:
        self.state.requests.append(("PUT", self.path))
        target = self.state.folder / self.path.strip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            fault = self.state.take_fault("PUT")
            if fault.isdigit():
                return self.refuse(int(fault), "", "refused by the test")
            if fault:
                self.rfile.read(1)
                return self.hang_up()
            data = b"".join(blocks_of(self))
            if hashlib.sha256(data).hexdigest() != target.name:
                return self.refuse(400, "", "these are other bytes")
            target.write_bytes(data)
            self.state.received.append(len(data))
            return self.give(200)
        return None


def blocks_of(handler: Any) -> Iterator[bytes]:
    """The body of a request, whether its length is told before or piece by piece."""
    if handler.headers.get("Transfer-Encoding", "") == "chunked":
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            yield handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
    else:
        yield handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
