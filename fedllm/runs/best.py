"""Which tested round did best, and when it is time to stop: by the loss of rows that nobody trains on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedllm.core.errors import RecipeError


@dataclass(frozen=True)
class Best:
    """The best test so far; a value, so that it can lie in a checkpoint."""

    round: int = 0
    """How many rounds the best state had."""
    loss: float | None = None
    of: str = ""
    """Whose loss it is: the clients' own held-out rows, or the global test where clients keep none."""
    worse: int = 0
    """Tests since then."""
    last: int = -1
    """The round that was tested last."""

    def after(self, tested: Mapping[str, Any], round: int) -> Best:
        """With one more test, after so many rounds; a loss that is no number is never the best."""
        if round == self.last:  # an early end tests once more what it stopped at
            return self
        loss, of = figure(tested)
        if self.of and of != self.of:  # no client could be tested this time: another figure says nothing of this one
            loss = math.nan
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            return Best(round, loss, of, 0, round)
        return replace(self, of=self.of or of, worse=self.worse + 1, last=round)

    def over(self, patience: int | None) -> str:
        """Why the run ends here; empty when it does not."""
        if patience is None or self.worse < patience:
            return ""
        if self.loss is None:
            return f"no test had a loss that is a number in {self.worse} tests (evaluate.patience = {patience})"
        return (f"the loss on {self.of} was best after round {self.round} ({self.loss:.4g}) and no better in the "
                f"{self.worse} tests since (evaluate.patience = {patience})")

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint and for `result.json`."""
        return asdict(self)


def figure(tested: Mapping[str, Any]) -> tuple[float, str]:
    """The loss that a test is judged by, and of what rows: clients' own, each row alike, else the global test's."""
    own = [m for m in (tested.get("clients") or {}).values() if "loss" in m and m.get("n")]
    if own:
        return sum(m["loss"] * m["n"] for m in own) / sum(m["n"] for m in own), "the clients' own test rows"
    return float((tested.get("global") or {}).get("loss", math.nan)), "the global test"


def check_best(evaluate: Any, tests: bool) -> None:
    """RecipeError where the recipe asks for the best round and nothing says which that is."""
    for key in ("keep_best", "patience"):
        if not (value := getattr(evaluate, key)):
            continue
        if evaluate.every is None:
            raise RecipeError(f"evaluate.{key} = {value} goes by tests between rounds; give evaluate.every, for "
                              "example 1")
        if not tests:
            raise RecipeError(f"evaluate.{key} = {value} goes by the loss of rows that nobody trains on, and there are "
                              "none; give data.test or data.client_test (with evaluate.clients)")
