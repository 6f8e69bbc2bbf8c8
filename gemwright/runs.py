"""Files that are never half-written, and the folder that holds one run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs

from gemwright.errors import GemwrightError, InputError, MachineError


def home() -> Path:
    """Where gemwright keeps what it fetched: GEMWRIGHT_HOME, or the user's cache folder."""
    return Path(os.environ.get("GEMWRIGHT_HOME") or platformdirs.user_cache_dir("gemwright", appauthor=False))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success sync it and rename it over `path`, on failure remove it.

    Works for a file or a folder written by the caller. Raises MachineError where the disk refuses (full, read-only).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            if file.is_file():
                _sync(file)
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise MachineError(
            f"cannot write: {error.strerror or error}", where=path, fix="Free some space or choose another folder."
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _sync(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and does this with the rename itself."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


class RunFolder:
    """One run on disk: `config.json`, `metrics.jsonl`, `loss.png`, `adapter/`, `adapter.gguf`, `summary.json`.

    A new run refuses a folder that already holds something, so that nothing older is lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def check_new(path: Path) -> None:
        """InputError where `path` is a file or a folder in use."""
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise InputError("output folder is in use", where=path, fix="Choose another --out, or remove it first.")

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Claim `path` for a new run and write its config.

        Raises InputError where the path is a file or a folder in use, MachineError where it cannot be made.
        """
        cls.check_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "lock").open("x", encoding="utf-8").close()
        except FileExistsError:
            raise InputError("another run has just started here", where=path, fix="Choose another --out.") from None
        except OSError as error:
            raise MachineError(
                f"cannot make the folder: {error.strerror or error}", where=path, fix="Choose another --out."
            ) from error
        folder = cls(path)
        try:
            write_json(folder.path / "config.json", config)
        except GemwrightError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run; InputError where `path` is not one."""
        if not (path / "config.json").is_file():
            raise InputError(
                "not a run folder (no config.json)", where=path, fix="Give the --out of a 'gemwright tune'."
            )
        return cls(path)

    @property
    def adapter(self) -> Path:
        """The PEFT adapter folder."""
        return self.path / "adapter"

    @property
    def adapter_gguf(self) -> Path:
        """The adapter as a GGUF LoRA, for llama.cpp."""
        return self.path / "adapter.gguf"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    def config(self) -> dict[str, Any]:
        """What the run was started with."""
        value: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return value

    def amend(self, known: dict[str, Any]) -> None:
        """Add to `config.json` what was not known at the start; a whole section is extended, not replaced."""
        config = self.config()
        for key, value in known.items():
            config[key] = (
                config[key] | value if isinstance(value, dict) and isinstance(config.get(key), dict) else value
            )
        write_json(self.path / "config.json", config)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to `metrics.jsonl`, whole or not at all for a reader that goes by lines."""
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise MachineError(
                f"cannot write metrics: {error.strerror or error}", where=self.path, fix="Free some space."
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of `metrics.jsonl`; a last line cut short by a crash is left out."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def release(self) -> None:
        """Drop the claim that `create` made."""
        (self.path / "lock").unlink(missing_ok=True)
