"""Makes prompt and response from a user's fields: format strings over columns, by name or written out."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedllm.core.errors import DataError, RecipeError
from fedllm.tasks.chat import COLUMNS, messages_of
from fedllm.tasks.row import Row, as_text, is_blank, nearest, value_of
from fedllm.tasks.tools import said_in, tools_of

Render = Callable[[Row, str], dict[str, Any]]
"""(row, where the row is) -> the row's `prompt` and `response`."""


def _parse(text: str) -> tuple[tuple[str, str | None], ...]:
    """Literal text and the placeholder after it, in order; a RecipeError for braces that are no placeholder."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise RecipeError(f"data.template {text!r}: {error}; write {{{{ for a brace") from error
    if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
        raise RecipeError(f"data.template {text!r}: a placeholder is a field's name in braces and no more; "
                          "write {{ for a brace")
    return tuple((literal, name) for literal, name, _, _ in parts)


def _fill(parts: Sequence[tuple[str, str | None]], row: Row, where: str) -> str:
    out = []
    for literal, name in parts:
        out.append(literal)
        if name is not None:
            # An optional column that is null reads as no text, as in the Hub's instruction sets.
            out.append(as_text(value_of(row, name, where), name, where))
    return "".join(out)


def _said(parts: Sequence[tuple[str, str | None]], row: Row) -> bool:
    """Whether some field of these is not null; a text without fields says what it says."""
    names = [name for _, name in parts if name is not None]
    return not names or any(row[name] is not None for name in names)


@dataclass(frozen=True)
class Template:
    """Two format strings whose placeholders are the row's fields."""

    prompt: str
    response: str = "{response}"

    def __post_init__(self) -> None:
        """Refuses broken format strings when the recipe is read, not at the first row."""
        _ = self._parts

    @cached_property
    def _parts(self) -> tuple[tuple[tuple[str, str | None], ...], ...]:
        return _parse(self.prompt), _parse(self.response)

    def __call__(self, row: Row, where: str = "row") -> dict[str, Any]:
        """The row's prompt and response; a DataError names a placeholder that the row cannot fill."""
        prompt, response = self._parts
        made = {"prompt": _fill(prompt, row, where), "response": _fill(response, row, where)}
        filled = [row[name] for _, name in response if name is not None]
        if is_blank(made["response"]) or (filled and all(v is None or is_blank(str(v)) for v in filled)):
            raise DataError(f"{where}: the response is empty, so that there is nothing to learn; leave the row out",
                            kind="empty")
        if not _said(prompt, row):
            raise DataError(f"{where}: every field of the prompt is null; leave the row out", kind="empty")
        return made


_INTRO = "Below is an instruction that describes a task"
_ORDER = ". Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
_NO_INPUT = Template(_INTRO + _ORDER + "### Response:\n", "{output}")
_WITH_INPUT = Template(_INTRO + ", paired with an input that provides further context" + _ORDER
                       + "### Input:\n{input}\n\n### Response:\n", "{output}")


def _alpaca(row: Row, where: str = "row") -> dict[str, Any]:
    """The Stanford Alpaca prompt: one wording with an input, one without."""
    return (_WITH_INPUT if row.get("input") else _NO_INPUT)(row, where)


def _chat(row: Row, where: str = "row") -> dict[str, Any]:
    """Keeps `messages`, since only the tokenizer knows its chat template: `encode` renders them.

    A row with no turns (`chat.COLUMNS`) is one exchange of its `prompt` and `response`, after its `system` if it has
    one. Without the tokenizer, `prompt` reads as
    the last thing said before the assistant's final turn, and `response` as that turn.
    """
    turns = messages_of(row, where)
    if turns is None:
        if (name := next((n for n in COLUMNS if n in row), None)) and "prompt" not in row:
            raise DataError(f"{where}: {name!r} is null, so that there is nothing to learn", kind="empty")
        pair = NAMED["plain"](row, where)
        return {"messages": exchange(row, pair["prompt"], pair["response"], where), **pair}
    tools = tools_of(row, where)
    return {"messages": turns, "prompt": said_in(turns[-2]), "response": said_in(turns[-1]),
            **({"tools": tools} if tools else {})}


def exchange(row: Row, prompt: str, response: str, where: str) -> list[dict[str, Any]]:
    """One question and its answer as turns, after the row's `system` if it has one."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    system = as_text(row.get("system"), "system", where)
    return [{"role": "system", "content": system}, *turns] if system else turns


NAMED: dict[str, Render] = {
    "plain": Template("{prompt}"),
    "question_answer": Template("Question: {question}\nAnswer:", " {answer}"),
    "alpaca": _alpaca,
    "text": Template("", "{text}"),
    "chat": _chat,
}
"""`text` has no prompt: every token of the line is learned, as in language modeling."""


def template(spec: str | Mapping[str, str] | None) -> Render:
    """A template by name, from a prompt's format string, or from {prompt: ..., response: ...}.

    None is `plain`. With a format string alone the response is the field `response` (map it by `fields`).
    """
    if isinstance(spec, Mapping):
        if "prompt" not in spec or not set(spec) <= {"prompt", "response"}:
            raise RecipeError(f"data.template has the keys {', '.join(spec)}; allowed are prompt and response")
        return Template(**spec)
    if spec is None or spec in NAMED:
        return NAMED[spec or "plain"]
    if "{" not in spec:
        raise RecipeError(f"data.template = {spec!r} is neither a format string with {{placeholders}} nor one of "
                          f"{', '.join(NAMED)}{nearest(spec, NAMED)}")
    return Template(spec)


def columns_of(spec: str | Mapping[str, str] | None) -> set[str]:
    """Fields that a template may read."""
    made = template(spec)
    if made is _alpaca:
        made = _WITH_INPUT
    if not isinstance(made, Template):
        return {"prompt", "response", "system"}
    return {name for part in made._parts for _, name in part if name is not None}


def told_before(spec: str | Mapping[str, str] | None) -> list[str]:
    """Fields that a template puts into the prompt and into the response."""
    made = template(spec)
    if not isinstance(made, Template):
        return []
    asked, said = ({name for _, name in part if name is not None} for part in made._parts)
    return sorted(asked & said)


def as_response(render: Render, row: Row, text: str, where: str) -> str | None:
    """What a template would make the response if this text were the answer; None where that is made of several fields,
    or of none."""
    if render is _chat:
        return text
    made = _NO_INPUT if render is _alpaca else render
    names = {name for _, name in made._parts[1] if name is not None} if isinstance(made, Template) else set()
    return str(render({**row, names.pop(): text}, where)["response"]) if len(names) == 1 else None


def prompt_columns(spec: str | Mapping[str, str] | None) -> list[str]:
    """Fields of a template's prompt, in order; none where the prompt is plain or the tokenizer's own matter."""
    made = template(spec)
    made = _WITH_INPUT if made is _alpaca else made
    if not isinstance(made, Template):
        return []
    return list(dict.fromkeys(name for _, name in made._parts[0] if name is not None))


def asked(spec: str | Mapping[str, str] | None, fields: Row) -> str:
    """A template's prompt alone, for a question whose answer is not there yet."""
    made = template(spec)
    if made is _alpaca:
        made = _WITH_INPUT if fields.get("input") else _NO_INPUT
    return _fill(made._parts[0], fields, "what you typed") if isinstance(made, Template) else ""
