"""Packing: rows against cases worked by hand and against a naive count of the pairs of every document."""

import itertools

import numpy as np
import pytest

from dsv2_jax.data.packing import Lane, blank_batch


def _numbered(documents):
    return lambda i: np.array(documents[i], np.int32) if i < len(documents) else None


def _rows(lane, length, count):
    batch = blank_batch(count, length)
    written = [lane.fill(batch, row) for row in range(count)]
    return batch, written


def test_rows_worked_by_hand():
    documents = [[0, 5, 6, 7, 1], [0, 1], [0, 8, 9, 1]]
    batch, written = _rows(Lane(_numbered(documents)), 3, 4)
    assert written == [True, True, True, False]
    assert batch["tokens_BT"].tolist() == [[0, 5, 6], [7, 0, 0], [8, 9, 0], [0, 0, 0]]
    assert batch["targets_BT"].tolist() == [[5, 6, 7], [1, 1, 8], [9, 1, 0], [0, 0, 0]]
    assert batch["positions_BT"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert batch["segments_BT"].tolist() == [[1, 1, 1], [1, 2, 3], [1, 1, 0], [0, 0, 0]]
    assert batch["weights_BT"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert {name: a.dtype.name for name, a in batch.items()} == {
        "tokens_BT": "int32",
        "targets_BT": "int32",
        "positions_BT": "int32",
        "segments_BT": "int32",
        "weights_BT": "float32",
    }


@pytest.mark.parametrize("length", [1, 4, 7, 50])
def test_every_pair_of_every_document_is_there_once_in_order(length):
    random = np.random.default_rng(length)
    documents = [random.integers(0, 1000, random.integers(2, 30)).tolist() for _ in range(40)]
    expected = [pair for ids in documents for pair in itertools.pairwise(ids)]
    rows = -(-len(expected) // length)
    batch, written = _rows(Lane(_numbered(documents)), length, rows + 1)
    assert written == [True] * rows + [False]
    real = batch["weights_BT"] == 1
    assert list(zip(batch["tokens_BT"][real], batch["targets_BT"][real], strict=True)) == expected
    assert ((batch["segments_BT"] > 0) == real).all()
    assert real.ravel()[: len(expected)].all(), "only the end is padding"


def test_a_segment_never_joins_two_documents_and_its_positions_count_from_zero():
    documents = [[100 * i + j for j in range(2 + 5 * i % 17)] for i in range(30)]
    batch, _ = _rows(Lane(_numbered(documents)), 12, 20)
    for row in range(20):
        tokens, segments = batch["tokens_BT"][row], batch["segments_BT"][row]
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            assert (np.diff(here) == 1).all()
            assert len(set(tokens[here] // 100)) == 1
            assert (np.diff(tokens[here]) == 1).all()
            assert batch["positions_BT"][row, here].tolist() == list(range(len(here)))


def test_a_lane_goes_on_from_any_place_and_reads_only_its_own_documents():
    documents = [list(range(100 * i, 100 * i + 3 + i)) for i in range(20)]
    lane = Lane(_numbered(documents), first=1, stride=3)
    places, rows = [], []
    for _ in range(8):
        places.append(lane.place)
        rows.append(_rows(lane, 9, 1)[0])
    assert {int(t) // 100 % 3 for batch in rows for t in batch["tokens_BT"].ravel()} == {1}
    assert any(used for _, used in places), "no place was inside a document: the test would show nothing"
    for number, place in enumerate(places):
        again = Lane(_numbered(documents), first=1, stride=3)
        again.place = place
        for expected in rows[number:]:
            batch, _ = _rows(again, 9, 1)
            assert all((batch[name] == expected[name]).all() for name in expected)
