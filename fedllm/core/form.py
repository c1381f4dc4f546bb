"""What a client function gives: the names and kinds of its reply, declared once and held to at every door."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import PayloadError
from fedllm.core.payload import Payload

MOST = 1e12
"""No count (rows, tokens, steps, versions) of a reply is larger."""

MORE = 10
"""So many times the rows that a client declared when it joined a reply of its may claim: data grows between the two."""

ANY = "*"
"""The part whose name the method does not fix, such as metrics: whatever is named by none of the others."""


MARK = re.compile(r"([0-9a-f]{64})?")


def _number(v: Any) -> bool:
    return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)


def _all(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list | tuple) and all(of(x) for x in v)


def _nested(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list | tuple) and all(_nested(of)(x) if isinstance(x, list | tuple) else of(x)
                                                         for x in v)


def _real(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_floating_point()


def _whole(v: Any) -> bool:
    return isinstance(v, Tensor) and not v.is_floating_point() and not v.is_complex() and v.dtype != torch.bool


def _of_bits(v: Any) -> bool:
    return isinstance(v, Tensor) and v.dtype == torch.bool


def _row(v: Any) -> bool:
    """Whether it is a row in JSON; an empty text is one that the gate kept back."""
    try:
        return isinstance(v, str) and (not v or isinstance(json.loads(v), dict))
    except (ValueError, RecursionError):
        return False


KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "tree": ("floating-point tensors, one for each trainable that was sent", _real),
    "some": ("floating-point tensors, named as trainables that were sent", _real),
    "tensors": ("floating-point tensors", _real),
    "wholes": ("tensors of whole numbers", _whole),
    "tensor": ("a floating-point tensor", _real),
    "whole": ("a tensor of whole numbers", _whole),
    "count": (f"a number from 0 to {MOST:g}", lambda v: _number(v) and 0 <= v <= MOST),
    "rows": (f"a number from 0 to {MOST:g}", lambda v: _number(v) and 0 <= v <= MOST),
    "integer": ("a whole number of 64 bits", lambda v: _number(v) and isinstance(v, int) and -(2**63) <= v < 2**63),
    "number": ("a finite number", _number),
    "flag": ("true or false", lambda v: isinstance(v, bool)),
    "numbers": ("a list of finite numbers", _all(_number)),
    "text": ("text", lambda v: isinstance(v, str)),
    "texts": ("a list of texts", _all(lambda x: isinstance(x, str))),
    "synthetic": ("a list of synthetic rows as JSON objects", _all(_row)),
    "code": ("a text of the protocol", lambda v: isinstance(v, str)),
    "mark": ("a SHA-256 in hex, or nothing", lambda v: isinstance(v, str) and bool(MARK.fullmatch(v))),
    "name": ("a name", lambda v: isinstance(v, str) and len(v) <= 256),
    "names": ("a list of names", _all(lambda x: isinstance(x, str) and len(x) <= 256)),
    "mask": ("a tensor of true and false, or of whole numbers", lambda v: _whole(v) or _of_bits(v)),
    "summand": ("a tensor or a finite number", lambda v: isinstance(v, Tensor) or _number(v)),
    "bytes": ("bytes", lambda v: isinstance(v, bytes | bytearray)),
    "blobs": ("a list of bytes", _all(lambda x: isinstance(x, bytes | bytearray))),
    "places": ("lists of numbers, or tensors of whole numbers", lambda v: _whole(v) or _all(_number)(v)),
    "layout": ("a list of names and numbers", _nested(lambda x: _number(x) or (isinstance(x, str) and len(x) <= 256))),
}
"""Kind of a part -> what it is in words, and whether a leaf is one. Those in `MANY` stand under `<part>/<name>`.

