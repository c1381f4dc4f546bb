"""The family of knowledge without weights: who belongs to it, what crossed of which kind, and arms for newcomers."""

import json

import pytest
import torch

from evidence.pages import knowledge
from fedllm.core.form import Form, by_part
from fedllm.core.record import Record

ISSUE = (
    "crosslm", "fedmkt", "fedcollm", "fedcot", "fdkt", "fedmd", "multi_fm_kd", "mllm_fl", "dense", "fedaffect",
    "offsite_tuning", "fedbiot", "dp_offsite_peft", "inferdpt", "public_dp_distill", "llm_synth_pretrain",
    "synth_warmstart", "llm_synth_classify", "self_instruct_local", "sycophancy_synth", "fed_synth_upload")


def test_members_are_found_by_what_they_say_of_themselves():
    members = knowledge.members()
    assert set(ISSUE) <= set(members)
    assert not {"fedavg", "fedbpt", "fedclip", "local_only"} & set(members)


def test_parts_of_a_message_are_counted_by_what_they_hold():
    z = torch.zeros(4, 3)
    got = by_part({"theta/a": z, "theta/b": z, "z": z.half(), "texts": ["ab", "ü"], "n": 12, "ids": [1, 23],
                   "key": b"xyz", 3: 1.5})
    assert got == {"tree theta": 96, "tensor z": 24, "text texts": 4, "number n": 2, "number ids": 3, "bytes key": 3,
                   "number other": 3}


def test_what_nobody_declared_is_not_written_down_by_its_name():
    """A client may call a part whatever it likes; what the form calls a layout is of the protocol."""
    form = Form.of("n: rows, m: tree, ids: layout, said: texts")
    assert by_part({"n": 1, "a secret": "abc", "m/x": torch.zeros(2), "ids": [["ab", 1]], "said": ["c"]}, form) == {
        "number n": 1, "text other": 3, "tree m": 8, "name ids": 3, "text said": 1}


@pytest.mark.parametrize(("part", "kind"), [
    ("tree delta", "weights"), ("tree A", "weights"), ("tensor z", "logits"), ("tensor grades", "logits"),
    ("tensor mean", "features"), ("text new", "text"), ("tensor tokens", "text"), ("number n", "rest"),
    ("tree note", "rest"), ("tree other", "rest"), ("tensor other", "rest"),
    ("text _dp", "rest"), ("name rows", "rest"), ("tree *", "weights")])
def test_a_part_has_a_kind(part, kind):
    assert knowledge.kind_of(part) == kind and kind in knowledge.KINDS


def test_bytes_of_kinds_add_up_to_the_bytes_of_rounds(tmp_path):
    lines = []
    record = Record(lines.append)
    record.crossed("up", "X.tell", "a", 200, 0, "X", parts={"tensor z": 96, "number loss": 4})
    record.crossed("down", "X.tell", "a", 64, 0, "X", parts={"text new": 10})
    record.testing().crossed("up", "X.score", "a", 999, 0, "X", parts={"number n": 1})
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    got = knowledge.crossed(tmp_path)
    assert got == {("logits", "up"): 96, ("rest", "up"): 104, ("text", "down"): 10, ("rest", "down"): 54}
    assert sum(got.values()) == sum(record.bytes.values())


def test_newcomers_get_an_arm_and_what_does_not_fit_the_builds_own_sentence(tmp_path, tiny_bert_folder, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"red word {'cat' if i % 2 else 'dog'}",
                                                             "label": "even" if i % 2 else "odd"}) + "\n"
                                                 for i in range(24)))
    base = {"model": tiny_bert_folder, "data": {
        "source": str(tmp_path / "rows.jsonl"), "task": "classification", "partition": {"kind": "iid", "clients": 2},
        "public": 0.2}, "method": "fedavg", "space": "full", "rounds": 1, "local": {"steps": 1}}
    family = {"title": "t", "paper": "p", "shows": ["s"], "base": base, "settings": {
        "one": {"arms": {"fedavg": {"method": "fedavg"}}}}}
    monkeypatch.setattr(knowledge, "members", lambda: ["fedavg", "fedmd", "fedmkt"])
    got, misfits = knowledge.filled(family, tmp_path)
    arms = got["settings"]["one"]["arms"]
    assert list(arms) == ["fedavg", "fedmd"] and arms["fedmd"]["method"]["name"] == "fedmd"
    assert [(m.setting, m.method) for m in misfits] == [("one", "fedmkt")]
    assert "data.task" in misfits[0].why and not (tmp_path / "tried.yaml").exists()
    assert list(family["settings"]["one"]["arms"]) == ["fedavg"]
