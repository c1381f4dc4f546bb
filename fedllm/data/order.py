"""Rows read as a stream: a fit goes on in the epoch where the last one that counted ended, and sees each row once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fedllm.core.errors import DataError

PLACE = "stream"
"""Under this key a client's memory holds where it is: the memory is committed with its round, so that a round that is
done again reads the same rows again, and one that did not count has read none."""


def onward(rows: int, lot: int, steps: int, place: Mapping[str, int] | None,
           order: Callable[[int], np.ndarray]) -> tuple[list[np.ndarray], dict[str, int]]:
    """The rows of `steps` batches of `lot` rows from `place` on ({"epoch": e, "at": rows read in it}), and the place
    after them. `order` gives an epoch's permutation; an epoch's last batch has what is left, and no batch lies in two.
    """
    if rows == 0:
        raise DataError("a client with no rows cannot be dealt into batches")
    epoch, at = (place["epoch"], place["at"]) if place else (0, 0)
    out: list[np.ndarray] = []
    now = order(epoch)
    while len(out) < steps:
        out.append(now[at : at + lot])
        at += lot
        if at >= rows:
            epoch, at = epoch + 1, 0
            now = order(epoch)
    return out, {"epoch": epoch, "at": at}
