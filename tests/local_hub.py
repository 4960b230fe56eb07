"""A Hugging Face Hub on this machine, with the requests of those who read models, datasets and adapters, and faults."""

import hashlib
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)/?(?P<path>.*))?"
)


class LocalHub:
    """A hub that serves the folders that are published to it.

    Attributes:
        requests: the method and path of every request, and its token.
        faults: (pattern of a method and path, fault): ``close`` the connection, ``cut`` a file in half, serve a
            ``page`` of another server, or answer with a status such as ``503``. A fault also holds for retries.
    """

    def __init__(self, store):
        self.store, self.commits, self.requests, self.faults = Path(store), {}, [], []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def publish(self, name, folder, branch="main", kind="models"):
        """Make a folder the newest commit of a branch, and return the commit."""
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        content = b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files)
        commit = hashlib.sha1(content).hexdigest()
        shutil.copytree(folder, self.store / commit, dirs_exist_ok=True)
        self.commits[kind, name, branch] = self.commits[kind, name, commit] = commit
        return commit

    def environment(self, home):
        """Return the variables of a process that uses this hub, with the cache in ``home``."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "*"}
        return {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", **own}


class _Handler(http.server.BaseHTTPRequestHandler):
    hub = None

    def do_GET(self):
        url = urlsplit(self.path)
        asked, body = f"{self.command} {url.path}", self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.hub.requests.append((asked, self.headers["Authorization"]))
        self.fault = next((fault for pattern, fault in self.hub.faults if re.search(pattern, asked)), None)
        if self.fault == "close":
            return
        if self.fault == "page":
            self.answer(200, b"<html>welcome to this network")
        elif self.fault and self.fault.isdigit():
            self.answer(int(self.fault), b"")
        elif found := FILE.fullmatch(url.path) or API.fullmatch(url.path):
            kind = found["kind"].rstrip("/") if found["kind"] else "models"
            revision = unquote(found["revision"] or "main")
            if not any(key[:2] == (kind, found["name"]) for key in self.hub.commits):
                self.answer(401, b"", **{"X-Error-Code": "RepoNotFound"})
            elif commit := self.hub.commits.get((kind, found["name"], revision)):
                folder = self.hub.store / commit
                if found.re is FILE:
                    self.file(folder, folder / found["path"])
                else:
                    self.api(folder, found, parse_qs(url.query), body)
            else:
                self.answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        else:
            self.answer(404, b"")

    do_HEAD = do_POST = do_GET

    def file(self, folder, file):
        commit = {"X-Repo-Commit": folder.name}
        if file.is_file():
            content = file.read_bytes()
            self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', **commit)
        else:
            self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"}, **commit)

    def api(self, folder, found, query, body):
        def entry(path):
            kind = "directory" if path.is_dir() else "file"
            return {
                "type": kind,
                "oid": "0" * 40,
                "size": path.stat().st_size,
                "path": str(path.relative_to(folder)),
            }

        if found["what"] == "tree":
            place = folder / unquote(found["path"])
            if not place.is_dir():
                return self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
            deep = query.get("recursive", [""])[0].lower() == "true"
            said = [entry(path) for path in sorted(place.rglob("*") if deep else place.iterdir())]
        elif found["what"] == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            said = [entry(folder / path) for path in paths if (folder / path).exists()]
        else:
            files = [entry(path) for path in sorted(folder.rglob("*")) if path.is_file()]
            said = {
                "id": found["name"],
                "sha": folder.name,
                "siblings": [{"rfilename": file["path"]} for file in files],
            }
        self.answer(200, json.dumps(said).encode(), **{"Content-Type": "application/json"})

    def answer(self, status, content, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.fault == "cut" else content)

    def log_message(self, *args):
        pass
