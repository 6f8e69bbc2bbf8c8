"""The process around the command line: streams in UTF-8, every error one line, every ending an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from gemwright.cli import app
from gemwright.errors import GemwrightError
from gemwright.report import say

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 failed, 2 wrong usage or bad input, 3 does not fit, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=None if stream is sys.stdin else "backslashreplace")
    sys.exit(_run([word for word in words if word != "--debug"] or ["--help"], debug))


def _run(words: list[str], debug: bool) -> int:
    """The exit code of one verb; whatever it raises ends as one line on stderr (after its traceback with --debug)."""
    try:
        code = typer.main.get_command(app).main(words, prog_name="gemwright", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            say("interrupted")
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader left: nothing more to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code, line = _explain(error)
        if debug:
            import traceback

            traceback.print_exc()
        say(line)
        return code


def _explain(error: Exception) -> tuple[int, str]:
    if isinstance(error, GemwrightError):
        return error.exit_code, f"error: {error}"
    if hasattr(error, "format_message"):  # typer's own usage errors
        return 2, f"error: {error.format_message().rstrip('.')}. Try 'gemwright --help'."
    if isinstance(error, UnicodeDecodeError):
        return 2, "error: input is not UTF-8. Save it as UTF-8."
    text = " ".join(str(error).split())
    return 1, f"error: {type(error).__name__}: {text}. This is a fault in gemwright; --debug shows where."


if __name__ == "__main__":
    main()
