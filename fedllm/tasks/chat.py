"""Conversations: the shapes they come in, how a tokenizer's chat template writes them, and what of them is learned.

Text of people is never read as control tokens of the template, whatever it holds: `<|im_end|>` in a question is eight
characters or so, and does not end a turn.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.errors import CompositionError, DataError
from fedllm.tasks.row import Row, as_text, bad_row, is_blank
from fedllm.tasks.tools import SIGNS, Form, calling, calls_of, check_answers, form_of, left_out

log = logging.getLogger(__name__)
COLUMNS = ("messages", "conversations", "conversation")
"""Columns that a conversation is found in: as OpenAI writes it (role, content) or ShareGPT (from, value)."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
         "bot": "assistant", "model": "assistant", "ai": "assistant", "observation": "tool",
         "function_response": "tool"}
SPOKEN = ("user", "assistant", "system", "developer", "tool", "function")
"""Roles that a turn may have; those of ShareGPT are read as these."""
OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Stand around control tokens that somebody wrote (characters for private use), until they are tokens."""

Turns = list[dict[str, Any]]
"""Each with role and content; an assistant's may have `tool_calls`, a tool's a `tool_call_id` and a `name`."""


def messages_of(row: Row, where: str) -> Turns | None:
    """The row's turns as `role` and `content`, None where no column holds any; a DataError names what is wrong."""
    columns = [name for name in COLUMNS if row.get(name) is not None]
    if not columns:
        return None
    if odd := [name for name in columns[1:] if row[name] != row[columns[0]]]:
        raise DataError(f"{where}: {columns[0]!r} and {odd[0]!r} hold different turns; a row is one conversation, so "
                        "leave one of the columns out", kind="chat")
    column = columns[0]
    turns = row[column]
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) and _keys(t) for t in turns):
        raise DataError(f"{where}: {column!r} must be a list of objects with 'role' and 'content' (or 'from' and "
                        "'value')", kind="chat")
    if not turns:
        raise DataError(f"{where}: {column!r} holds no turns, so that there is nothing to learn", kind="empty")
    made = [_turn(t, f"{where}: {column!r}, turn {i}") for i, t in enumerate(turns, start=1)]
    if len(made) < 2 or made[-1]["role"] != "assistant":
        raise DataError(f"{where}: {column!r} must hold two turns or more and end with the role 'assistant'",
                        kind="chat")
    _check_order(made, f"{where}: {column!r}")
    check_answers(made, f"{where}: {column!r}")
    if mute := [i for i, t in enumerate(made, start=1) if t["role"] == "assistant" and is_blank(t["content"])
                and not t.get("tool_calls")]:
        at = "the last turn" if mute[0] == len(made) else f"turn {mute[0]} (the assistant's)"
        raise DataError(f"{where}: {at} of {column!r} is empty, so that there is nothing to learn", kind="empty")
    return made


def _check_order(turns: Turns, what: str) -> None:
    """A DataError for roles that nobody can have said in this order, whatever a chat template would make of them."""
    roles = [t["role"] for t in turns]
    if "user" not in roles[:-1]:
        raise DataError(f"{what} has no turn of the user, so that nothing is answered", kind="chat")
    for i, role in enumerate(roles, start=1):
        if role in ("system", "developer") and i > 1:
            raise DataError(f"{what}, turn {i} is the {role}'s; it can only come first", kind="chat")
        if role == "assistant" and i > 1 and roles[i - 2] == role:
            raise DataError(f"{what}, turns {i - 1} and {i} are both the assistant's; join them, or leave the row out",
                            kind="chat")


