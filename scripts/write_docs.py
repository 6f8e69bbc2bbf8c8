"""Write docs/cli.md from the program's own help; `--check` only says whether it is up to date (exit 1 when not)."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD = "# Command line\n\nWritten by `scripts/write_docs.py` from the program's own help; do not edit.\n"


def cli_page() -> str:
    """The help of the program and of every verb, as it is printed 100 columns wide without colour."""
    os.environ.update(NO_COLOR="1", COLUMNS="100", TERMINAL_WIDTH="100", _TYPER_FORCE_DISABLE_TERMINAL="1")
    from typer.main import get_command
    from typer.testing import CliRunner

    from gemwright.cli import app

    runner, parts = CliRunner(), [HEAD]
    verbs = [
        [name, *(f"{name} {inner}" for inner in getattr(verb, "commands", ()))]
        for name, verb in get_command(app).commands.items()
    ]
    for verb in ["", *itertools.chain(*verbs)]:
        shown = runner.invoke(app, [*verb.split(), "--help"], prog_name="gemwright").stdout
        lines = "\n".join(line.rstrip() for line in shown.strip().splitlines())
        parts.append(f"## `{' '.join(['gemwright', *verb.split()])}`\n")
        parts.append(f"```text\n{lines}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write the page, or compare it."""
    page, file = cli_page(), DOCS / "cli.md"
    if "--check" not in sys.argv:
        file.write_text(page, encoding="utf-8")
        return 0
    if file.is_file() and file.read_text(encoding="utf-8") == page:
        return 0
    print("docs/cli.md is not what the program prints; run: python scripts/write_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
