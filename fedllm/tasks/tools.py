"""Tools in conversations: what a turn calls, what there is to call, and whether a chat template has words for both.

Rows are as OpenAI writes them: an assistant's turn has `tool_calls`, a turn of the role `tool` has the answer, and the
row's `tools` are JSON schemas. Templates differ in whether they want a call's arguments as an object or as JSON text,
and in what stands where a turn calls and says nothing: the way in which a probe's call is found whole is taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from fedllm.core.errors import DataError
from fedllm.tasks.row import is_blank

Turn = Mapping[str, Any]
Apply = Callable[[Sequence[Turn], Sequence[Any]], str]
"""(turns, tools) -> what the template makes of them."""
SIGNS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template raises at turns that it does not take."""
WEIGHED = ("weight", "train", "training", "train_detail", "training_detail")
"""Keys by which a turn, or a part of it, is not to be learned: OpenAI's, and what Axolotl's rows have."""
LOST = ("function_call", "reasoning_content", "reasoning", "thinking", "refusal", "audio", "image", "images",
        "image_url", "video", "videos", "files", "attachments")
"""Parts of a turn that are not learned, and that nobody would miss before the model is asked."""


def tools_of(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The row's `tools`, a list of JSON schemas or JSON text of one; empty where it has none."""
    given = row.get("tools")
    given = _json(given, f"{where}: 'tools'") if isinstance(given, str) and given.strip() else given
    if not given:
        return []
    if not isinstance(given, list) or not all(isinstance(t, Mapping) and isinstance(_named(t), str) for t in given):
        raise DataError(f"{where}: 'tools' must be a list of objects {{type: function, function: {{name, description, "
                        "parameters}}, or JSON text of one", kind="chat")
    return [{n: v for n, v in tool.items() if v is not None} for tool in given]


def _named(tool: Mapping[str, Any]) -> Any:
    inner = tool.get("function", tool)
    return inner.get("name") if isinstance(inner, Mapping) else None


def calls_of(turn: Turn, where: str) -> list[dict[str, Any]]:
    """A turn's calls with their arguments as objects; empty where it calls nothing."""
    if lost := [name for name in LOST if turn.get(name)]:
        raise DataError(f"{where} has {lost[0]!r}, which is not learned: calls are read from 'tool_calls', and text "
                        "from the content", kind="chat")
    if odd := next((n for n in WEIGHED if turn.get(n) not in (None, 1)), None):
        raise DataError(f"{where} has the {odd} {turn[odd]!r:.80}; allowed is 1: every assistant turn is "
                        "learned, or with local.every_turn = false the last", kind="chat")
    given = turn.get("tool_calls") or []
    if not isinstance(given, list):
        raise DataError(f"{where}: 'tool_calls' must be a list", kind="chat")
    return [_call(call, f"{where}, call {i}") for i, call in enumerate(given, start=1)]


def _call(call: Any, where: str) -> dict[str, Any]:
    what = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(what, Mapping) or not isinstance(what.get("name"), str) or is_blank(what["name"]):
        raise DataError(f"{where} must be {{id, type: function, function: {{name, arguments}}}}", kind="chat")
    if call.get("type", "function") != "function":
        raise DataError(f"{where} has the type {call['type']!r:.80}; allowed is 'function'", kind="chat")
    arguments = what.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}: 'arguments'")
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: 'arguments' must be a JSON object, or text of one", kind="chat")
    made = {"type": "function", "function": {"name": what["name"], "arguments": dict(arguments)}}
    return {"id": str(call["id"]), **made} if call.get("id") is not None else made


def _json(text: str, what: str) -> Any:
    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the key {twice!r:.80} is given twice")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=no_number, object_pairs_hook=once)
    except ValueError as error:
        raise DataError(f"{what} is no JSON: {error}", kind="chat") from None


