"""How long a GPU's computation waits for copies: of weights that stream in, of activations that come back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Pairs = Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]


class Waits:
    """Has a stream wait for events, and tells for how long it did."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def wait(self, device: torch.device, event: torch.cuda.Event) -> None:
        """Have the current stream of `device` wait for `event`, its work until then and from then on marked."""
        inside, now = torch.cuda.is_current_stream_capturing(), torch.cuda.current_stream(device)
        before, after = (torch.cuda.Event(enable_timing=True, external=inside) for _ in range(2))
        before.record(now)
        now.wait_event(event)
        after.record(now)
        self._pairs.append((before, after))

    def seconds(self) -> float:
        """Those waited since the last call; the device must be idle."""
        return float(sum(before.elapsed_time(after) for before, after in self.swap([]))) / 1000

    def swap(self, pairs: Pairs) -> Pairs:
        """Have `seconds` tell of these; those it would have told of. A replayed step records its own anew."""
        told, self._pairs = self._pairs, list(pairs)
        return told
