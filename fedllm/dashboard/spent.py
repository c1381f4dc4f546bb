"""The privacy that a run has spent: of a finished one from its result, of one under way from its newest checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedLLMError, plain
from fedllm.dashboard.tail import Odd, read_small
from fedllm.privacy.accountant import spent, usual_delta

ROWS, LEDGERS = 500, 200
"""Most rows of a ledger, and unequal ledgers of clients, that are added up while a run goes on; with more of them its
epsilon is shown when it has ended."""


class Spent:
    """What one run's privacy layers say so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layers: list[dict[str, Any]] = []
        self.so_far = False
        self._seen: Any = None

    def look(self, recipe: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
        """Whether it has changed."""
        privacy = result.get("privacy")
        newest = None if result else max(self.path.glob("checkpoints/[0-9]*.json"), default=None)
        now = ("result", len(str(privacy))) if result else newest and (newest.name, newest.stat().st_mtime_ns)
        if now == self._seen:
            return False
        self._seen, self.so_far = now, not result
        if isinstance(privacy, Mapping):
            self.layers = [_told(x) for x in _list(privacy.get("layers")) if isinstance(x, Mapping) and "epsilon" in x]
        else:
            self.layers = [] if newest is None else list(self._under_way(newest, _list(recipe.get("layers"))))
        return True

    def _under_way(self, newest: Path, named: Sequence[Any]) -> Iterator[dict[str, Any]]:
        try:
            states = _list(values(json.loads(read_small(newest))).get("layers"))
            clients = len(json.loads(read_small(self.path / "clients.json")))
        except (Odd, ValueError, TypeError, AttributeError, RecursionError):
            return  # being replaced, or not as a run writes it
        for spec, state in zip(named, states, strict=False):
            name = plain(spec.get("name") if isinstance(spec, Mapping) else spec, 60)
            ledgers = _ledgers(state)
            if ledgers is None:
                continue
            given = spec.get("delta") if isinstance(spec, Mapping) else None
            each = "clients" in state
            delta = given or (1e-5 if each else usual_delta(max(2, clients)))
            try:
                most = max((spent(rows, float(delta), "rdp") for rows in ledgers), default=0.0)
            except (ArithmeticError, FedLLMError, LookupError, TypeError, ValueError):
                continue
            yield _told({"layer": name, "unit": "example" if each else "client", "delta": delta,
                         "epsilon": math.inf if state.get("unbooked") else most})

    @property
    def epsilon(self) -> float | str | None:
        """The largest epsilon; "infinite" where a release was not accounted for, None where no layer spends any."""
        found = [x["epsilon"] for x in self.layers]
        return "infinite" if "infinite" in found else max(found, default=None)

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        return {"layers": self.layers, "so_far": self.so_far}


def _told(says: Mapping[str, Any]) -> dict[str, Any]:
    epsilon, delta = says.get("epsilon"), says.get("delta")
    sound = isinstance(epsilon, int | float) and math.isfinite(epsilon)
    return {"layer": plain(says.get("layer"), 60), "unit": plain(says.get("unit"), 40),
            "epsilon": float(epsilon) if sound else "infinite",  # type: ignore[arg-type]
            "delta": float(delta) if isinstance(delta, int | float) and math.isfinite(delta) else None}


def _ledgers(state: Any) -> set[tuple[tuple[Any, ...], ...]] | None:
    """The ledgers that a layer keeps: its own, or one of each client; None: it keeps none."""
    if not isinstance(state, Mapping):
        return None
    clients = state.get("clients")
    books = [state["releases"]] if "releases" in state else list(clients.values()) if isinstance(
        clients, Mapping) and "open" in state else None
    if books is None:
        return None
    found = {tuple(tuple(r) for r in _list(b) if isinstance(r, list)) for b in books}
    return found if len(found) <= LEDGERS and all(len(b) <= ROWS for b in found) else None


def values(doc: Any) -> Any:
    """A frozen value of `runs/store.py` without its tensors, which no page needs."""
    if isinstance(doc, list):
        return [values(v) for v in doc]
    if not isinstance(doc, dict):
        return doc
    ((tag, inner),) = doc.items()
    if tag == "$map":
        return {k: values(v) for k, v in inner if isinstance(k, str)}
    return [values(v) for v in inner] if tag in ("$list", "$tuple") else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
