"""Marked rows at every error path of a site: all bytes that crossed are searched for the marks, over both lines."""

import base64
import json
import secrets

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.core.errors import DataError, PayloadError
from fedllm.core.payload import pack
from fedllm.engines.far.desk import Desk
from fedllm.engines.far.reasons import NUMBERS, REASONS, Refused, coded, sentence
from fedllm.engines.far.site import SiteHost
from fedllm.engines.far.sites import PROTOCOL
from fedllm.federation.opening import for_sites
from fedllm.federation.settings import SiteSettings
from fedllm.federation.site import open_run
from fedllm.methods.baselines.fedavg import FedAvg
from fedllm.runs.recipe import load_recipe
from fedllm.runs.resolved import versions
from fedllm.wire import codec

MARK = "Zoe Quick, HIV positive 7041"


def crossed(said, body):
    """What a line carries of an answer, with everything that base64 may hide."""
    flat = json.dumps(said).encode() + bytes(body)
    for word in json.dumps(said).split('"'):
        try:
            flat += base64.b64decode(word, validate=True)
        except ValueError:
            continue
    return flat


def clean(data):
    """No mark, nor a part of one, is in these bytes."""
    low = data.lower()
    return not any(part.lower().encode() in low for part in (MARK, "Zoe", "Quick", "HIV", "7041"))


class NvflareLine:
    """As NVFlare's job process hands messages on."""

    def __init__(self, settings):
        self.host = SiteHost(lambda head: open_run(head, "site-a", settings))

    def call(self, head, body=b""):
        return self.host.answer(json.loads(json.dumps(head)), body)


class FlowerLine:
    """As Flower's resident process does: work is fetched."""

    def __init__(self, settings):
        self.desk = Desk(lambda head: open_run(head, "site-a", settings), hold=60.0)

    def call(self, head, body=b""):
        return self.desk.answer({**json.loads(json.dumps(head)), "ticket": "t"}, body)


LINES = pytest.mark.parametrize("line", [NvflareLine, FlowerLine])


def asked(folder, model, line, file, **changed):
    """Open a run over a file of the site's and ask once; all that crossed, and the first answer."""
    data = {"source": str(file), "test": 0.0, **changed.pop("data", {})}
    recipe = load_recipe({"model": model, "space": {"name": "lora", "rank": 2}, "rounds": 1, "data": data,
                          "local": {"steps": 1, "batch_size": 4, **changed.pop("local", {})},
                          "evaluate": {"exact_match": False, "samples": 0}, **changed})
    mine = SiteSettings(data=str(file), store=str(folder / "store"), models=[model], rows_may_change=True)
    made, out = line(mine), b""
    head = {"protocol": PROTOCOL, "op": "open", "run": "r", "at": 0, "incarnation": "i", "recipe": for_sites(recipe),
            "versions": versions(), "sites": ["site-a"]}
    first, body = made.call(head)
    out += crossed(first, body)
    theta = {"w": torch.zeros(2)}
    for phase in ("FedAvg.local", "FedAvg.score", "FedAvg.nothing"):
        ask = {"protocol": PROTOCOL, "op": "ask", "round": 0, "visit": 1, "phase": phase, "attempt": "a",
               "stack": ["FedAvg"]}
        out += crossed(*made.call(ask, bytes(codec.encode(pack(theta=theta, on="local")))))
    return first, out


GOOD = {"prompt": MARK, "response": MARK}
BROKEN = {
    "ragged.csv": (f"prompt,response\nsay,red\n{MARK},{MARK},{MARK}\n", {}),
    "quoted.csv": (f'prompt,response\n"{MARK},red\n', {}),
    "broken.jsonl": (json.dumps(GOOD) + f'\n{{"prompt": "{MARK}", \n', {}),
    "no_object.jsonl": (json.dumps([MARK]) + "\n", {}),
    "no_field.jsonl": (json.dumps({MARK: MARK, "other": MARK}) + "\n", {}),
    "label.jsonl": (json.dumps({"text": MARK, "label": MARK}) + "\n", {"task": "classification", "labels": ["x"]}),
    "odd_label.jsonl": (json.dumps({"text": MARK, "label": [MARK]}) + "\n",
                        {"task": "classification", "labels": ["x"]}),
    "odd_text.jsonl": (json.dumps({"text": [MARK], "label": "x"}) + "\n", {"task": "classification", "labels": ["x"]}),
    "fields.jsonl": (json.dumps(GOOD) + "\n", {"fields": {"prompt": "none"}}),
    "template.jsonl": (json.dumps(GOOD) + "\n", {"template": "{prompt} {absent}"}),
    "chat.jsonl": (json.dumps({"messages": [{"role": MARK, "content": MARK}]}) + "\n", {"template": "chat"}),
    "latin.txt": (MARK.encode() + b"\xff\xfe\x80" + MARK.encode(), {}),
    "empty.csv": ("prompt,response\n", {}),
    "parquet.parquet": (MARK.encode(), {}),
    "json.json": (json.dumps({"a": MARK}), {}),
    "null.jsonl": (json.dumps({"prompt": None, "response": MARK}) + "\n", {"template": "question_answer"}),
}


