"""The child process that holds llama.cpp: JSON lines in on stdin, JSON lines out on stdout, ends with its parent.

First line in: the load order. Then requests, each with an "id"; answers carry the same id. Imports stay few, because
every one delays the first token, and are made before the order comes. Nothing here listens on a network port where the
system has Unix sockets.
"""

import contextlib
import json
import os
import socket
import sys
import threading
from typing import Any, BinaryIO

Message = dict[str, Any]


class Door:
    """The address llama.cpp's server insists on: a Unix socket in a private folder, else loopback with a random key.

    Only /tokenize goes through it; everything else is called in the process.
    """

    def __init__(self) -> None:
        self.key = os.urandom(32).hex()
        self.folder = private_folder() if hasattr(socket, "AF_UNIX") else None
        path = os.path.join(self.folder, "s.sock") if self.folder else ""
        self.host = path if path and len(path) < 100 else "127.0.0.1"

    def connect(self, listening: str) -> socket.socket:
        if self.host != "127.0.0.1":
            door = socket.socket(socket.AF_UNIX)
            door.connect(self.host)
            return door
        return socket.create_connection(("127.0.0.1", int(listening.rsplit(":", 1)[1])))

    def post(self, listening: str, path: str, body: Message) -> Any:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with self.connect(listening) as door:
            door.sendall(head.encode() + data)
            parts = []
            while part := door.recv(1 << 16):
                parts.append(part)
        return json.loads(b"".join(parts).partition(b"\r\n\r\n")[2])

    def close(self) -> None:
        if self.folder:
            with contextlib.suppress(OSError):
                os.unlink(self.host)
            with contextlib.suppress(OSError):
                os.rmdir(self.folder)


def private_folder() -> str | None:
    """A new folder that only this user may enter; `tempfile` would take five milliseconds to import."""
    for place in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp"):
        path = os.path.join(place or "/tmp", f"gemwright-{os.urandom(8).hex()}")
        with contextlib.suppress(OSError):
            os.mkdir(path, 0o700)
            return path
    return None


