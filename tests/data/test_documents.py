"""Documents: files that are read whole or page by page, cut into passages, and held out of nothing."""

import io
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.data.documents import cut
from fedllm.data.load import load_federation
from fedllm.tasks.registry import task_of
from fedllm.tasks.task import How


def pdf(*pages):
    """A PDF with a line of text on each page (None: an empty page), made by hand."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    parts = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
             "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for i, text in enumerate(pages):
        show = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        parts += [f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
                  "/Resources << /Font << /F1 3 0 R >> >> >>", f"<< /Length {len(show)} >>\nstream\n{show}\nendstream"]
    out, at = "%PDF-1.4\n", []
    for number, part in enumerate(parts, start=1):
        at.append(len(out))
        out += f"{number} 0 obj\n{part}\nendobj\n"
    rows = "".join(f"{a:010d} 00000 n \n" for a in at)
    return (out + f"xref\n0 {len(at) + 1}\n0000000000 65535 f \n{rows}trailer\n<< /Size {len(at) + 1} /Root 1 0 R >>\n"
            f"startxref\n{len(out)}\n%%EOF\n").encode()


def read(source, **keys):
    spec = {"source": str(source), "task": "documents", "partition": {"kind": "per_file"}, **keys}
    return {c: list(s.train) for c, s in load_federation(spec, 0).clients.items()}


def test_a_folder_of_all_kinds(tmp_path):
    pytest.importorskip("pypdf")
    (tmp_path / "rules.txt").write_text("A clerk signs every invoice.\nThe court opens at nine.")
    (tmp_path / "ward.md").write_text("# Ward\n\n" + "\n\n".join(f"Paragraph {i} " + "word " * 30 for i in range(4)))
    (tmp_path / "scan.pdf").write_bytes(pdf("Visits end at eight", None, "The east line is closed"))
    (tmp_path / "notes.jsonl").write_text(json.dumps({"body": "a note", "id": 7}) + "\n")
    parquet.write_table(pa.table({"body": ["a row of Parquet"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"notes\.jsonl.*'text'"):
        read(tmp_path)
    for name in ("notes.jsonl", "rows.parquet"):
        (tmp_path / name).rename(tmp_path.parent / f"{tmp_path.name}-{name}")
    got = read(tmp_path, passages=70)
    assert got["rules"] == [{"id": "rules.txt", "text": "A clerk signs every invoice.\nThe court opens at nine."}]
    assert [r["id"] for r in got["scan"]] == ["scan.pdf, page 1", "scan.pdf, page 3"]
    assert "Visits end at eight" in got["scan"][0]["text"]
    assert [r["id"] for r in got["ward"]] == ["ward.md#1", "ward.md#2"]
    assert all(len(r["text"].split()) <= 70 for r in got["ward"])
    table = tmp_path.parent / f"{tmp_path.name}-notes.jsonl"
    other = tmp_path.parent / f"{tmp_path.name}-rows.parquet"
    rows = read(table, fields={"text": "body"}), read(other, fields={"text": "body"})
    assert [r["text"] for part in rows for one in part.values() for r in one] == ["a note", "a row of Parquet"]
    assert next(iter(rows[0].values()))[0]["id"] == "7"


def test_what_is_no_document_is_refused(tmp_path):
    pytest.importorskip("pypdf")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nnothing of the kind")
    with pytest.raises(DataError, match=r"broken\.pdf is not a PDF that can be read"):
        read(tmp_path)
    (tmp_path / "broken.pdf").write_bytes(pdf(None, None))
    with pytest.raises(DataError, match="none of its 2 pages holds text; it is a scan"):
        read(tmp_path)
    (tmp_path / "broken.pdf").unlink()
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"unknown extension .\.pdf."):
        (tmp_path / "x.pdf").write_bytes(pdf("x"))
        load_federation({"source": str(tmp_path / "x.pdf"), "task": "masked_words"}, 0)


def test_keys_of_documents(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(RecipeError, match=r"data\.passages = 50 is of no use to data\.task = 'masked_words'"):
        load_federation({"source": str(tmp_path), "task": "masked_words", "passages": 50}, 0)
    with pytest.raises(RecipeError, match=r"data\.passages = 5: Input should be greater than or equal to 10"):
        read(tmp_path, passages=5)
    with pytest.raises(RecipeError, match="none is held out of the index"):
        read(tmp_path, client_test=0.5)
    with pytest.raises(CompositionError, match="documents are searched, and nothing is learned from them"):
        task_of("documents").encode([{"text": "a"}], How(None))


def test_cutting_keeps_every_word():
    text = "One two three. Four five six seven eight nine ten eleven twelve.\n\n" + "w " * 25 + "\n\nlast words"
    pieces = cut(text, 10)
    assert " ".join(pieces).split() == text.split() and max(len(p.split()) for p in pieces) <= 10
    assert cut("short", 10) == ["short"] and cut(" \n\n ", 10) == []


def test_folders_of_a_folder_are_read_and_files_of_one_name_are_told_apart(tmp_path, caplog):
    for name, text in {"a.txt": "top", "north/rules.txt": "one", "south/deep/rules.txt": "two", "south/x.docx": "?",
                       ".git/rules.txt": "hidden", "north/empty.txt": " \n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to(tmp_path)  # a circle
    got = {r["id"]: r["text"] for rows in read(tmp_path).values() for r in rows}
    assert got == {"a.txt": "top", "north/rules.txt": "one", "deep/rules.txt": "two"}
    assert "south/x.docx are left out, as what is not read" in caplog.text and "link/" in caplog.text
    assert "empty.txt is left out, as what holds nothing" in caplog.text
    with pytest.raises(DataError, match="; north/ is not looked into: name the folder itself"):
        (tmp_path / "rows" / "north").mkdir(parents=True)
        load_federation({"source": str(tmp_path / "rows"), "task": "masked_words"}, 0)


def test_a_pdf_that_is_locked_or_empty(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("a secret page")))
    for user, said in (("word", "locked with a password; save it without one"), ("", None)):
        writer.encrypt(user, "owner", algorithm="RC4-128")
        writer.write(tmp_path / "a.pdf")
        if said is None:
            assert read(tmp_path)["a"][0]["text"] == "a secret page"  # anybody may read it, and not all may print it
        else:
            with pytest.raises(DataError, match=said):
                read(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.pdf is empty: it holds no rows"):
        read(tmp_path)