@LINES
@pytest.mark.parametrize("name", BROKEN)
def test_rows_that_cannot_be_read_are_told_by_a_code(tmp_path, tiny_llama_folder, line, name):
    content, data = BROKEN[name]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    first, out = asked(tmp_path, tiny_llama_folder, line, file, data=data)
    assert clean(out), out
    assert first["refused"]["code"] in REASONS and set(first["refused"]) <= {"code", *NUMBERS}


def with_own_local(tmp_path, monkeypatch, local):
    """FedAvg's client code is `local`; the file of twelve good rows that it is asked over."""
    local.__dict__.update(FedAvg.local.__dict__)
    monkeypatch.setattr(FedAvg, "local", local)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(GOOD) + "\n" for _ in range(12)))
    return file


class Crash(Exception):
    """An error of client code whose text, name and arguments hold a row."""


@LINES
@pytest.mark.parametrize("error", [
    ValueError(MARK), KeyError(MARK), Crash(MARK, MARK), PayloadError(MARK), DataError(f"{MARK}.csv, row 7041: {MARK}"),
    MemoryError(MARK), OSError(5, MARK, MARK), torch.OutOfMemoryError(MARK), RecursionError(MARK),
    UnicodeDecodeError("utf-8", MARK.encode(), 0, 1, MARK), type(f"Zoe{secrets.token_hex(1)}", (Exception,), {})(MARK)],
    ids=lambda e: "its own kind" if type(e).__name__.startswith("Zoe") else type(e).__name__[:12])
def test_client_code_that_fails_with_a_row_in_its_words(tmp_path, tiny_llama_folder, line, error, monkeypatch):
    def fails(self, msg, client):
        raise error

    file = with_own_local(tmp_path, monkeypatch, fails)
    first, out = asked(tmp_path, tiny_llama_folder, line, file)
    assert "refused" not in first and clean(out), out
    assert b"refused" in out


@pytest.mark.parametrize("reply", [
    {"loss": MARK}, {MARK: torch.zeros(2)}, {"x": [[MARK]]}, {"x": MARK.encode()}, {"x": {"a": MARK}},
    {"delta/w": torch.zeros(2), f"note/{MARK}": 1.0}, {"x": json.dumps([MARK])}, {"x": [1, b"a", (MARK,)]}],
    ids=["text", "key", "nested", "bytes", "mapping", "note", "json", "tuple"])
def test_a_reply_that_holds_a_row_stays(tmp_path, tiny_llama_folder, reply, monkeypatch):
    def tells(self, msg, client):
        return reply

    file = with_own_local(tmp_path, monkeypatch, tells)
    first, out = asked(tmp_path, tiny_llama_folder, NvflareLine, file)
    assert "refused" not in first and clean(out) and b"may_not_leave" in out, out


ODD = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(MARK),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
                   max_leaves=6)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30), numbers=st.dictionaries(st.sampled_from([*NUMBERS, "other"]), ODD, max_size=4))
def test_whatever_an_error_says_only_a_code_and_numbers_cross(text, numbers):
    for error in (DataError(f"{text}{MARK}"), Refused("data", f"{text}{MARK}", **numbers), ValueError(MARK + text),
                  DataError(f"/no/such/{text}.csv, row 3: {MARK}")):
        said = coded(error)
        assert said["code"] in REASONS and set(said) <= {"code", *NUMBERS}
        assert all(type(v) is int for k, v in said.items() if k != "code")
    assert clean(sentence({"code": text, **numbers}).encode()) and len(sentence({"code": MARK * 99})) < 100


def test_the_row_of_an_own_file_is_told_as_a_number(tmp_path):
    file = tmp_path / "notes.csv"
    file.write_text("a,b\n")
    assert coded(DataError(f"{file}, row 3: {MARK}")) == {"code": "data", "row": 3}
    assert coded(DataError(f"{file}, line 12: {MARK}")) == {"code": "data", "line": 12}
    assert sentence({"code": "data", "row": 3}).endswith("(row 3)")