def _keys(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    if turn.get("tool_calls") and "role" in turn:
        return "role", "content"  # a turn that calls need not say anything
    return next((pair for pair in (("role", "content"), ("from", "value")) if turn.keys() >= set(pair)), None)


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = _keys(turn)
    assert names
    role, content = turn[names[0]], turn.get(names[1])
    if not isinstance(role, str):
        raise DataError(f"{where}: the {names[0]} is {role!r:.80}; it must be user, assistant or system", kind="chat")
    role = ROLES.get(role.strip().lower(), role.strip().lower())
    if role not in SPOKEN:
        raise DataError(f"{where}: the role is {role!r:.80}; allowed are {', '.join(SPOKEN)}", kind="chat")
    calls = calls_of(turn, where)
    if calls and role != "assistant":
        raise DataError(f"{where} is the {role}'s and has 'tool_calls'; the assistant alone calls tools", kind="chat")
    if content is None and not calls:
        raise DataError(f"{where}: the {names[1]} is null; a turn must hold text", kind="chat")
    made: dict[str, Any] = {"role": role, "content": "" if content is None else _content(content, where)}
    if role == "tool":
        made |= {n: as_text(turn[n], n, where) for n in ("tool_call_id", "name") if turn.get(n) is not None}
    return {**made, "tool_calls": calls} if calls else made


def _content(content: Any, where: str) -> str:
    """Text, or the joined texts of parts (`[{type: text, text: ...}]`)."""
    if not isinstance(content, list):
        return as_text(content, "content", where)
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type", "without a text") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where}: a part of the content is {kind!r:.80}; only parts of type 'text' can be learned",
                            kind="chat")
        texts.append(as_text(part["text"], "text", where))
    return "".join(texts)


def render(tokenizer: Any, turns: Sequence[Mapping[str, Any]], row: Row | None = None, i: int = 1, *,
           ask: bool = False) -> str:
    """The turns as the tokenizer's chat template writes them (`ask`: up to where the assistant speaks), after the
    row's tools, with marks around control tokens that are in the turns themselves. A DataError tells what the template
    refuses, and where."""
    if not tokenizer.chat_template:
        raise CompositionError(f"data.template 'chat' and the tokenizer {tokenizer.name_or_path!r}, which has no chat "
                               "template, do not fit together; 'question_answer' or a format string works")
    tools = _marked_all((row or {}).get("tools") or [], tokenizer, False)
    said = [_marked_turn(t, tokenizer) for t in turns]
    if any(calling(said)):
        if (form := _form(tokenizer, bool(tools))) is None:
            raise bad_row(row or {}, i, f": it calls tools, and the chat template of {tokenizer.name_or_path!r} has "
                          "no words for 'tool_calls'; take a model whose template has, or leave the row out", "chat")
        said = [form.put(t) for t in said]
    try:
        return _written(tokenizer, said, tools, ask)
    except SIGNS as error:
        roles = ", ".join(dict.fromkeys(t["role"] for t in turns))
        raise bad_row(row or {}, i, f": the model's chat template refuses these turns (of {roles}): {error}. Leave the "
                      "turn out, or merge it into the next one", "chat") from None


def _written(tokenizer: Any, turns: Sequence[Mapping[str, Any]], tools: Sequence[Any], ask: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(turns), tools=list(tools) or None, tokenize=False,
                                             add_generation_prompt=ask))


def _form(tokenizer: Any, tools: bool) -> Form | None:
    """How the template takes calls; it is asked once."""
    key = id(tokenizer), str(tokenizer.chat_template), tools
    if _FORMS.get("key") != key:
        _FORMS.update(key=key, found=form_of(functools.partial(_written, tokenizer), tools))
    found: Form | None = _FORMS["found"]
    return found


def _all_written(tokenizer: Any, turns: Sequence[Mapping[str, Any]], whole: str, row: Row, i: int) -> None:
    """A DataError for what the template passes over without a word: a turn, a call, a tool."""
    tools = list(row.get("tools") or [])
    here = all(t["content"].strip() in whole for t in turns if t["role"] != "assistant")
    if here and not tools and not any(calling(turns)):
        return
    form = _form(tokenizer, bool(tools)) if any(calling(turns)) else None
    said = [form.put(t) for t in turns] if form else turns
    if lost := left_out(functools.partial(_written, tokenizer), said, tools):
        raise bad_row(row, i, f": the chat template of {tokenizer.name_or_path!r} leaves out {lost}; take it out of "
                      "the row, or take a model whose template writes it", "chat")


