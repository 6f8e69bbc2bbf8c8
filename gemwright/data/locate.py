"""Which files a data name means: a file, a folder's files in order, or a data set of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gemwright.data.codes import DataFault
from gemwright.data.records import COMPRESSED, SUFFIXES, bare_suffix

# What stands beside data: by `datasets` and the Hub, and by people.
_ABOUT: Final = re.compile(
    r"(dataset_infos?|dataset_dict|state|config)\.json|(readme|licen[sc]e|notice|copying|changelog|requirements)\b.*",
    re.I,
)
_TRAIN: Final = re.compile(r"(^|[/_.-])train(ing)?([/_.-]|$)", re.I)
_HELD_OUT: Final = re.compile(r"(^|[/_.-])(test|validation|valid|val|dev|eval)([/_.-]|$)", re.I)
_HUB_NAME: Final = re.compile(r"(hf:)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GIVE: Final = "Give a data file, or a folder of them."


@dataclass(frozen=True)
class Located:
    """The files to read, in order, and those of the folder that are not (each with why)."""

    files: tuple[Path, ...]
    skipped: tuple[tuple[Path, str], ...] = ()


def locate(name: Path, report: Callable[[str], None] = lambda line: None) -> Located:
    """The files of `name`; a folder's in the order of their names, without held-out splits beside a training split.

    Raises DataFault where nothing is there, MachineError where the Hub cannot be reached; `report` hears of downloads.
    """
    if name.is_dir():
        return in_folder(name)
    asked = name.as_posix()
    if name.exists():
        return Located((name,))
    if not _HUB_NAME.fullmatch(asked) or is_data(name):
        raise DataFault("D002", "no such file", where=name, fix="Check the path of the data.")
    from gemwright.data.hub import snapshot

    return in_folder(snapshot(asked.removeprefix("hf:"), report))


def is_data(path: Path) -> bool:
    """Whether a file's name is that of a data file."""
    return bare_suffix(path) in SUFFIXES and not _ABOUT.fullmatch(path.name)


def in_folder(folder: Path) -> Located:
    """The data files of a folder and those below it; hidden ones are left alone."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.as_posix())
    inner = {file: file.relative_to(folder).as_posix() for file in files}
    shown = [file for file in files if not any(part.startswith(".") for part in inner[file].split("/"))]
    data = [file for file in shown if is_data(file)]
    skipped = [(file, "no data file by its name") for file in shown if file not in set(data)]
    training = [file for file in data if _TRAIN.search(inner[file])]
    if training and any(_HELD_OUT.search(inner[file]) for file in data):
        skipped += [(file, "beside a training split") for file in data if file not in set(training)]
        data = training
    if not data:
        what = "is a folder with no data file in it"
        raise DataFault("D001", what, where=folder, fix=f"{_GIVE} Known: {', '.join((*SUFFIXES, *COMPRESSED))}.")
    return Located(tuple(data), tuple(skipped))
