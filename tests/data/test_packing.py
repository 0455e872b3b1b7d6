"""Packing: rows against cases worked out by hand and against a naive count of the pairs of every document."""

import itertools

import numpy as np
import pytest

from dsv2_jax.data.packing import CutRows, UncutRows, join


def _rows(documents, length):
    return CutRows(join(np.array(ids, np.int32) for ids in documents), length, 2 * np.arange(1000))


def test_rows_worked_by_hand():
    documents = [[0, 5, 6, 7, 1], [0, 1], [0, 8, 9, 1]]
    rows = _rows(documents, 3)
    assert len(rows) == 3
    batch = rows.batch([0, 1, 2, -1])
    assert batch["tokens_BT"].tolist() == [[0, 5, 6], [7, 0, 0], [8, 9, 0], [0, 0, 0]]
    assert batch["targets_BT"].tolist() == [[5, 6, 7], [1, 1, 8], [9, 1, 0], [0, 0, 0]]
    assert batch["positions_BT"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert batch["segments_BT"].tolist() == [[1, 1, 1], [1, 2, 3], [1, 1, 0], [0, 0, 0]]
    assert batch["weights_BT"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert batch["bytes_BT"].tolist() == [[10, 12, 14], [2, 2, 16], [18, 2, 0], [0, 0, 0]]
    assert {name: a.dtype.name for name, a in batch.items()} == {
        "tokens_BT": "int32",
        "targets_BT": "int32",
        "positions_BT": "int32",
        "segments_BT": "int32",
        "bytes_BT": "int32",
        "weights_BT": "float32",
    }


@pytest.mark.parametrize("length", [1, 4, 7, 50])
def test_every_pair_of_every_document_is_there_once_in_order(length):
    random = np.random.default_rng(length)
    documents = [random.integers(0, 1000, random.integers(2, 30)).tolist() for _ in range(40)]
    expected = [pair for ids in documents for pair in itertools.pairwise(ids)]
    rows = _rows(documents, length)
    assert len(rows) == -(-len(expected) // length)
    batch = rows.batch([*range(len(rows)), -1])
    real = batch["weights_BT"] == 1
    assert list(zip(batch["tokens_BT"][real], batch["targets_BT"][real], strict=True)) == expected
    assert ((batch["segments_BT"] > 0) == real).all()
    assert real.ravel()[: len(expected)].all(), "only the end is padding"


def test_a_segment_never_joins_two_documents_and_its_positions_count_from_zero():
    documents = [[30 * i + j for j in range(2 + 5 * i % 17)] for i in range(30)]
    rows = _rows(documents, 12)
    batch = rows.batch(range(len(rows)))
    for row in range(len(rows)):
        tokens, segments = batch["tokens_BT"][row], batch["segments_BT"][row]
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            assert (np.diff(here) == 1).all()
            assert len(set(tokens[here] // 30)) == 1
            assert (np.diff(tokens[here]) == 1).all()
            assert batch["positions_BT"][row, here].tolist() == list(range(len(here)))


def test_any_row_can_be_read_by_itself_and_the_last_batch_is_padded():
    documents = [[30 * i + j for j in range(2 + 7 * i % 13)] for i in range(25)]
    rows = _rows(documents, 10)
    whole = rows.batch(range(len(rows)))
    for row in (len(rows) - 1, 3, 0):
        alone = rows.batch([row])
        assert all((alone[name][0] == whole[name][row]).all() for name in whole)
    batches = list(rows.batches(4))
    assert len(batches) == -(-len(rows) // 4)
    joined = {name: np.concatenate([b[name] for b in batches]) for name in whole}
    assert all((joined[name][: len(rows)] == whole[name]).all() for name in whole)
    assert (joined["segments_BT"][len(rows) :] == 0).all()
    parts = [list(rows.batches(4, mine=mine)) for mine in ([0, 3], [1, 2])]
    for batch, (first, second) in zip(batches, zip(*parts, strict=True), strict=True):
        assert all((first[name] == batch[name][[0, 3]]).all() for name in batch)
        assert all((second[name] == batch[name][[1, 2]]).all() for name in batch)


def _whole(lengths, length, too_long, learnt=None):
    documents = join(np.arange(100 * i, 100 * i + n, dtype=np.int32) for i, n in enumerate(lengths))
    if learnt is not None:
        documents = documents._replace(learnt=np.array(learnt, bool))
    return UncutRows(documents, length, np.ones(50_000, int), too_long)


def test_rows_of_unsplit_documents_by_hand():
    # 6, 2, 4, 1 and 3 pairs into rows of 6: [0], [2, 1] and [4, 3]
    rows = _whole([7, 3, 5, 2, 4], 6, "drop")
    assert len(rows) == 3 and rows.too_long == 0
    batch = rows.batch([0, 1, 2])
    assert batch["tokens_BT"].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [200, 201, 202, 203, 100, 101],
        [400, 401, 402, 300, 0, 0],
    ]
    assert batch["segments_BT"].tolist() == [[1] * 6, [1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 0, 0]]
    assert batch["positions_BT"].tolist() == [[*range(6)], [0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]


def test_only_learnt_tokens_have_weight():
    rows = _whole([4, 3], 8, "drop", learnt=[1, 0, 1, 1, 1, 0, 1])
    assert rows.batch([0])["weights_BT"].tolist() == [[0, 1, 1, 0, 1, 0, 0, 0]]


def test_too_long_documents_are_dropped_or_cut_and_counted():
    lengths, learnt = [9, 3, 8], [0] * 8 + [1] + [1] * 3 + [0, 1] + [0] * 6
    dropped = _whole(lengths, 5, "drop", learnt)
    assert (dropped.too_long, len(dropped)) == (2, 1)
    assert dropped.batch([0])["tokens_BT"].tolist() == [[100, 101, 0, 0, 0]]
    cut = _whole(lengths, 5, "cut", learnt)  # of the first, what is left has nothing to learn
    assert (cut.too_long, len(cut)) == (2, 2)
    assert cut.batch([0, 1])["tokens_BT"].tolist() == [[200, 201, 202, 203, 204], [100, 101, 0, 0, 0]]


def test_whole_rows_hold_every_document_once_in_hardly_more_rows_than_any_packing_needs():
    random = np.random.default_rng(0)
    lengths = random.integers(2, 60, 500)
    rows = _whole(lengths, 64, "drop")
    batch = rows.batch(range(len(rows)))
    real = batch["segments_BT"] > 0
    found = sorted(zip(batch["tokens_BT"][real].tolist(), batch["targets_BT"][real].tolist(), strict=True))
    assert found == [(100 * i + j, 100 * i + j + 1) for i, n in enumerate(lengths) for j in range(n - 1)]
    starts = (batch["positions_BT"] == 0) & real
    assert starts.sum() == len(lengths)
    pairs = lengths - 1
    fewest = max(-(-pairs.sum() // 64), (pairs > 32).sum())  # no two of these share a row
    assert len(rows) <= 11 / 9 * fewest + 1