def load(xllamacpp: Any, order: Message, door: Door) -> Any:
    """The llama.cpp server for `order`; it raises RuntimeError where llama.cpp refuses."""
    params = xllamacpp.CommonParams()
    params.model.path = order["model"]
    params.n_parallel = order["parallel"]
    params.n_ctx = order["context"] * order["parallel"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order["threads"]
    params.swa_full = order["whole_cache"]
    params.hostnames, params.port, params.api_keys = [door.host], 0, [door.key]
    params.n_threads_http, params.ui, params.endpoint_slots, params.cors_origins = 1, False, False, "null"
    params.warmup, params.fit_params, params.cache_ram_mib, params.verbosity = False, False, 0, 2
    if order["adapters"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in order["adapters"]]
    return xllamacpp.Server(params)


class Child:
    """Answers requests over one loaded server; `parallel` of them run side by side."""

    def __init__(self, server: Any, door: Door, out: BinaryIO, parallel: int, eos: int) -> None:
        self.server, self.door, self.out, self.parallel, self.eos = server, door, out, parallel, eos
        self.writing = threading.Lock()
        self.slots = threading.Semaphore(parallel)
        self.cancelled: set[int] = set()

    def say(self, message: Message) -> None:
        with self.writing:
            self.out.write(json.dumps(message).encode() + b"\n")
            self.out.flush()

    def start(self, request: Message) -> None:
        """Begin a request; it answers by itself."""
        if request["op"] == "cancel":
            self.cancelled.add(request["id"])
            return
        work = {"generate": self.generate, "score": self.score, "encode": self.encode}[request["op"]]
        threading.Thread(target=self.guard, args=(work, request), daemon=True).start()

    def guard(self, work: Any, request: Message) -> None:
        try:
            work(request)
        except Exception as error:
            self.say({"id": request["id"], "error": f"{type(error).__name__}: {error}"})
        self.cancelled.discard(request["id"])

    def encode(self, request: Message) -> None:
        body = {"content": request["text"], "add_special": False, "parse_special": False}
        answer = self.door.post(self.server.listening_address, "/tokenize", body)
        self.say(
            {"id": request["id"], **({"done": {}, "ids": answer["tokens"]} if "tokens" in answer else refusal(answer))}
        )

    def generate(self, request: Message) -> None:
        number, quiet = request["id"], request["quiet"]
        last: Message = {}
        pieces: list[str] = []

        def hear(event: Message) -> bool:
            if "choices" not in event:
                last.update(refusal(event))
                return True
            choice = event["choices"][0]
            if piece := choice["text"]:
                pieces.append(piece) if quiet else self.say({"id": number, "text": piece})
            if reason := choice["finish_reason"]:
                times = event["timings"]
                last.update(reason=reason, tokens=times["predicted_n"])
                last.update(prompt_s=times["prompt_ms"] / 1e3, decode_s=times["predicted_ms"] / 1e3)
            return number in self.cancelled

        with self.slots:
            if number not in self.cancelled:
                self.server.handle_completions(request["body"] | {"stream": True}, hear)
        last = last or {"reason": "cancelled"}
        self.say({"id": number} | (last if "error" in last else {"done": last, "all": "".join(pieces)}))

    def score(self, request: Message) -> None:
        """Log-probabilities of ids[start:], shared over the slots in runs of neighbours so that prefixes stay cached.

        The server gives none for a prompt, so each next token is forced by a bias and its unbiased one read off.
        """
        number, ids, start = request["id"], request["ids"], request["start"]
        each = max(1, -(-(len(ids) - start) // self.parallel))
        runs = [range(at, min(at + each, len(ids))) for at in range(start, len(ids), each)]
        threads = [threading.Thread(target=self.guard_run, args=(request, slot, run)) for slot, run in enumerate(runs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.say({"id": number, "done": {"reason": "cancelled" if number in self.cancelled else "stop"}})

    def guard_run(self, request: Message, slot: int, run: range) -> None:
        try:
            self.score_run(request, slot, run)
        except Exception as error:
            self.say({"id": request["id"], "error": f"{type(error).__name__}: {error}"})

    def score_run(self, request: Message, slot: int, run: range) -> None:
        number, ids = request["id"], request["ids"]
        body = request["body"] | {"n_predict": 1, "temperature": 0, "id_slot": slot}
        for at in run:
            if number in self.cancelled:
                return
            found = self.forced(body | {"prompt": ids[:at]}, ids[at])
            self.say({"id": number} | (found if "error" in found else found | {"at": at}))
            if "error" in found:
                return

    def forced(self, ask: Message, token: int) -> Message:
        """The unbiased `logprob` of `token` after the prompt of `ask`, or an `error`."""
        answer = self.server.handle_completions(ask | {"logit_bias": [[token, 1e6]], "n_probs": 1})
        if "choices" not in answer:
            return refusal(answer)
        probabilities = answer["choices"][0]["logprobs"]
        if probabilities is None:
            return self.listed(ask, token)
        own = probabilities["content"][0]
        return {"logprob": own["logprob"]} if own["id"] == token else {"error": f"token {token} could not be forced"}

    def listed(self, ask: Message, token: int) -> Message:
        """As `forced`, among the likeliest: the server gives no probabilities of a byte that is part of a character."""
        for count in (1000, 1 << 19):  # the whole vocabulary takes seconds, and is hardly ever needed
            answer = self.server.handle_completions(ask | {"logit_bias": [[self.eos, 1e6]], "n_probs": count})
            if "choices" not in answer:
                return refusal(answer)
            for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                if one["id"] == token:
                    return {"logprob": one["logprob"]}
        return {"error": f"token {token} has no probability"}


def refusal(answer: Message) -> Message:
    """The error of an answer that is not one."""
    error = answer.get("error", answer)
    return {"error": str(error.get("message", error) if isinstance(error, dict) else error)}


def main() -> None:
    """Serve the parent until it closes our stdin."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines = sys.stdin.buffer
    door = Door()
    try:
        import xllamacpp

        order = json.loads(lines.readline() or b"null")
        if order is not None:
            server = load(xllamacpp, order, door)
            child = Child(server, door, out, order["parallel"], order["eos"])
            child.say({"id": 0, "ready": True})
            for line in lines:
                child.start(json.loads(line))
    except Exception as error:
        kind = "import" if isinstance(error, ImportError) else "load"
        out.write(json.dumps({"id": 0, "error": str(error), "kind": kind}).encode() + b"\n")
        out.flush()
    finally:
        door.close()
    os._exit(0)


if __name__ == "__main__":
    main()
