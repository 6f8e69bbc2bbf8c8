"""Starts the child processes of this package; imports next to nothing, so that it can be a program's first act."""

from __future__ import annotations

import os
import subprocess
import sys

_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_spare: dict[str, subprocess.Popen[bytes]] = {}


def spawn(module: str) -> subprocess.Popen[bytes]:
    """`python -m module` with pipes to all three streams: the one started ahead, else a new one."""
    return _spare.pop(module, None) or _start(module)


def spawn_ahead(module: str) -> None:
    """Start the child that `spawn` will give, so that it imports while its parent still does."""
    _spare[module] = _start(module)


def end_spare() -> None:
    """End what was started ahead and never used."""
    while _spare:
        with _spare.popitem()[1] as child:
            child.kill()


def _start(module: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-X", "utf8", "-m", module]
    # Ctrl-C in the terminal is kept from the child: the parent decides what it stops.
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    return subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=_environment(),
        creationflags=flags,
        start_new_session=os.name != "nt",
    )


def _environment() -> dict[str, str]:
    """Ours, with the package importable and llama.cpp's debugger-on-crash switched off."""
    parts = [_PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(part for part in parts if part)
    return os.environ | {"PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}
