"""Shared fixtures: the real 270M, a tiny random model of the same kind, and an environment that reaches no network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
HOME = Path(os.environ.get("GEMWRIGHT_HOME", ROOT / ".cache" / "gemwright"))

# Set before torch is imported, and inherited by the child processes that tests start.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", GEMWRIGHT_HOME=str(HOME))
os.environ.setdefault("MPLBACKEND", "Agg")
# A shared machine may take any time for an example.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_worker() -> Iterator[None]:
    """Tests run side by side; a torch pool in each would only fight over the cores."""
    import torch

    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The real Gemma 3 270M (GGUF, Q4_K_M) from the package that carries it; assembled once, kept between runs."""
    from gemwright.weights.pull import resolve_model

    HOME.mkdir(parents=True, exist_ok=True)
    with FileLock(HOME / "tests.lock"):
        return resolve_model("270m")


@pytest.fixture(scope="session")
def tiny_model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random seven-layer GGUF (the sixth layer is the first global one) with an eighth of the real vocabulary.

    Reading all of it would be most of what a small run takes.
    """
    import dataclasses

    from gemwright.spec import SPECS
    from gemwright.weights.gguf_reader import Metadata, open_gguf
    from gemwright.weights.random_model import write_random_gguf

    # The first tokens, control tokens and bytes among them, and the commonest characters.
    kept = [*range(28_672), *range(236_740, 240_836)]

    class Eighth(Metadata):
        def __getitem__(self, key: str) -> Any:
            value = super().__getitem__(key)
            if not key.startswith("tokenizer.ggml.") or not hasattr(value, "__len__") or len(value) != 262_144:
                return value
            return [value[i] for i in kept] if isinstance(value, list) else value[kept]

    small = {"layers": 7, "hidden": 64, "mlp": 128, "heads": 2, "kv_heads": 1, "head_dim": 32, "query_scalar": 32}
    spec = dataclasses.replace(SPECS["270m"], name="tiny", vocab=len(kept), **small)
    path, real = tmp_path_factory.mktemp("tiny") / "tiny.gguf", open_gguf(real_model)
    vocabulary = dataclasses.replace(real, metadata=Eighth(real.metadata._file, real.metadata._values))
    write_random_gguf(path, spec, qtype="Q8_0", seed=0, tokenizer_from=vocabulary)
    return path


Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def gemwright() -> Callable[..., Done]:
    """`gemwright(*words, given="", **environment)` runs the command line as a process of its own."""

    def run(*words: object, given: str | bytes = "", **environment: str) -> Done:
        typed = given.encode() if isinstance(given, str) else given
        command = [sys.executable, "-m", "gemwright", *map(str, words)]
        done = subprocess.run(command, input=typed, capture_output=True, env=os.environ | environment, check=False)
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def hear_ctrl_c() -> Callable[[], object]:
    """For `preexec_fn`: whoever runs the tests in the background has them ignore it, and what they start with them."""
    return partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
