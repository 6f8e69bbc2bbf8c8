"""Files that are never half-written, and the folder that holds one run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from gemwright.errors import GemwrightError, InputError, MachineError
from gemwright.report import say


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
            _sync(file) if file.is_file() else _sync_folder(file)
        if temporary.is_dir():
            _sync_folder(temporary)
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


class Lines:
    """A file of JSON lines that grows by whole lines; what the disk refuses waits and is tried again with the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def add(self, row: dict[str, Any]) -> None:
        """Append `row`; says aloud, once, where the disk refuses, and keeps it until there is room."""
        self._waiting.append(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                say(f"{self.path}: cannot write: {error.strerror or error}; going on, the rows wait for room")

    def flush(self) -> None:
        """Write what waits; MachineError where the disk still refuses."""
        try:
            self._write()
        except OSError as error:
            raise MachineError(
                f"cannot write: {error.strerror or error}", where=self.path, fix="Free some space."
            ) from error

    def sync(self) -> None:
        """Make the rows that are written durable; may be called from another thread."""
        if self.path.is_file():
            _sync(self.path)

    def rows(self) -> list[dict[str, Any]]:
        """All rows on disk; a line that is cut short or damaged is left out."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_bytes().split(b"\n"):
            with suppress(ValueError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def trim(self, step: int) -> None:
        """Drop the rows after `step`."""
        if self.path.is_file():
            kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows() if row.get("step", 0) <= step]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")

    def _write(self) -> None:
        data = "".join(self._waiting).encode()
        if not data:
            return
        with self.path.open("ab", buffering=0) as handle:
            start = handle.seek(0, os.SEEK_END)
            try:
                if handle.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                handle.truncate(start)
                raise
        self._waiting.clear()


class RunFolder:
    """One run on disk: config, metrics, evaluations, checkpoints, the adapter, a summary (layout: docs/runs.md).

    A new run refuses a folder that already holds something, so that nothing older is lost. Whoever writes holds `lock`,
    which the system takes back from a process that died.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / "lock")
        self.metrics_log, self.evaluations_log = Lines(path / "metrics.jsonl"), Lines(path / "evaluations.jsonl")

    @staticmethod
    def check_new(path: Path) -> None:
        """InputError where `path` is a file or a folder in use; what a start that was cut off left does not count."""
        if path.is_file() or (path.is_dir() and any(not _left_by_a_start(file.name) for file in path.iterdir())):
            raise InputError("output folder is in use", where=path, fix="Choose another --out, or remove it first.")

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Claim `path` for a new run and write its config.

        Raises InputError where the path is a file or a folder in use, MachineError where it cannot be made.
        """
        cls.check_new(path)
        is_new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(
                f"cannot make the folder: {error.strerror or error}", where=path, fix="Choose another --out."
            ) from error
        folder = cls(path)
        folder.claim()
        try:
            cls.check_new(path)  # another may have come and gone before the claim
            write_json(folder.path / "config.json", config)
        except GemwrightError:
            folder.release()
            if is_new and not folder.has_config():
                shutil.rmtree(path, ignore_errors=True)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run; InputError where `path` is not one."""
        folder = cls(path)
        if not folder.has_config():
            raise InputError(
                "not a run folder (no config.json)", where=path, fix="Give the --out of a 'gemwright tune'."
            )
        return folder

    def claim(self) -> None:
        """Become the one process that writes here, until `release` or this process's end.

        Raises InputError where another is, MachineError where the folder cannot be written.
        """
        try:
            self._lock.acquire(timeout=0.5)  # as somebody may just be looking whether it is held
        except Timeout:
            raise InputError(
                f"another run is at work here{self._holder()}", where=self.path, fix="Wait for its end, or stop it."
            ) from None
        except (OSError, NotImplementedError) as error:
            what = f"cannot be written: {getattr(error, 'strerror', None) or error}"
            raise MachineError(what, where=self.path, fix="Make it writable, or choose another folder.") from error
        with suppress(OSError):  # Windows lets nobody write what is locked
            (self.path / "lock").write_text(f"{os.getpid()}\n", encoding="utf-8")

    def release(self) -> None:
        """Let others write here."""
        self._lock.release()

    def is_at_work(self) -> bool:
        """Whether a process holds this run now."""
        if self._lock.is_locked:
            return True
        if not (self.path / "lock").exists():
            return False
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return True
        except (OSError, NotImplementedError):  # a medium that nobody writes, so nobody works here
            return False
        self._lock.release()
        return False

    def _holder(self) -> str:
        try:
            return f" (process {int((self.path / 'lock').read_text(encoding='utf-8'))})"
        except (OSError, ValueError):
            return ""

    def has_config(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "config.json").is_file()

    @property
    def adapter(self) -> Path:
        """The PEFT adapter folder."""
        return self.path / "adapter"

    @property
    def adapter_gguf(self) -> Path:
        """The adapter as a GGUF LoRA, for llama.cpp."""
        return self.path / "adapter.gguf"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def plot(self) -> Path:
        """Loss, speed, learning rate and memory over the steps."""
        return self.path / "plot.png"

    def config(self) -> dict[str, Any]:
        """What the run was started with; InputError where the file is damaged."""
        return _object(self.path / "config.json")

    def amend(self, known: dict[str, Any]) -> None:
        """Add to `config.json` what was not known at the start; a whole section is extended, not replaced."""
        config = self.config()
        for key, value in known.items():
            config[key] = (
                config[key] | value if isinstance(value, dict) and isinstance(config.get(key), dict) else value
            )
        write_json(self.path / "config.json", config)

    def summary(self) -> dict[str, Any] | None:
        """How the run ended (`state` is done, stopped or failed), or None while it has not, or was cut off."""
        file = self.path / "summary.json"
        return _object(file) if file.is_file() else None

    def end(self, summary: dict[str, Any]) -> None:
        """Write how the run ended."""
        write_json(self.path / "summary.json", summary)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; see `Lines.add`."""
        self.metrics_log.add(row)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of `metrics.jsonl`; a line cut short by a crash is left out."""
        return self.metrics_log.rows()

    def evaluations(self) -> list[dict[str, Any]]:
        """All rows of `evaluations.jsonl`."""
        return self.evaluations_log.rows()

    def flush(self) -> None:
        """Write the rows that wait for room; MachineError where the disk still refuses."""
        self.metrics_log.flush()
        self.evaluations_log.flush()

    def sync(self) -> None:
        """Make the rows that are written durable; may be called from another thread."""
        self.metrics_log.sync()
        self.evaluations_log.sync()

    def go_back_to(self, step: int) -> None:
        """Make ready to go on after `step`: remove what writes that were cut off left, later rows, and the summary."""
        try:
            for part in [*self.path.glob(".*.part"), *self.checkpoints.glob(".*.part")]:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            (self.path / "summary.json").unlink(missing_ok=True)
        except OSError as error:
            raise MachineError(f"cannot be removed: {error.strerror or error}", where=error.filename) from error
        for log in (self.metrics_log, self.evaluations_log, Lines(self.path / "samples.jsonl")):
            log.trim(step)


def _left_by_a_start(name: str) -> bool:
    """Whether a start that was cut off before its `config.json` may have left a file of this name."""
    return name == "lock" or (name.startswith(".config.json.") and name.endswith(".part"))


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MachineError(f"cannot be read: {error.strerror or error}", where=file) from error
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError("is damaged: not a JSON object", where=file, fix="Restore it from a copy.")
    return value
