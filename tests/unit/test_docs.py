"""The documents say what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/index.md", "docs/cli.md", "docs/data.md", "docs/runs.md")


def test_cli_page_is_what_the_program_prints() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "write_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_readme_names_only_verbs_that_exist() -> None:
    from gemwright.cli import app

    verbs = {command.callback.__name__ for command in app.registered_commands if command.callback}
    verbs |= {group.name for group in app.registered_groups if group.name}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = set(re.findall(r"^\s*(?:\$ )?gemwright ([a-z]+)(?![a-z-])", text, re.M))
    assert said and said <= verbs


def test_every_dependency_is_pinned() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    normal = {re.split(r"[<>=!\[; ]", name)[0].lower().replace("_", "-") for name in asked}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert normal <= {name.lower().replace("_", "-") for name in pinned}
