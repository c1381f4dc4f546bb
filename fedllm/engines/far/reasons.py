"""Why a site does not answer: a code from a short list and numbers. Nothing else of what went wrong ever crosses.

The site keeps the details in its own log. The coordinator says the code's sentence, and of a code that is not on the
list (a site may say anything) that it is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.core.errors import (
    BudgetSpent,
    CompositionError,
    DataError,
    EndpointError,
    FedLLMError,
    ModelError,
    PayloadError,
    RecipeError,
    Withheld,
)

REASONS: Mapping[str, str] = {
    "protocol": "it speaks another protocol",
    "versions": "it has other package versions installed than the run asks for",
    "recipe": "it cannot read the recipe",
    "composition": "parts of the run do not fit together there",
    "model": "its model lacks something that the run needs",
    "plugins": "the recipe brings plugin files, and a site never loads code from a recipe",
    "path": "a model of the run or space.start_from is a path outside of the folders that this site opened",
    "remote_code": "model.trust_remote_code is forbidden by its settings",
    "network": "the run needs a host that its settings do not name",
    "method": "the method is not on this site's allow-list",
    "not_installed": "the method is not installed here, and a site runs installed code only",
    "metric": "evaluate.metric calls a function that its settings do not name (metrics)",
    "text": "the method sends text or tokens, and this site lets none leave (text_leaves)",
    "gate": "text leaves this site through the gate alone (layer responsible_gate), and the run has none, or a reply "
            "holds text without a verdict",
    "endpoint": "the method asks an endpoint, and this site's settings name none",
    "endpoint_failed": "its endpoint did not answer as it should",
    "space": "its settings do not allow to train this space",
    "layers": "its settings ask for layers that the run does not have",
    "epsilon": "its settings ask for a layer of differential privacy within its own budget",
    "noise": "a layer's noise is seeded, too small, or of a larger delta than its settings allow",
    "rounds": "its settings allow fewer rounds",
    "work": "its settings allow less work",
    "fields": "the run shapes its rows in another way (fields, labels, template, task) than is fixed there",
    "data": "its own rows cannot be used as the run says",
    "no_data": "its data are not there",
    "weights_differ": "its base weights are not the coordinator's, or not those it began the run with",
    "tokenizer_differs": "its tokenizer is not the coordinator's, or not the one it began the run with",
    "rows_differ": "its rows are not those it began the run with",
    "packages_differ": "its package versions are not those it began the run with",
    "stack": "it was asked without the run's layers, or outside of their session",
    "tests": "its settings let no test figures leave",
    "budget_spent": "one more answer would pass its own budget",
    "rounds_spent": "one more answer would pass its own number of rounds",
    "queries_spent": "one more answer would pass its own number of queries",
    "work_spent": "one more answer would pass its own limit of work",
    "withheld": "it keeps its answer to itself in this round",
    "given_up": "the server does not wait for it any longer",
    "may_not_leave": "its settings do not let this reply leave",
    "too_large": "the reply is larger than its settings allow",
    "message": "the message is none that it can answer",
    "memory": "it has no memory left",
    "disk": "its disk does not take or give what is needed",
    "fault": "its work failed; its own log says how",
}
"""Code -> the sentence that the coordinator shows."""

NUMBERS = ("row", "line", "allowed", "asked", "bytes")
"""What numbers may go with a code."""

WHERE = re.compile(r"\A.+\.(?:jsonl|ndjson|json|csv|tsv|parquet|txt), (row|line) (\d{1,9})\b")
"""How an error of a table's rows begins: with the file's own name, before anything of the row."""

KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (BudgetSpent, "budget_spent"), (Withheld, "withheld"), (PayloadError, "message"),
    (EndpointError, "endpoint_failed"), (CompositionError, "composition"), (ModelError, "model"),
    (DataError, "data"), (RecipeError, "recipe"),
    (MemoryError, "memory"), (OSError, "disk"))


class Refused(FedLLMError):
    """A site's own word: what crosses is `code` and `numbers`; the message stays in the site's log."""

    def __init__(self, code: str, message: str = "", **numbers: int) -> None:
        super().__init__(f"{REASONS[code]}{f': {message}' if message else ''}")
        self.code, self.numbers = code, numbers


def coded(error: BaseException) -> dict[str, Any]:
    """What may cross of an error: its code and numbers."""
    if isinstance(error, Refused):
        return {"code": error.code, **_kept(error.numbers)}
    said = next((code for kind, code in KINDS if isinstance(error, kind)), "fault")
    if type(error).__name__ == "OutOfMemoryError":  # torch's own, which is a RuntimeError
        said = "memory"
    return {"code": said, **(_place(str(error)) if isinstance(error, DataError) else {})}


def _place(text: str) -> dict[str, int]:
    """The row or line that an error of the site's own files begins with."""
    found = WHERE.match(text)
    if not found or not Path(found.group(0).rpartition(",")[0]).exists():
        return {}
    return {found.group(1): int(found.group(2))}


def _kept(numbers: Mapping[str, Any]) -> dict[str, int]:
    return {k: v for k, v in numbers.items() if k in NUMBERS and type(v) is int and 0 <= v < 1 << 53}


def sentence(said: Any) -> str:
    """What the coordinator makes of a site's reason; of one that is not on the list, that it is none."""
    code = said.get("code") if isinstance(said, Mapping) else None
    if not isinstance(code, str) or code not in REASONS:
        return "for a reason that is none of fedllm's"
    numbers = ", ".join(f"{k} {v}" for k, v in _kept({str(k): v for k, v in said.items()}).items())
    return f"{REASONS[code]}{f' ({numbers})' if numbers else ''}"
