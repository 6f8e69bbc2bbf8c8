"""Downloads from a small imitation of the Hugging Face Hub on 127.0.0.1, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gemwright.spec import SPECS
from gemwright.weights.random_model import write_random_gguf

TINY = replace(SPECS["270m"], name="tiny", layers=1, hidden=64, mlp=64, heads=1, kv_heads=1, head_dim=64, vocab=512)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO, FILE = "google/gemma-3-1b-it-qat-q4_0-gguf", "gemma-3-1b-it-q4_0.gguf"


@dataclass
class FakeHub:
    """What the imitation serves and what it was asked; `breaks` answers are cut off in the middle."""

    content: bytes
    sha256: str
    status: int = 200
    error_code: str = ""
    token: str | None = None
    served: bytes | None = None
    breaks: int = 0
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str | None]:
        """The Range of each request for the file's bytes."""
        return [wanted for method, path, wanted in self.asked if method == "GET" and "/resolve/" in path]


def handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, with_body: bool) -> None:
            hub.asked.append((self.command, self.path, self.headers.get("Range")))
            if hub.status != 200:
                return self.refuse(hub.status, hub.error_code)
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401, "GatedRepo")
            if not re.fullmatch(rf"/{REPO}/resolve/(main|{COMMIT})/{FILE}", self.path):
                return self.refuse(404, "EntryNotFound")
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            content = hub.served if hub.served is not None else hub.content
            body = content[start:]
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{hub.sha256}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("ETag", f'"{hub.sha256}"')
            self.send_header("Accept-Ranges", "bytes")
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.close_connection = hub.breaks > 0
                self.wfile.write(body[: len(body) // 2] if hub.breaks > 0 else body)
                hub.breaks -= 1

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

    return Handler


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("hub") / "model.gguf"
    write_random_gguf(path, TINY, "Q4_0")
    return path.read_bytes()


@pytest.fixture
def hub(content: bytes) -> Iterator[FakeHub]:
    hub = FakeHub(content, hashlib.sha256(content).hexdigest())
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


CHILD = """
import json, sys
from gemwright.errors import GemwrightError
from gemwright.weights import pull
lines = []
try:
    got = pull.resolve_model(sys.argv[2]) if sys.argv[1] == "resolve" else pull.pull(sys.argv[2], report=lines.append)
    answer = {"path": str(got)} if sys.argv[1] == "resolve" else {**vars(got), "path": str(got.path)}
except GemwrightError as error:
    answer = {"error": str(error), "exit_code": error.exit_code}
print(json.dumps({**answer, "lines": lines}))
"""


def child(
    hub: FakeHub, home: Path, verb: str = "pull", name: str = "1b", before: str = "", **env: str
) -> dict[str, Any]:
    """One verb in a process of its own, since huggingface_hub reads its environment when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    new = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "GEMWRIGHT_HOME": str(home / "gw"), "NO_PROXY": "*"}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", f"{before}\n{CHILD}", verb, name]
    done = subprocess.run(command, env=kept | new | env, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_downloads_verifies_and_stays_in_the_hubs_cache(hub: FakeHub, tmp_path: Path) -> None:
    got = child(hub, tmp_path)
    assert Path(got["path"]).read_bytes() == hub.content
    assert got["sha256"] == hub.sha256 and got["bytes"] == len(hub.content)
    assert (got["size"], got["quantization"]) == ("tiny", "Q4_0")
    cache = tmp_path / "hf" / "hub" / f"models--{REPO.replace('/', '--')}"
    assert Path(got["path"]) == cache / "snapshots" / COMMIT / FILE
    assert not list(cache.rglob("*.part"))
    assert any("Gemma Terms of Use" in line for line in got["lines"])
    assert (Path(got["path"]).parent / "GEMMA_TERMS.txt").is_file()

    hub.asked.clear()
    again = child(hub, tmp_path)
    assert again["path"] == got["path"] and hub.asked and not hub.fetched()
    assert not any("Terms" in line for line in again["lines"])  # shown once

    hub.asked.clear()
    assert child(hub, tmp_path, verb="resolve")["path"] == got["path"] and not hub.asked
    offline = child(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline["sha256"] == hub.sha256 and not hub.asked

    with Path(got["path"]).open("r+b") as handle:  # bits rot on this disk
        handle.seek(-5, os.SEEK_END)
        handle.write(b"\x00\x01\x02\x03")
    rotten = child(hub, tmp_path)
    assert rotten["exit_code"] == 1 and "is damaged" in rotten["error"] and "Delete it" in rotten["error"]


def test_goes_on_where_an_earlier_process_stopped(hub: FakeHub, tmp_path: Path) -> None:
    blobs = tmp_path / "hf" / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.sha256}.part").write_bytes(hub.content[:10_000])
    assert Path(child(hub, tmp_path)["path"]).read_bytes() == hub.content
    assert hub.fetched() == ["bytes=10000-"]


def test_goes_on_when_the_connection_breaks(hub: FakeHub, tmp_path: Path) -> None:
    hub.breaks = 1
    assert child(hub, tmp_path)["sha256"] == hub.sha256
    assert len(hub.fetched()) == 2


def test_a_corrupted_download_is_thrown_away(hub: FakeHub, tmp_path: Path) -> None:
    hub.served = hub.content[:-1] + bytes([hub.content[-1] ^ 1])
    got = child(hub, tmp_path)
    assert got["exit_code"] == 1 and "the download is damaged" in got["error"] and "Pull it again" in got["error"]
    assert not [file for file in (tmp_path / "hf").rglob("*") if file.is_file() and file.stat().st_size > 1000]
    hub.served = None
    assert child(hub, tmp_path)["sha256"] == hub.sha256


def test_a_gated_repository_wants_licence_and_token(hub: FakeHub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    got = child(hub, tmp_path)
    assert got["exit_code"] == 2 and "accepted its licence" in got["error"]
    assert f"{hub.url}/{REPO}" in got["error"] and "HF_TOKEN" in got["error"] and "\n" not in got["error"]
    assert child(hub, tmp_path, HF_TOKEN="hf_secret")["sha256"] == hub.sha256
    assert "hf_secret" not in "".join(f.read_text("utf-8") for f in (tmp_path / "gw").rglob("*") if f.is_file())


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "said"),
    [
        (403, "GatedRepo", 2, "accepted its licence"),
        (404, "RepoNotFound", 2, "no such repository"),
        (404, "EntryNotFound", 2, f"the repository has no {FILE}"),
        (401, "", 2, "refused the token"),
        (500, "", 1, "HTTP 500"),
    ],
)
def test_refusals(hub: FakeHub, tmp_path: Path, status: int, code: str, exit_code: int, said: str) -> None:
    hub.status, hub.error_code = status, code
    got = child(hub, tmp_path)
    assert got["exit_code"] == exit_code and said in got["error"] and "\n" not in got["error"]
    assert not list((tmp_path / "gw").rglob("*"))


FULL_DISK = """
import errno
from gemwright.weights import hub
def refuse(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")
hub.http_get = refuse
"""


def test_a_full_disk(hub: FakeHub, tmp_path: Path) -> None:
    got = child(hub, tmp_path, before=FULL_DISK)
    assert got["exit_code"] == 1 and "cannot write: No space left on device" in got["error"]
    small = "import types; from gemwright.weights import hub\n"
    small += "hub.shutil.disk_usage = lambda path: types.SimpleNamespace(free=100)"
    assert "this disk lacks the 0.0 GB" in child(hub, tmp_path, before=small)["error"]


def test_no_network_and_offline(hub: FakeHub, tmp_path: Path) -> None:
    lost = child(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert lost["exit_code"] == 1 and "no connection to http://127.0.0.1:9" in lost["error"]
    offline = child(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline["exit_code"] == 1 and "HF_HUB_OFFLINE is set" in offline["error"]
    assert not hub.asked


def test_takes_the_local_copy_without_network(hub: FakeHub, tmp_path: Path) -> None:
    child(hub, tmp_path)
    got = child(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert got["sha256"] == hub.sha256 and any("taking the copy that is here" in line for line in got["lines"])