`text` and `texts` are what people or models wrote, `synthetic` rows that a model wrote (`gate/made.py`); `code`,
`name`, `names` and `layout` are of the protocol (ids); `mark` is a digest of what a client holds, which is no text.
`rows` is a count of the client's own rows: at most `MORE` times what it declared when it joined. `summand` is what a
sum takes.
"""
MANY = ("tree", "some", "tensors", "wholes", "places")
TEXT = ("text", "texts", "synthetic")
CODES = ("code", "name", "names", "layout")


@dataclass(frozen=True)
class Told:
    """The trees in the messages of one ask: their names, and the shapes that each name has."""

    trees: Sequence[set[str]]
    shapes: Mapping[str, set[tuple[int, ...]]]

    @classmethod
    def of(cls, msgs: Iterable[Payload]) -> Told:
        """Of all messages; those that hold the very same tensors are read once."""
        trees: list[set[str]] = []
        shapes: dict[str, set[tuple[int, ...]]] = {}
        read: set[tuple[str, int]] = set()  # one tensor may stand under several names
        for msg in msgs:
            mine: dict[str, set[str]] = {}
            for key, v in msg.items():
                head, slash, tail = key.partition("/")
                if not slash or not isinstance(v, Tensor):
                    continue
                mine.setdefault(head, set()).add(tail)
                if (tail, id(v)) not in read:
                    read.add((tail, id(v)))
                    shapes.setdefault(tail, set()).add(tuple(v.shape))
            trees += [tails for tails in mine.values() if tails not in trees]
        return cls(trees, shapes)


@dataclass(frozen=True)
class Form:
    """The parts of a reply. Written as `"delta: tree, n: count, loss?: number"`; a `?` marks what may be absent."""

    parts: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    told: Told | None = None
    """What the clients were told, where that is known: no tree has other names or shapes than those sent."""

    @classmethod
    def of(cls, text: str) -> Form:
        """The form that this text declares."""
        parts, optional = {}, set()
        for word in filter(None, map(str.strip, text.split(","))):
            name, colon, kind = (x.strip() for x in word.partition(":"))
            if name.endswith("?"):
                name = name[:-1]
                optional.add(name)
            if not colon or kind not in KINDS:
                raise ValueError(f"'{word}' is no part of a reply; write `name: kind` with one of {', '.join(KINDS)}")
            parts[name] = kind
        return cls(parts, frozenset(optional))

    def bound(self, msgs: Mapping[str, Payload]) -> Form:
        """The same as an answer to these messages."""
        return replace(self, told=Told.of(msgs.values()))

    @property
    def speaks(self) -> bool:
        """Whether text of people or models is among the parts."""
        return any(kind in TEXT for kind in self.parts.values())

    def part_of(self, key: str) -> str | None:
        """The part to which a key of a reply belongs; None: to none."""
        if self.parts.get(key) not in (None, *MANY):
            return key
        head, slash, _ = key.partition("/")
        if slash and self.parts.get(head) in MANY:
            return head
        return ANY if ANY in self.parts and key not in self.parts and len(key) <= 256 else None

    def check(self, reply: Payload, declared: float | None = None) -> None:
        """Raise PayloadError for the first part that is not as declared; `declared`: rows that its client said to have.
        """
        seen: dict[str, set[str]] = {}
        for key, v in reply.items():
            if not isinstance(key, str):
                raise PayloadError(f"a part is named by {type(key).__name__}, allowed is text")
            name = self.part_of(key)
            if name is None:
                raise PayloadError(f"'{key[:80]}' is no part of this reply; it has {', '.join(self.parts) or 'none'}")
            kind = self.parts[name]
            what, fits = KINDS[kind]
            if not fits(v):
                raise PayloadError(f"'{key[:80]}' is {_what(v)}, allowed is {what}")
            if kind == "rows" and declared is not None and v > (most := MORE * max(1.0, declared)):
                raise PayloadError(f"'{key}' is {v:.6g} and it joined with {declared:g} rows; allowed is up to "
                                   f"{most:g}")
            tail = key.partition("/")[2]
            seen.setdefault(name, set()).add(tail)
            if kind in ("tree", "some") and self.told and self.told.shapes:
                self._shape(key, tail, v, self.told.shapes)
        for name, kind in self.parts.items():
            if name not in seen and name not in self.optional and name != ANY:
                raise PayloadError(f"'{name}' is lacking")
            if kind == "tree" and name in seen and self.told and self.told.trees and seen[name] not in self.told.trees:
                raise PayloadError(f"'{name}' holds {len(seen[name])} trainables, and not those that were sent")

    @staticmethod
    def _shape(key: str, tail: str, v: Tensor, shapes: Mapping[str, set[tuple[int, ...]]]) -> None:
        if tail not in shapes:
            raise PayloadError(f"'{key[:80]}' is not the name of a trainable that was sent")
        if tuple(v.shape) not in shapes[tail]:
            raise PayloadError(f"'{key[:80]}' has shape {tuple(v.shape)}, sent was {min(shapes[tail])}")


def _what(v: Any) -> str:
    if isinstance(v, Tensor):
        return f"a tensor of {str(v.dtype).removeprefix('torch.')}"
    return f"{v!r:.40}" if isinstance(v, int | float) else type(v).__name__


def crossing(payload: Payload, form: Form | None, hidden: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """What a reply holds in the clear, in words (`clear`), and by which layer other parts of it cannot be read
    (`hidden`). Text that its form calls a name or a layout is of the protocol; other text is somebody's."""
    clear, behind = set[str](), set[str]()
    for key, v in payload.items():
        if layers := [name for name, keys in hidden.items() if key in keys]:
            behind.update(layers)
            continue
        part = form.part_of(key) if form is not None and isinstance(key, str) else None
        kind = form.parts[part] if form is not None and part else ""
        clear |= {"names"} if kind in CODES else _words(v)
    return {k: ", ".join(sorted(v)) for k, v in (("clear", clear), ("hidden", behind)) if v}


