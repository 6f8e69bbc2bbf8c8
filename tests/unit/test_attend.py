"""How many documents flash attention's backward takes at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gemwright.kernels.attend import spans
from gemwright.layout import DOCUMENT_ROWS, document_room


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=400))
def test_spans_cover_all_documents_within_the_room(lengths: list[int]) -> None:
    tokens = sum(lengths)
    most = tokens + document_room(tokens)
    found = spans(lengths, most)
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(len(lengths)))
    for part in found:
        own = lengths[part]
        assert own and (len(own) == 1 or sum(own) + DOCUMENT_ROWS * len(own) <= most)


def test_few_documents_go_together() -> None:
    assert spans([2048], 2048 + document_room(2048)) == [slice(0, 1)]
    assert len(spans([128] * 16, 2048 + document_room(2048))) == 1
    assert len(spans([4] * 600, 2400 + document_room(2400))) > 10
