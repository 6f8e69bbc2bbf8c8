"""A child that is killed, refuses, crashes or loses its parent: one clear error, no hang, nothing left running."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from gemwright.engines.child_process import ChildError, ChildProcess
from gemwright.engines.llamacpp import LlamaCpp
from gemwright.engines.open import open_engine
from gemwright.engines.protocol import Sampling
from gemwright.errors import InputError, MachineError

LONG = Sampling(max_tokens=2000, temperature=0)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with pytest.raises(InputError, match="no such file"):
        open_engine(file)
    file.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(InputError, match="not a GGUF"):
        open_engine(file)
    file.write_bytes(b"GGUF\x03\x00\x00\x00\xff")
    with pytest.raises(InputError, match="damaged or cut short"):
        open_engine(file)
    with pytest.raises(InputError, match="folder"):
        open_engine(tmp_path)


def test_a_truncated_model_is_refused_with_the_engines_own_words(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    whole = tiny_model.read_bytes()
    file.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(InputError, match=r"llama.cpp cannot load it \(.+\)") as caught:
        open_engine(file)
    assert "\n" not in str(caught.value) and "cut.gguf" in str(caught.value)


@pytest.mark.parametrize("where", [5_000, 400_000, 3_000_000])
def test_a_bit_flipped_model_ends_in_an_error_or_loads(tiny_model: Path, tmp_path: Path, where: int) -> None:
    file = tmp_path / "flipped.gguf"
    data = bytearray(tiny_model.read_bytes())
    data[where : where + 64] = bytes(255 - byte for byte in data[where : where + 64])
    file.write_bytes(data)
    try:
        with open_engine(file) as engine:
            engine.generate([2, 818], Sampling(max_tokens=2, temperature=0))
    except (InputError, MachineError) as error:
        assert "\n" not in str(error)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    file = tmp_path / "llama.gguf"
    writer = GGUFWriter(file, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="'llama', not 'gemma3'"):
        open_engine(file)


def test_a_child_killed_while_it_answers(tiny_model: Path) -> None:
    with LlamaCpp(tiny_model) as engine:
        victim = psutil.Process(engine._child.pid)
        with pytest.raises(MachineError, match="failed"):
            engine.generate([2, 818], LONG, lambda text: victim.kill())
        with pytest.raises(MachineError, match="failed"):
            engine.encode("after its death")


def test_a_closed_engine_says_so_and_does_not_hang(tiny_model: Path) -> None:
    engine = LlamaCpp(tiny_model)
    engine.close()
    engine.close()
    with pytest.raises(MachineError):
        engine.encode("x")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", ["SIGSEGV", "SIGABRT"])
def test_a_crash_is_an_error_here(tiny_model: Path, number: str) -> None:
    with LlamaCpp(tiny_model) as engine:
        os.kill(engine._child.pid, getattr(signal, number))
        with pytest.raises(MachineError, match="killed by signal"):
            engine.score([2, 818, 5279])


def test_the_child_ends_with_its_parent(tiny_model: Path) -> None:
    code = (
        "import sys, time, pathlib; from gemwright.engines.llamacpp import LlamaCpp\n"
        "engine = LlamaCpp(pathlib.Path(sys.argv[1])); print(engine._child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, tiny_model], stdout=subprocess.PIPE)
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=60)


def test_close_does_not_wait_for_a_busy_child(tiny_model: Path) -> None:
    engine = LlamaCpp(tiny_model)
    begun, failures = threading.Event(), []

    def work() -> None:
        try:
            engine.generate([2, 818], LONG, lambda text: begun.set())
        except MachineError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    engine.close()
    thread.join(60)
    assert len(failures) == 1


def test_a_child_that_cannot_start_is_told() -> None:
    child = ChildProcess("gemwright.no_such_module")
    with pytest.raises(ChildError, match="No module named"):
        child.wait_loaded()
    child.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_network_port_is_opened(tiny_model: Path) -> None:
    with LlamaCpp(tiny_model) as engine:
        sockets = psutil.Process(engine._child.pid).net_connections("inet")
    assert [connection for connection in sockets if connection.status == psutil.CONN_LISTEN] == []
