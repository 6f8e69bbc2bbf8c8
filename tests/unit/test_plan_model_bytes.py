"""A model weighed by its header: on disk, over HTTP range requests, damaged."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemwright.errors import GemwrightError, InputError, MachineError
from gemwright.plan.model_bytes import HttpSource, matrix_bytes, published, weigh
from gemwright.spec import SPECS
from gemwright.weights.gguf_reader import open_gguf
from gemwright.weights.quants import PACKABLE, QTYPES, row_bytes
from gemwright.weights.random_model import write_random_gguf

SMALL = dataclasses.replace(
    SPECS["4b"], name="small", layers=7, hidden=256, mlp=512, heads=4, kv_heads=2, head_dim=32, vocab=515
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m") / "small.gguf"
    write_random_gguf(path, SMALL, "Q4_K")
    return path


def test_the_real_file_is_weighed_to_the_byte(real_model: Path) -> None:
    weighed, opened = weigh(real_model), open_gguf(real_model)
    assert weighed.total == real_model.stat().st_size and weighed.spec == SPECS["270m"]
    assert sum(weighed.by_type.values()) == sum(t.data.numel() for t in opened.tensors.values())
    assert weighed.embed == opened.tensors["token_embd.weight"].data.numel() and weighed.embed_type == "Q8_0"
    for i, size in enumerate(weighed.layers):
        assert size == sum(t.data.numel() for n, t in opened.tensors.items() if n.startswith(f"blk.{i}."))


@pytest.mark.parametrize("kind", [k for k in QTYPES if k not in ("Q4_K", "Q5_K", "Q6_K")])
def test_matrices_weigh_what_they_pack_to(kind: str) -> None:
    assert matrix_bytes(7, 512, kind) == 7 * row_bytes(512, kind)
    assert kind in PACKABLE or kind.startswith("Q")


def test_columns_that_fill_no_large_block_fall_back() -> None:
    assert matrix_bytes(3, 640, "Q4_K") == matrix_bytes(3, 640, "Q5_0")
    assert matrix_bytes(3, 512, "Q6_K") == 3 * 2 * 210


def test_published_files_weigh_what_their_publisher_says() -> None:
    """Sizes of the files on the Hub, in GB: 1.00, 3.16, 8.07, 17.2 (QAT Q4_0)."""
    for name, gigabytes in {"1b": 1.00, "4b": 3.16, "12b": 8.07, "27b": 17.2}.items():
        assert published(name).total / 1e9 == pytest.approx(gigabytes, rel=0.01)
        assert published(f"{name}-it").total == published(name).total < published(f"{name}-pt").total
    with pytest.raises(InputError, match="Known: 270m, 1b"):
        published("7b")


class Ranges(BaseHTTPRequestHandler):
    body = b""
    whole = False

    def do_GET(self) -> None:
        found = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert found is not None
        start, end = int(found[1]), min(int(found[2]), len(self.body) - 1)
        if start >= len(self.body):
            self.send_error(416)
            return
        piece = self.body if self.whole else self.body[start : end + 1]
        self.send_response(200 if self.whole else 206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(self.body)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[tuple[type[Ranges], str]]:
    handler = type("Own", (Ranges,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield handler, f"http://127.0.0.1:{http.server_address[1]}/model.gguf"
        http.shutdown()
        thread.join()


def test_a_model_is_weighed_before_it_is_downloaded(
    real_model: Path, server: tuple[type[Ranges], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = server
    handler.body = real_model.read_bytes()
    fetched: list[int] = []
    whole = HttpSource._fetch
    monkeypatch.setattr(HttpSource, "_fetch", lambda self, size: fetched.append(size) or whole(self, size))
    assert weigh(url) == weigh(real_model)
    assert sum(fetched) < 20_000_000 < len(handler.body)


def test_a_server_without_ranges_or_out_of_reach_is_an_error(small: Path, server: tuple[type[Ranges], str]) -> None:
    handler, url = server
    handler.body, handler.whole = small.read_bytes(), True
    with pytest.raises(MachineError, match="no parts of files"):
        weigh(url)
    with pytest.raises(MachineError, match="cannot be reached"):
        weigh("http://127.0.0.1:9/model.gguf")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 3000), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 3000))
def test_a_damaged_header_is_weighed_or_refused_in_one_line(
    small: Path, tmp_path: Path, at: int, byte: int, cut: int | None
) -> None:
    data = bytearray(small.read_bytes()[:200_000])
    data[at] = byte
    path = tmp_path / "damaged.gguf"
    path.write_bytes(bytes(data[:cut]))
    try:
        weigh(path)
    except GemwrightError as error:
        assert "\n" not in str(error) and error.exit_code == 2


def test_no_torch_and_no_numpy_are_needed() -> None:
    code = "import sys, gemwright.plan.ask; print([m for m in ('torch', 'numpy', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
