"""The parent's side of a child process that talks in JSON lines: its answers, its death, its last words."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from typing import IO, Any

from gemwright.engines.spawn import spawn

Message = dict[str, Any]
Answers = Iterator[Message]
LOADING = 0
_LAST_LINES = 40


class ChildError(Exception):
    """The child refused a request (`kind` says at what), or ended (`kind` "died", `code` its exit status)."""

    def __init__(self, line: str, kind: str, code: int | None = None) -> None:
        super().__init__(line)
        self.line, self.kind, self.code = line, kind, code


class ChildProcess:
    """`python -m module`, idle until its load order; requests run side by side, each with its own stream of answers."""

    def __init__(self, module: str) -> None:
        self._answers: dict[int, queue.SimpleQueue[Message]] = {LOADING: queue.SimpleQueue()}
        self._tail: deque[str] = deque(maxlen=_LAST_LINES)
        self._lock = threading.Lock()
        self._next = 1
        self._ended = False
        self._process = spawn(module)
        assert self._process.stdout and self._process.stderr
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()
        self._reader.start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def begin_to_load(self, order: Message) -> None:
        """Give the load order; once."""
        self._send(order)

    def wait_loaded(self) -> None:
        """Return when the child has loaded; ChildError where it refused or ended."""
        self._get(self._answers[LOADING])

    @contextlib.contextmanager
    def ask(self, *orders: Message) -> Iterator[Answers]:
        """Send `orders` and give the stream of all their answers, each with the `index` of its order.

        Leaving the block early cancels what still runs and waits for its end. ChildError on refusal or death.
        """
        box: queue.SimpleQueue[Message] = queue.SimpleQueue()
        with self._lock:
            first = self._next
            self._next += len(orders)
            self._answers.update(dict.fromkeys(range(first, first + len(orders)), box))
        open_ids = set(range(first, first + len(orders)))
        try:
            for number, order in enumerate(orders, start=first):
                self._send(order | {"id": number})
            yield self._stream(box, first, open_ids)
        finally:
            with contextlib.suppress(ChildError):
                self._cancel(box, open_ids)
            with self._lock:
                for number in range(first, first + len(orders)):
                    self._answers.pop(number, None)

    def close(self, grace_s: float = 2.0) -> None:
        """Ask the child to end by closing its stdin; kill it after `grace_s`."""
        assert self._process.stdin and self._process.stdout and self._process.stderr
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._listener.join()
        self._process.stdout.close()
        self._process.stderr.close()

    def _stream(self, box: queue.SimpleQueue[Message], first: int, open_ids: set[int]) -> Answers:
        while open_ids:
            answer = self._get(box, open_ids)
            if "done" in answer:
                open_ids.discard(answer["id"])
            yield answer | {"index": answer["id"] - first}

    def _get(self, box: queue.SimpleQueue[Message], open_ids: set[int] | None = None) -> Message:
        while True:
            try:
                answer = box.get(timeout=0.5)
            except queue.Empty:
                if self._ended and box.empty():
                    raise self._death() from None
                continue
            if "gone" in answer:
                raise self._death()
            if "error" in answer:
                if open_ids is not None:
                    open_ids.discard(answer["id"])
                kind = answer.get("kind", "request")
                raise ChildError(self._cause(answer["error"]) if kind == "load" else answer["error"], kind)
            return answer

    def _cancel(self, box: queue.SimpleQueue[Message], open_ids: set[int]) -> None:
        for number in open_ids:
            self._send({"op": "cancel", "id": number})
        while open_ids:
            with contextlib.suppress(KeyboardInterrupt):
                answer = self._get(box, open_ids)
                if "done" in answer:
                    open_ids.discard(answer["id"])

    def _send(self, message: Message) -> None:
        assert self._process.stdin
        try:
            with self._lock:
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()
        except (OSError, ValueError):
            if not self._ended and self._process.poll() is None and self._process.stdin.closed:
                raise ChildError("it was closed", "died") from None

    def _read(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            answer = json.loads(line)
            box = self._answers.get(answer["id"])
            if box is not None:
                box.put(answer)
        self._ended = True
        with self._lock:
            boxes = list(self._answers.values())
        for box in boxes:
            box.put({"gone": True})

    def _listen(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            self._tail.append(line[:500].decode("utf-8", "replace").strip())

    def _death(self) -> ChildError:
        code = self._process.wait()
        self._listener.join(1.0)
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        words = next((line for line in reversed(list(self._tail)) if line), "")
        return ChildError(f"it ended, {how}: {words}" if words else f"it ended, {how}", "died", code)

    def _cause(self, otherwise: str) -> str:
        """The first error line of llama.cpp's log (those after it only pass it on), or `otherwise`."""
        self._listener.join(0.1)
        for line in list(self._tail):
            if " E " in line:
                return line.partition(" E ")[2].removeprefix("llama_model_load: error loading model: ").strip()
        return otherwise