def spans(tokenizer: Any, row: Row, i: int, every: bool) -> list[tuple[str, bool]]:
    """The row's text in pieces, and whether each is learned: every assistant turn, or the last."""
    turns = list(row["messages"])
    whole, at = render(tokenizer, turns, row, i), 0
    _all_written(tokenizer, turns, whole, row, i)
    out: list[tuple[str, bool]] = []
    ends = [k for k, t in enumerate(turns) if t["role"] == "assistant" and k] if every else [len(turns) - 1]
    for k in ends:
        before = render(tokenizer, turns[:k], row, i, ask=True)
        after = whole if k == len(turns) - 1 else render(tokenizer, turns[: k + 1], row, i)
        if not (whole.startswith(before) and whole.startswith(after) and len(before) >= at):
            if k < len(turns) - 1:
                _said_once(str(tokenizer.name_or_path))
                continue  # the template rewrites this turn (it drops its reasoning); the last one is always learned
            if turns[k].get("tool_calls"):
                raise bad_row(row, i, f": the chat template of {tokenizer.name_or_path!r} writes a last turn with a "
                              "call otherwise than after what is asked of it, so that the call cannot be learned; "
                              "leave the row out", "chat")
            # What is asked is then not how the answered conversation begins: the turn is plain.
            plain = _marked(turns[-1]["content"], tokenizer, True) + (tokenizer.eos_token or "")
            return [(before, False), (plain, True)]
        out += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
        at = len(after)
    return out


def wanted(row: Row, tokenizer: Any) -> str:
    """The right answer as a model would write it: the row's response, and a call in the template's own words."""
    turns = row.get("messages")
    if not turns or not turns[-1].get("tool_calls"):
        return str(row["response"])
    text = spans(tokenizer, row, 1, False)[-1][0]
    ids = pieces(tokenizer, [text], functools.partial(tokenizer, verbose=False))[0]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@functools.cache
def _said_once(name: str) -> None:
    log.warning("the chat template of %s rewrites earlier turns once a later one stands: assistant turns that it "
                "writes otherwise are not learned, the last one of every row is; write such a conversation once for "
                "each answer, ending there, to learn them all", name)


def pieces(tokenizer: Any, texts: Sequence[str], how: Any) -> list[list[int]]:
    """Marked texts as tokens, in one call where nothing is marked; what stands between marks is text and no control."""
    out: list[list[int]] = how(texts, add_special_tokens=False)["input_ids"]
    for i, text in enumerate(texts):
        if OPEN in text:
            ids: list[int] = []
            for k, part in enumerate(text.replace(CLOSE, OPEN).split(OPEN)):
                if part:
                    split = {"split_special_tokens": True} if k % 2 else {}
                    ids += how([part], add_special_tokens=False, **split)["input_ids"][0]
            out[i] = ids
    return out


def _marked_turn(turn: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    answer = turn["role"] == "assistant"
    return {**turn, **{n: _marked_all(turn[n], tokenizer, answer) for n in ("content", "tool_calls") if n in turn}}


def _marked_all(value: Any, tokenizer: Any, answer: bool) -> Any:
    """Every text that a value of JSON holds, names of its parts excepted."""
    if isinstance(value, str):
        return _marked(value, tokenizer, answer)
    if isinstance(value, list | tuple):
        return [_marked_all(v, tokenizer, answer) for v in value]
    return {n: _marked_all(v, tokenizer, answer) for n, v in value.items()} if isinstance(value, Mapping) else value


def _marked(text: str, tokenizer: Any, answer: bool) -> str:
    """The text with marks around control tokens; marks that it holds itself are dropped."""
    controls = _controls(tokenizer)[answer]
    if not any(c in text for c in (*controls, OPEN, CLOSE)):
        return text
    text = text.replace(OPEN, "").replace(CLOSE, "")
    out, at = [], 0
    while at < len(text):
        hit = next((c for c in controls if text.startswith(c, at)), None)
        out.append(f"{OPEN}{hit}{CLOSE}" if hit else text[at])
        at += len(hit or "x")
    return "".join(out)


def _controls(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Control tokens in what people say, and in answers (where a template's plain marks, as <think>, are meant)."""
    key = id(tokenizer), len(tokenizer), str(tokenizer.chat_template)
    if _KNOWN.get("key") != key:
        added = tokenizer.added_tokens_decoder.values()
        special = {str(t) for t in tokenizer.all_special_tokens} | {t.content for t in added if t.special}
        meant = {t.content for t in added if t.content.strip() and t.content in str(tokenizer.chat_template)}
        _KNOWN.update(key=key, found=tuple(sorted(s, key=len, reverse=True) for s in (special | meant, special)))
    return _KNOWN["found"]  # type: ignore[no-any-return]


_KNOWN: dict[str, Any] = {}
_FORMS: dict[str, Any] = {}
"""Both of the tokenizer that was asked last."""
