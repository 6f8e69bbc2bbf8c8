"""The bare engine that `run_cpu.py` measures against: xllamacpp's server in a process that imports nothing else."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main(model: str, threads: int) -> None:
    """The engine alone: answers lines of {"prompt", "n_predict"} with its times, without gemwright."""
    begin = time.perf_counter()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = model, 4096, 1, 2
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.fit_params, params.cache_ram_mib, params.swa_full = False, False, 0, True
    server = xllamacpp.Server(params)
    loaded = time.perf_counter() - begin
    for line in sys.stdin:
        first, last = 0.0, 0.0
        count = 0

        def hear(event: dict[str, Any]) -> bool:
            nonlocal first, last, count
            last = time.perf_counter()
            if event["choices"][0]["text"]:
                first = first or last
            if "timings" in event:
                count = event["timings"]["predicted_n"]
            return False

        start = time.perf_counter()
        server.handle_completions(json.loads(line) | {"temperature": 0, "stream": True}, hear)
        row = {"first_token_s": first - start, "tokens_per_s": (count - 1) / max(last - first, 1e-9), "load_s": loaded}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
