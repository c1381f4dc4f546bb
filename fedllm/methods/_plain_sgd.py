"""Methods whose arithmetic holds for plain SGD alone say so when a run is built, by the recipe's own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedllm.core.errors import CompositionError


def need_sgd(local: Any, method: str, why: str, use: str = "local.optimizer = sgd, local.momentum = 0") -> None:
    """CompositionError for work (a LocalSpec) by another optimizer, or with momentum."""
    if local.optimizer != "sgd" or local.momentum:
        has = f"'{local.optimizer}'" + f" (momentum {local.momentum:g})" * bool(local.momentum)
        raise CompositionError(f"{method} and local.optimizer = {has} do not fit together: it counts on plain SGD, "
                               f"since {why}; use {use}")


def steps_together(method: str) -> Callable[[Any, Any, int], None]:
    """A method's `check_work`, where client and server make each step together."""
    def check_work(self: Any, local: Any, rounds: int) -> None:
        need_sgd(local, method, "client and server make each step together")

    return check_work
