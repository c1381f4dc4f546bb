"""In which of the quicker ways a model runs: each is in use only where it says what the plain network says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WORDS: Mapping[str, str] = {
    "sites": "trainables are put into the network whole, for one client at a time",
    "together": "one client at a time",
    "uneven": "texts of one length at a time",
    "cut": "right padding is masked",
    "quick": "the network's own kernels",
    "fused": "the network's own logits",
    "dense": "padding is computed",
    "padded": "texts of one length at a time where it generates",
    "cached": "no cache where it generates",
}
"""What is done where a way is not taken."""


@dataclass(frozen=True)
class Ways:
    """True: the quicker way."""

    sites: bool = True
    """Modules read their clients' trainables; otherwise weights are put into the network for the time of a forward."""
    together: bool = True
    """Several clients in one forward."""
    uneven: bool = True
    """Texts of unequal lengths in one forward, padded on the right."""
    cut: bool = True
    """Right padding of causal models is not masked: no token sees it."""
    quick: bool = True
    """Our forms of norms, attention and products."""
    fused: bool = True
    """Head and loss in one pass where the head is a frozen linear map."""
    dense: bool = True
    """Rows of unequal lengths lie end to end where that is less work than their padding."""
    padded: bool = True
    """Prompts of unequal lengths are continued in one batch, padded on the left."""
    cached: bool = True
    """Keys, values and states of a text are kept while it is continued."""

    def without(self, other: Ways) -> list[str]:
        """The ways that `other` takes and this does not."""
        return [n for n in WORDS if vars(other)[n] and not vars(self)[n]]
