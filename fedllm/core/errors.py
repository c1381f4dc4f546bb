"""The errors of fedllm form one small tree. Each message names the thing, its value, and what is allowed.

    FedLLMError
      RecipeError       the recipe is wrong: unknown key, wrong type, out of range (also a ValueError)
      DataError         rows or files cannot be used: names file, line and field
      ModelError        the model lacks something that a space or method needs
      CompositionError  two parts of a run do not fit together: names both and the nearest thing that works
      ClientError       a client's work failed: names client, phase and cause
      QuorumError       too few clients answered
      PayloadError      bytes from the wire that are not a payload, or a payload the reducer cannot take
        Withheld        a client keeps its answer to itself in this round, and says why; the round goes on without it
      EndpointError     a text endpoint that cannot be reached or answers wrongly: names URL, model and cause
      RunError          a run folder that cannot be read, resumed or written
        RunFailed       a run that failed on its way: sites that did not come, a server that ended
          DidNothing    a run that ended without a single round that counted, or without any answer; its record is kept
        BudgetSpent     the next round would exceed a budget (privacy, queries); the run ends before it, with a result
"""


class FedLLMError(Exception):
    """The root: `except fedllm.FedLLMError` catches all that fedllm raises on purpose. A message that shows somebody's
    endless value is cut."""

    LONGEST = 20_000

    def __init__(self, message: str = "", *more: object) -> None:
        text = str(message)
        super().__init__(text if len(text) <= self.LONGEST else text[: self.LONGEST - 3] + "...", *more)


class RecipeError(FedLLMError, ValueError):
    """The recipe is wrong; the message names the key's path, the value and what is allowed."""


class DataError(FedLLMError, ValueError):
    """Rows or files cannot be used; the message names the file, the line and the field.

    Beside the message, for whoever must not pass it on: `file`, `row` (from 1; 0: of no row), `kind` (one of KINDS).
    """

    KINDS = ("rows", "unreadable", "broken", "value", "empty", "label", "chat")

    def __init__(self, message: str = "", *, file: str = "", row: int = 0, kind: str = "rows") -> None:
        super().__init__(message)
        self.file, self.row, self.kind = file, row, kind

    def at(self, file: str, row: int) -> "DataError":
        """The same error, of this row unless it knows better."""
        self.file, self.row = self.file or file, self.row or row
        return self


class ModelError(FedLLMError):
    """The model lacks something that a space, an objective or a method needs."""


class CompositionError(FedLLMError, TypeError):
    """Two parts of a run do not fit together; the message names both and the nearest thing that works."""


class ClientError(FedLLMError):
    """A client's work failed; the message names the client, the phase and the cause."""


class QuorumError(FedLLMError):
    """Fewer clients answered than the ask needs; the message says who is missing and why."""


class PayloadError(FedLLMError, ValueError):
    """Bytes that are no payload, or a payload with a wrong name, shape or type."""


class Withheld(PayloadError):
    """A client function will not answer in this round; the client is missing, for the reason that the message gives."""


class EndpointError(FedLLMError):
    """A text endpoint cannot be reached or answers wrongly; the message names its URL, the model and the cause."""


class RunError(FedLLMError):
    """A run folder cannot be read, resumed or written."""


class RunFailed(RunError):
    """A run that was begun and failed: sites that did not come, a server that ended, a part of it without a figure."""


class DidNothing(RunFailed):
    """No round of the run counted, or no question was answered; the message says why and where its record lies."""


class BudgetSpent(RunError):
    """One more round would cost more than a budget allows: of privacy, or of calls of a model."""


def plain(why: object, most: int = 300) -> str:
    """A reason that another machine gave, for terminals and records: one line, printable, and no longer than this."""
    text = "".join(c if c.isprintable() else " " for c in str(why)[: 4 * most])
    return text if len(text) <= most else text[: most - 3] + "..."
