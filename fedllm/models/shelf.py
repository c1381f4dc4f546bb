"""Models by name, each loaded when it is first asked for; a name that is not there says which ones are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedllm.core.errors import CompositionError


class Shelf(Mapping[str, Any]):
    """A mapping of names to models; `makers` load them."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]] | None = None) -> None:
        self._makers, self._made = dict(makers or {}), dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self._makers:
            raise CompositionError(f"models: there is no {unknown(name, self._makers)}")
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def loaded(self) -> Mapping[str, Any]:
        """Those that have been asked for so far."""
        return dict(self._made)


def unknown(name: str, known: Mapping[str, Any]) -> str:
    """The end of a sentence on a name that is not among these."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"'{name}'{hint} The recipe's models: has {', '.join(sorted(known)) or 'none'}"
