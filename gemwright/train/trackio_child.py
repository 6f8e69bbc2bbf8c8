"""trackio's process: takes a run's rows from stdin, one JSON object a line, and keeps them in trackio's local store."""

from __future__ import annotations

import json
import signal
import sys


def main() -> None:
    """Until stdin ends. The first line names project, run and config; the others are a step and its metrics."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training's to hear; this ends with its stdin
    import trackio

    begun = json.loads(sys.stdin.readline())
    run = trackio.init(
        begun["project"],
        name=begun["name"],
        config=begun["config"],
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for line in sys.stdin:
        message = json.loads(line)
        run.log({name: value for name, value in message["metrics"].items() if value is not None}, step=message["step"])
    trackio.finish()


if __name__ == "__main__":
    main()
