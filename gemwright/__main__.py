"""The process around the command line: streams in UTF-8, every error one line, every ending an exit code.

Nothing heavy is imported before `run` and `chat` have started llama.cpp's process, so that both import side by side.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 failed, 2 wrong usage or bad input, 3 does not fit, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job's stays ignored
        signal.signal(signal.SIGINT, _hear)
        sys.unraisablehook = _unraisable
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=None if stream is sys.stdin else "backslashreplace")
    words = [word for word in words if word != "--debug"] or ["--help"]
    sys.exit(_run(words, debug))


def _hear(number: int, frame: FrameType | None) -> None:
    """Ctrl-C, but not in the middle of an import, where PyTorch and Python itself swallow it: then after that."""
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            _hear_again()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _hear_again() -> None:
    again = threading.Timer(0.01, _interrupt, [threading.get_ident()])  # the main thread's: no other is interrupted
    again.daemon = True
    again.start()


def _interrupt(thread: int) -> None:
    """Ctrl-C for a thread, wherever that waits."""
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:
        signal.pthread_kill(thread, signal.SIGINT)


def _unraisable(ignored: sys.UnraisableHookArgs) -> None:
    """Where others call back and drop what is raised, a Ctrl-C comes again."""
    if ignored.exc_type is KeyboardInterrupt:
        _hear_again()
    else:
        sys.__unraisablehook__(ignored)


def _run(words: list[str], debug: bool) -> int:
    """The exit code of one verb; whatever it raises ends as one line on stderr (after its traceback with --debug)."""
    try:
        code = _engine_ahead(words) if _wants_llamacpp(words) else _verb(words)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            _say("interrupted")
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        _say("interrupted")
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
        _say(line)
        return code


def _wants_llamacpp(words: list[str]) -> bool:
    return words[0] in ("run", "chat") and not any(word in ("-h", "--help") or "pytorch" in word for word in words)


def _engine_ahead(words: list[str]) -> object:
    """`_verb` with llama.cpp's process started before anything is imported, and loading before the words are read."""
    from gemwright.engines.spawn import end_spare, spawn_ahead

    spawn_ahead("gemwright.engines.llamacpp_child")
    from gemwright.engines.open import close_ahead, open_ahead

    try:
        open_ahead(words)
        return _verb(words)
    finally:
        close_ahead()
        end_spare()


def _verb(words: list[str]) -> object:
    import typer

    from gemwright.cli import app

    try:
        return typer.main.get_command(app).main(words, prog_name="gemwright", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None


def _say(line: str) -> None:
    from gemwright.report import say

    say(line)


def _explain(error: Exception) -> tuple[int, str]:
    from gemwright.errors import GemwrightError

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
