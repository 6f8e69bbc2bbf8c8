"""A data set by name, from a small imitation of the Hugging Face Hub on 127.0.0.1, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/chats"
ROW = '{"prompt": "a", "completion": "b"}\n'
FILES = {"data/train.jsonl": ROW * 2, "data/test.jsonl": ROW, "README.md": "about", "train.py": "print()"}


@dataclass
class FakeHub:
    """What the imitation was asked; `status` and `error_code` make it refuse."""

    status: int = 200
    error_code: str = ""
    asked: list[str] = field(default_factory=list)
    url: str = ""


def handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def give(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(path)
            if hub.status != 200:
                return self.give(hub.status, b"", X_Error_Code=hub.error_code)
            if path.startswith(f"/api/datasets/{REPO}/revision/"):
                about = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
                return self.give(200, json.dumps(about).encode(), Content_Type="application/json")
            if path.startswith(f"/api/datasets/{REPO}/tree/"):
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in FILES.items()]
                return self.give(200, json.dumps(tree).encode(), Content_Type="application/json")
            name = path.removeprefix(f"/datasets/{REPO}/resolve/{COMMIT}/")
            if name not in FILES:
                return self.give(404, b"", X_Error_Code="EntryNotFound")
            body = FILES[name].encode()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.give(200, body, X_Repo_Commit=COMMIT, ETag=etag, Accept_Ranges="bytes")

        do_HEAD = do_GET = answer

    return Handler


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def gemwright(hub: FakeHub, home: Path, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    new = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "GEMWRIGHT_HOME": str(home / "gw"), "NO_PROXY": "*"}
    command = [sys.executable, "-m", "gemwright", *map(str, words)]
    return subprocess.run(
        command, env=kept | new | env, cwd=home, capture_output=True, encoding="utf-8", timeout=120, check=False
    )


def data_check(hub: FakeHub, home: Path, name: str = REPO, **env: str) -> subprocess.CompletedProcess[str]:
    return gemwright(hub, home, "data", "check", name, "--json", **env)


def test_a_data_set_by_name(hub: FakeHub, tmp_path: Path) -> None:
    done = data_check(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["read"] == 2 and [Path(file["path"]).name for file in row["files"]] == ["train.jsonl"]
    assert [Path(file["path"]).name for file in row["skipped"]] == ["test.jsonl"]
    assert f"asking {hub.url} for a data set of that name" in done.stderr
    assert not any(path.endswith((".md", ".py")) for path in hub.asked)

    hub.asked.clear()
    offline = data_check(hub, tmp_path, f"hf:{REPO}", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and json.loads(offline.stdout)["read"] == 2 and not hub.asked


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "said"),
    [
        (404, "RepoNotFound", 2, "no data set of that name"),
        (403, "GatedRepo", 2, "accepted its terms"),
        (500, "", 1, "HTTP 500"),
    ],
)
def test_refusals(hub: FakeHub, tmp_path: Path, status: int, code: str, exit_code: int, said: str) -> None:
    hub.status, hub.error_code = status, code
    done = data_check(hub, tmp_path)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (exit_code, "") and last.startswith("error: ") and said in last


def test_without_a_network(hub: FakeHub, tmp_path: Path) -> None:
    done = data_check(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set" in done.stderr and not hub.asked
    hub.url = "http://127.0.0.1:9"
    done = data_check(hub, tmp_path)
    assert done.returncode == 1 and "no connection to http://127.0.0.1:9" in done.stderr.splitlines()[-1]


def test_a_run_on_a_data_set_by_name_is_gone_on_with(hub: FakeHub, tmp_path: Path, tiny_model: Path) -> None:
    words = ("--model", tiny_model, "--out", "run", "--max-steps", 4, "--save-every", 1, "--max-hours", 1e-9)
    stopped = gemwright(hub, tmp_path, "tune", REPO, *words, "--rank", 2, "--seq", 16, "--tokens-per-step", 16)
    assert stopped.returncode == 0 and "go on with" in stopped.stderr, stopped.stderr
    assert sum("/revision/" in path for path in hub.asked) == 1

    done = gemwright(hub, tmp_path, "runs", "resume", "run", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 4, done.stderr
