"""What rules wrote, as the kernel gets it."""

from __future__ import annotations

import numpy as np
import torch

from lorafleet.kernels.logit_changes import change_logits_
from lorafleet.workers.model.rules.changes import Changes

CPU = torch.device("cpu")
INF = float("inf")


def words(*allowed: int, num_words: int = 1) -> torch.Tensor:
    """Return one row of a mask."""
    bits = np.zeros(32 * num_words, np.uint8)
    bits[list(allowed)] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))[None]


def changed(changes: Changes, rows: int) -> list[list[float]]:
    """Return logits of 1 after the changes."""
    logits = torch.ones(rows, changes.vocab_size)
    gathered = changes.gather()
    assert gathered is not None
    own = logits[gathered.row_P]
    change_logits_(own, gathered)
    logits[gathered.row_P] = own
    return logits.tolist()


def test_nothing_written_is_nothing() -> None:
    assert Changes(8, CPU).gather() is None


def test_values_add_up_row_by_row_and_ids_after_the_vocabulary_have_no_effect() -> None:
    changes = Changes(4, CPU)
    changes.add(2, np.array([0, 3, 4, 10**9]), np.array([1, -INF, 5, 5], np.float32))
    changes.add(0, np.array([1]), np.array([-2], np.float32))
    changes.add(2, np.array([0]), np.array([0.5], np.float32))
    assert changed(changes, 4) == [[1, -1, 1, 1], [1, 1, 1, 1], [2.5, 1, 1, -INF], [1, 1, 1, 1]]


def test_tokens_after_a_masks_last_word_are_forbidden() -> None:
    changes = Changes(34, CPU)
    changes.allow([1], words(0, 31))
    first, second = changed(changes, 2)
    assert first == [1.0] * 34
    assert [token for token, value in enumerate(second) if value == 1] == [0, 31]


def test_several_masks_of_a_row_all_apply_whatever_their_widths() -> None:
    changes = Changes(70, CPU)
    changes.allow([0, 2], torch.cat([words(1, 2, 40, num_words=3), words(69, num_words=3)]))
    changes.allow([0, 1], torch.cat([words(2, 3, 33, num_words=2), words(5, num_words=2)]))
    rows = changed(changes, 4)
    assert [[token for token, value in enumerate(row) if value == 1] for row in rows[:3]] == [[2], [5], [69]]
    assert rows[3] == [1.0] * 70