def check_answers(turns: Sequence[Turn], what: str) -> None:
    """A DataError where a tool's turn answers a call that nobody made, by its id."""
    known: set[str] = set()
    for i, turn in enumerate(turns, start=1):
        known |= {call["id"] for call in turn.get("tool_calls", ()) if "id" in call}
        if (asked := turn.get("tool_call_id")) is not None and asked not in known:
            raise DataError(f"{what}, turn {i} answers the call {asked!r:.80}, which no turn before it makes",
                            kind="chat")


def said_in(turn: Turn) -> str:
    """What a turn says in text: its content, and a line of JSON for each call."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    return "\n".join([turn["content"]] * (not is_blank(turn["content"])) + calls) or turn["content"]


@dataclass(frozen=True)
class Form:
    """How a template takes calls: with arguments as JSON text, and with an empty content where nothing is said."""

    text: bool
    empty: bool

    def put(self, turn: Turn) -> dict[str, Any]:
        """The turn as the template takes it."""
        if not turn.get("tool_calls"):
            return dict(turn)
        calls = [{**c, "function": {**c["function"], "arguments": self._arguments(c)}} for c in turn["tool_calls"]]
        bare = {n: v for n, v in turn.items() if n != "content" or self.empty or not is_blank(v)}
        return {**bare, "tool_calls": calls}

    def _arguments(self, call: Mapping[str, Any]) -> Any:
        arguments = call["function"]["arguments"]
        return json.dumps(arguments, ensure_ascii=False) if self.text else arguments


NAME, KEY, VALUE = "q7tool", "q7key", "q7value"
PROBE = ({"role": "user", "content": "q7ask"},
         {"role": "assistant", "content": "", "tool_calls": [
             {"id": "q7call001", "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}]})
PROBE_TOOL = {"type": "function", "function": {"name": NAME, "description": "q7does", "parameters": {
    "type": "object", "properties": {KEY: {"type": "string", "description": "q7is"}}, "required": [KEY]}}}


def form_of(apply: Apply, tools: bool) -> Form | None:
    """The first form in which a template writes a call whole, and no Python or doubly quoted JSON in its place."""
    for form in (Form(text, empty) for text in (False, True) for empty in (False, True)):
        try:
            said = apply([form.put(turn) for turn in PROBE], [PROBE_TOOL] if tools else [])
        except SIGNS:
            continue
        call = said.rpartition("q7ask")[2]
        if NAME in call and KEY in call and VALUE in call and f"'{KEY}'" not in call and f'\\"{KEY}' not in call:
            return form
    return None


def left_out(apply: Apply, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> str:
    """What a template does not write of turns that it takes, in words, or "": found by words of our own in the places
    of contents, and of the names of calls and tools."""
    found: dict[str, str] = {}

    def word(what: str) -> str:
        found[made := f"q7w{len(found)}z"] = what
        return made

    talk = [_worded(turn, i, word) for i, turn in enumerate(turns, start=1)]
    named = [_renamed(tool, word(f"the tool {_named(tool)!r:.80}")) for tool in tools]
    try:
        said = apply(talk, named)
    except SIGNS:
        return ""  # it looks into what is said: of other words nothing can be told
    return next((what for made, what in found.items() if made not in said), "")


def _worded(turn: Turn, i: int, word: Callable[[str], str]) -> dict[str, Any]:
    calls = [_renamed(c, word(f"the call of {_named(c)!r:.80} in turn {i}")) for c in turn.get("tool_calls", ())]
    out = {**turn, **({"tool_calls": calls} if calls else {})}
    if not is_blank(turn.get("content", "")):
        if turn["role"] != "assistant":
            out["content"] = word(f"turn {i}, which is the {turn['role']}'s")
        elif calls:
            out["content"] = word(f"what turn {i} says beside its call")
    return out


def _renamed(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A call or a tool under another name."""
    inner = tool.get("function")
    return {**tool, "function": {**inner, "name": name}} if isinstance(inner, Mapping) else {**tool, "name": name}


def calling(turns: Sequence[Turn]) -> Iterator[Turn]:
    """The turns that call something."""
    return (turn for turn in turns if turn.get("tool_calls"))
