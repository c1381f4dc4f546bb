"""Files that are read to be searched: a text file is one document, a PDF one for each page, and long ones are cut."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.memory import Held
from fedllm.data.strict import WHOLE
from fedllm.data.table import Table
from fedllm.tasks.row import is_blank

log = logging.getLogger(__name__)
BETWEEN = re.compile(r"\n\s*\n")
"""Between two paragraphs."""


def _text(path: Path, room: Held) -> Table:
    if (size := path.stat().st_size) > WHOLE:
        raise DataError(f"{path} has {size:,} bytes, and a text that is one document may have {WHOLE:,}; cut it into "
                        "files", file=str(path), kind="unreadable")
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise DataError(f"{path} holds NUL bytes: it is UTF-16, or damaged; save it as UTF-8", kind="unreadable")
    room.takes(path, len(text))
    return Table(str(path), [] if is_blank(text) else [{"id": path.name, "text": text}])


def _pdf(path: Path, room: Held) -> Table:
    """One row for each page that holds text; a scanned page holds none, and it is said how many were passed over."""
    try:
        import pypdf
        from pypdf.errors import FileNotDecryptedError
    except ImportError:
        raise RecipeError(f"{path}: PDF files need the optional extra: pip install 'fedlm[rag]'") from None
    rows, empty = [], 0
    if not path.stat().st_size:
        return Table(str(path), [])
    try:
        for number, page in enumerate(pypdf.PdfReader(path).pages, start=1):
            text = page.extract_text()
            room.takes(path, len(text))
            if is_blank(text):
                empty += 1
            else:
                rows.append({"id": f"{path.name}, page {number}", "text": text})
    except DataError:
        raise
    except FileNotDecryptedError:
        raise DataError(f"{path} is locked with a password; save it without one, or move it out of the folder",
                        file=str(path), kind="unreadable") from None
    except Exception as error:  # pypdf raises errors of many kinds for a file that is none
        raise DataError(f"{path} is not a PDF that can be read: {type(error).__name__}: {error}"[:400],
                        kind="unreadable") from error
    if empty and rows:
        log.warning("%s: %d of %d pages hold no text (scans?) and are left out", path, empty, empty + len(rows))
    if empty and not rows:
        raise DataError(f"{path}: none of its {empty} pages holds text; it is a scan, whose text another program must "
                        "read first", file=str(path), kind="empty")
    return Table(str(path), rows)


DOCUMENTS: Mapping[str, Callable[[Path, Held], Table]] = {".txt": _text, ".md": _text, ".pdf": _pdf}
"""How files are read where `data.task` is documents; those of other endings hold a document a row, as ever."""


def told_apart(tables: Sequence[Table]) -> list[Table]:
    """The same tables; documents of files of one name are called by their folders too (`north/rules.txt`)."""
    alike = defaultdict(list)
    for table in tables:
        if Path(table.name).suffix.lower() in DOCUMENTS:
            alike[Path(table.name).name].append(Path(table.name).parts)
    known = {path: end for paths in alike.values() for path, end in ends(paths).items()}
    return [_called(t, known[Path(t.name).parts]) if Path(t.name).parts in known else t for t in tables]


def ends(paths: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """What each of these paths is called: its end, as long as it must be to be no other's."""
    out: dict[tuple[str, ...], str] = {}
    for n in range(1, 1 + max(map(len, paths))):
        count = Counter(p[-n:] for p in paths)
        out |= {p: "/".join(p[-n:]) for p in paths if p not in out and count[p[-n:]] == 1}
    return out


def _called(table: Table, name: str) -> Table:
    short = Path(table.name).name
    return replace(table, rows=[{**row, "id": name + str(row["id"]).removeprefix(short)} for row in table.rows])


def passages(table: Table, column: str, words: int) -> Table:
    """The same rows, those of more than so many words in several: `<id>#1`, `<id>#2`, ..."""
    rows: list[Mapping[str, Any]] = []
    lines: list[int] = []
    for i, row in enumerate(table.rows):
        text = row.get(column)
        pieces = cut(text, words) if isinstance(text, str) else []
        name = row.get("id", f"{Path(table.name).name}/{i + 1}")
        more = [{**row, column: p, "id": f"{name}#{k}"} for k, p in enumerate(pieces, start=1)]
        rows += more if len(more) > 1 else [row]
        lines += [table.lines[i]] * max(1, len(more)) if table.lines else []
    return replace(table, rows=rows, lines=lines)


def cut(text: str, words: int) -> list[str]:
    """Pieces of at most so many words: whole paragraphs where they fit, else whole sentences, else words."""
    out: list[str] = []
    for paragraph in BETWEEN.split(text):
        for part in [paragraph] if len(paragraph.split()) <= words else _sentences(paragraph, words):
            if out and len(out[-1].split()) + len(part.split()) <= words:
                out[-1] += "\n\n" + part.strip()
            elif part.strip():
                out.append(part.strip())
    return out


def _sentences(paragraph: str, words: int) -> Sequence[str]:
    out: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", paragraph):
        said = sentence.split()
        pieces = [" ".join(said[i: i + words]) for i in range(0, len(said), words)] if len(said) > words else [sentence]
        for piece in pieces:
            if out and len(out[-1].split()) + len(piece.split()) <= words:
                out[-1] += " " + piece
            else:
                out.append(piece)
    return out