def _words(v: Any) -> set[str]:
    if isinstance(v, list | tuple):
        return set().union(*map(_words, v)) if v else set()
    if isinstance(v, Tensor):
        return {"tensors"}
    return {"text" if isinstance(v, str) else "bytes" if isinstance(v, bytes | bytearray) else "numbers"}


def by_part(payload: Payload, form: Form | None = None) -> dict[str, int]:
    """Bytes of each part without names and framing; a part is called by what it holds and its name: `tree delta`,
    `tensor z`, `text questions`, `name ids`, `number n`, `bytes key`.

    Of a reply with a `form` what nobody declared is called `other`: what a client makes up is not written down; and
    text of the protocol is a name.
    """
    out: dict[str, int] = {}
    for key, v in payload.items():
        head, slash, _ = key.partition("/") if isinstance(key, str) else ("other", "", "")
        if form is not None:
            head = (form.part_of(key) if isinstance(key, str) else None) or "other"
        if isinstance(v, Tensor):
            what, size = "tree" if slash else "tensor", v.numel() * v.element_size()
        else:
            what, size = _plain(v)
            what = "name" if what == "text" and form is not None and form.parts.get(head) in CODES else what
        out[f"{what} {head}"] = out.get(f"{what} {head}", 0) + size
    return out


def _plain(v: Any) -> tuple[str, int]:
    """What a part without tensors holds, and its bytes: text as UTF-8, numbers as written. Of a list that
    holds both, all counts as text."""
    if isinstance(v, list | tuple):
        each = [_plain(x) for x in v]
        whats = {what for what, _ in each}
        return next((w for w in ("text", "bytes") if w in whats), "number"), sum(size for _, size in each)
    if isinstance(v, str):
        return "text", len(v.encode(errors="replace"))
    return ("bytes", len(v)) if isinstance(v, bytes | bytearray) else ("number", len(str(v)))


def need(holds: bool, why: str) -> None:
    """PayloadError with this reason unless it holds."""
    if not holds:
        raise PayloadError(why)


def aligned(reply: Payload, names: Sequence[str], count: int | None = None) -> None:
    """PayloadError unless these lists of a reply are as long as one another, and of `count` entries where it is known.
    """
    sizes = {name: len(reply[name]) for name in names}
    want = next(iter(sizes.values())) if count is None else count
    if odd := [name for name, size in sizes.items() if size != want]:
        raise PayloadError(f"'{odd[0]}' has {sizes[odd[0]]} entries, allowed are {want}")


def within(at: Sequence[float], of: Sequence[Any]) -> None:
    """Places in a list that the client was told."""
    need(all(i in range(len(of)) for i in at), f"{list(at)[:5]} are no places among {len(of)}")


def shaped(name: str, t: Tensor, want: Sequence[int | None]) -> None:
    """PayloadError unless this tensor of a reply has this shape; None stands for any size."""
    allowed = ", ".join("any" if w is None else str(w) for w in want)
    need(t.dim() == len(want) and all(w is None or s == w for s, w in zip(t.shape, want, strict=True)),
         f"'{name[:80]}' has shape {tuple(t.shape)}, allowed is ({allowed})")
