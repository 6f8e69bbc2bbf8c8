"""What the installed llama.cpp and PyTorch can compute on, without loading either into this process."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PATIENCE_S = 20.0


@dataclass(frozen=True)
class LlamaBuild:
    """The `xllamacpp` that is installed; `gpus` are the devices that it offloads to, None where it does not start."""

    version: str | None
    gpus: tuple[str, ...] | None
    why: str | None = None


@dataclass(frozen=True)
class TorchBuild:
    """The PyTorch that is installed; `cuda` and `hip` are the versions that it was built for."""

    version: str
    cuda: str | None = None
    hip: str | None = None


class AskLlama:
    """Asks a child process, begun at once and awaited in `answer`: a broken driver can kill it, not us."""

    _child: subprocess.Popen[bytes] | None
    _why = ""

    def __init__(self) -> None:
        words = [sys.executable, "-m", "gemwright.engines.backends"]
        pipe = subprocess.PIPE
        try:
            self._child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
        except OSError as error:
            self._child, self._why = None, f"no process could be started ({error.strerror or error})"

    def answer(self) -> LlamaBuild:
        """What it said."""
        child = self._child
        if child is None:
            return LlamaBuild(None, None, self._why)
        try:
            said, complaint = child.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return LlamaBuild(None, None, "it did not answer")
        return read_answer(said.decode("utf-8", "replace"), complaint.decode("utf-8", "replace"), child.returncode)


def read_answer(said: str, complaint: str, code: int) -> LlamaBuild:
    """The child's last line, or why there is none."""
    try:
        row = json.loads(said.splitlines()[-1])
        return LlamaBuild(str(row["version"]), tuple(map(str, row["gpus"])))
    except (ValueError, KeyError, IndexError, TypeError):
        last = " ".join(complaint.strip().splitlines()[-1:])
        return LlamaBuild(None, None, last[:160] or f"it ended with {code}")


def torch_build() -> TorchBuild | None:
    """Read from PyTorch's own `version.py`, since importing it takes seconds; None where it is not installed."""
    try:
        found = importlib.util.find_spec("torch")
        if found is None or found.origin is None:
            return None
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError):
        return None
    said = {name: value for name, value in re.findall(r"^(\w+)[^=\n]*= '([^']*)'", text, re.M)}
    return TorchBuild(said.get("__version__", "unknown"), said.get("cuda"), said.get("hip"))


def _main() -> None:
    import xllamacpp

    kinds = ("GPU", "IGPU")
    devices = [d for d in xllamacpp.get_device_info() if d["type"].name.rpartition("_")[2] in kinds]
    named = [f"{device['name']} ({device['description']})" for device in devices]
    print(json.dumps({"version": xllamacpp.__version__, "gpus": named}))


if __name__ == "__main__":
    _main()
