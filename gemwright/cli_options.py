"""What the command line's verbs share: options that mean the same everywhere, and how an answer is given."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

ModelName = Annotated[str, typer.Option("--model", "-m", help="270m, a GGUF file or a safetensors folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def give(result: dict[str, Any], as_json: bool, text: str) -> None:
    """A verb's answer on stdout: `result` as one JSON object, or `text`."""
    print(json.dumps(result, ensure_ascii=False) if as_json else text, flush=True)


def has_colour() -> bool:
    """Whether stdout is a terminal that may be written to in colour."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
