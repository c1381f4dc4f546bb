"""What a run comes back with: the figures of `result.json`, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fedllm.core.errors import DidNothing, RunError
from fedllm.runs.folder import RunFolder, of_one_run
from fedllm.runs.store import read_json


@dataclass(frozen=True)
class Result:
    """A finished run."""

    folder: Path
    method: str
    engine: str
    rounds: int
    seed: int
    evaluation: Mapping[str, Any]
    """`before` and `baselines` (each with `global` and `clients`), `global`, `clients`; where clients keep a part of
    the model, `views` of their own tests: `global` (what all share), `nearest`, and `whose` part that is."""
    bytes: Mapping[str, Any]
    """`up`, `down` and `by_phase` of the rounds, on the wire; under `evaluation` the same of what was sent to test."""
    seconds: float
    peak_memory_bytes: int
    state_digest: str
    """sha256 over the final state's tensors in name order."""
    privacy: Mapping[str, Any] | None = None
    audit: Mapping[str, Any] | None = None
    """Of the record: how many `events`, and `head`, the hash of the last (`fedllm audit verify`)."""
    skipped: list[int] = field(default_factory=list)
    """Rounds that too few clients answered."""
    ended: str = ""
    """Why the run ended before the recipe's last round: the next one would have broken a budget. Empty: it did not."""
    best: Mapping[str, Any] | None = None
    """With evaluate.keep_best or patience: the best tested `round` (how many rounds it had), its `loss`, `of` which
    rows, and whether the run ended with it (`kept`)."""
    failed: str = ""
    """Why the run counts as failed though it came to its end: no round counted, or no question was answered."""
    joules: float | None = None
    """Energy of this machine's processor packages and cards, where it counts them."""
    joules_from: str = ""
    """What counted them, or why nothing did."""
    virtual: Mapping[str, Any] | None = None
    """`seconds` on the clock of the declared fleet, and `wasted_bytes` of answers that came too late; None where time
    is real."""
    reports: Mapping[str, Any] = field(default_factory=dict)
    """What the method, layers and the selector say beside the figures, by their class: staleness, energy, who was
    asked how often."""

    metrics: Mapping[str, str] = field(default_factory=dict)
    """The method's own metrics: name -> "max" or "min", whichever is better."""

    @property
    def adapter_path(self) -> Path | None:
        """The served adapter (PEFT), the merged model where PEFT has no such one, or trainables that are neither."""
        return next((p for n in ("adapter", "model", "trainables") if (p := self.folder / n).is_dir()), None)

    @property
    def report_path(self) -> Path:
        """The self-contained HTML report."""
        return self.folder / "report.html"

    def as_json(self) -> dict[str, Any]:
        """What `result.json` holds."""
        return {k: v for k, v in asdict(self).items() if k != "folder"}

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """The result of a run that is finished; a RunError when it is not."""
        path = Path(folder) / "result.json"
        of_one_run(Path(folder))
        if not path.is_file():
            RunFolder.open(Path(folder))
            raise RunError(f"{folder} holds no finished run; `fedllm resume {folder}` goes on with it")
        said = read_json(path)
        known = {f.name: f for f in fields(cls) if f.name != "folder"}
        lacking = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING
                   and (not isinstance(said, dict) or n not in said)]
        if lacking:
            raise RunError(f"{path} lacks {', '.join(lacking)}: another version of fedllm wrote it, or it was changed; "
                           f"{folder}/recipe.yaml says which one, under versions")
        return cls(Path(folder), **{n: v for n, v in said.items() if n in known})  # a later version may say more


def finished(folder: str | Path) -> Result:
    """The result of a run that came to its end; DidNothing when it did nothing on the way there."""
    result = Result.load(folder)
    if result.failed:
        raise DidNothing(f"the run did nothing: {result.failed}. Its record and report are in {result.folder}, and "
                         "there is nothing to resume: mend the cause and run the recipe again")
    return result
