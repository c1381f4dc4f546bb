"""FedMKT: one tokenizer is an identity, two meet where they cover the same letters, and its distillation is exact."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedllm.core.errors import CompositionError
from fedllm.core.program import drive
from fedllm.local.objectives.distill import Distill
from fedllm.local.objectives.top_words import Told, TopWords
from fedllm.methods._knowledge import Knowledge, bridge, knows, picked, targets
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.token_map import ENDS, Words, by_span, by_warping, distances, surfaces


def reader(names, ends=("</s>",), specials=("</s>",)):
    """A model as far as its words matter."""
    tok = type("Tok", (), {"convert_ids_to_tokens": lambda self, ids: [names[i] for i in ids],
                           "all_special_tokens": list(specials), "__len__": lambda self: len(names)})()
    return SimpleNamespace(tokenizer=tok, words=[None] * len(names), ends={names.index(e) for e in ends})


def test_what_tokens_of_each_kind_of_vocabulary_write():
    assert surfaces(reader(["</s>", "Ġred", "Ã©", "Ċ", "ish"]))[:5] == (ENDS, " red", "Ã©", "\n", "ish")
    assert surfaces(reader(["</s>", "▁red", "é"])) == (ENDS, " red", "é".encode().decode("latin-1"))
    assert surfaces(reader(["</s>", "red", "##ish"])) == (ENDS, " red", "ish")
    assert surfaces(reader(["</s>", "red", "w1"])) == (ENDS, " red", " w1")


CHARS, PAIRS = [*"abcdef", ENDS], ["ab", "cd", "ef", "a", "f", ENDS]


@pytest.mark.parametrize("match", [by_span, by_warping])
def test_equal_sequences_are_matched_one_to_one(match):
    assert match(CHARS, CHARS) == list(range(len(CHARS)))


def test_letters_against_pairs():
    assert by_span([*"abcf", ENDS], ["ab", "c", "f", ENDS]) == [-1, -1, 1, 2, 3]
    assert by_warping([*"abcf", ENDS], ["ab", "c", "f", ENDS]) == [-1, -1, 1, 2, 3]
    assert by_span([" x", "yz"], ["x", "y", "z"]) == [0, -1]  # a blank is no letter


def test_a_word_goes_to_the_same_writing_else_to_the_nearest():
    over = Words([" red", "redd", "qq", ENDS], ["red", "blue", ENDS, "zqz"])
    assert over.of(np.array([[0, 1], [2, 3]])).tolist() == [[0, 0], [3, 2]]
    assert distances([" ab"], ["abc", "b"]).tolist() == [[1, 1]]


def of(client, theta, method):
    rows = method.rows(client, 0)
    return rows, knows(client, theta, rows, 64, 1.0)


@pytest.fixture
def one(begin):
    """A run, and its first client's call in the round at hand."""
    run = begin("fedmkt", engine="in_process", top_k=64, alignment=4)
    seen = {}

    class Look(type(run.method)):
        """Hands out the client's call."""

    def tell(self, msg, client):
        seen[client.id] = client
        return kept(self, msg, client)

    kept = type(run.method).tell
    tell.__dict__.update(kept.__dict__)
    Look.tell = tell
    Look.__name__ = "FedMKT"
    object.__setattr__(run.method, "__class__", Look)
    run.go(1)
    return run, seen["c0"]


def test_all_words_and_no_labels_are_exact_distillation(one, gap):
    run, client = one
    model, theta = client.model, client.model.initial()
    rows = run.method.rows(client, 0)
    other = {n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0)) for n, t in theta.items()}
    with torch.no_grad(), model.using([other]):
        z = [model.target_logits(collate([[r]], model.pad, model.device))[1] for r in rows]
    told = knows(client, other, rows, 64, 1.0)
    mine = client.fit(theta, on=rows, steps=3, objective=TopWords(0.0), side=told.side()).theta
    again = replace_rng(client)
    plain = again.fit(theta, on=rows, steps=3, objective=Distill(), side={"teacher": z}).theta
    assert gap(mine, plain) < 1e-5 and gap(mine, theta) > 1e-3


def replace_rng(client):
    """The same call with its streams at their start."""
    client._streams = {}
    return client


def test_one_tokenizer_is_an_identity_and_dtw_and_skip_say_the_same(one):
    run, client = one
    rows, told = of(client, client.memory["theta"], run.method)
    tokens, words = [targets(r) for r in rows], surfaces(client.model)
    for how in ("spans", "dtw", "skip"):
        over = bridge(client, rows, tokens, words, how)
        for a, b in zip(over.there(over.here(told)).top, told.top, strict=True):
            assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def test_two_tokenizers_meet_where_they_cover_the_same_letters(one):
    """The server cuts every other word into two pieces, and has other numbers for all."""
    run, client = one
    rows, told = of(client, client.memory["theta"], run.method)
    own = surfaces(client.model)
    words = [ENDS, "w", *(str(i) for i in range(60)), *(f" w{i}" for i in range(0, 60, 2))]
    cut = lambda w: [0] if w == ENDS else [62 + int(w[2:]) // 2] if int(w[2:]) % 2 == 0 else [1, 2 + int(w[2:])]  # noqa: E731
    theirs = [np.array([x for i in targets(r) for x in cut(own[i])]) for r in rows]
    assert {len(cut(own[i])) for r in rows for i in targets(r)} == {1, 2}
    over = bridge(client, rows, theirs, words, "spans")
    got = over.there(told)
    for (w, p), base, mine, (_, mp) in zip(got.top, theirs, over.mine, told.top, strict=True):
        assert p.sum(1) == pytest.approx(1.0, abs=1e-6) and w.max() < len(words)
        assert all(w[i, 0] == base[i] and p[i, 0] == 1.0 for i in range(len(base)) if 0 < base[i] < 62)
        whole = [i for i, x in enumerate(base) if x >= 62]
        assert [words[base[i]] for i in whole] == [own[i] for i in mine if own[i] in words[62:]]
        assert all(p[i] == pytest.approx(q) for i, q in zip(whole, [q for x, q in zip(mine, mp, strict=True)
                                                                    if own[x] in words[62:]], strict=True))
    with pytest.raises(CompositionError, match=r"client 'c0' reads the public rows by another tokenizer"):
        bridge(client, rows, theirs, words, "skip")
    with pytest.raises(CompositionError, match=r"have no text in common: of \d+ tokens"):
        bridge(client, rows, [np.zeros(3, np.int64) + 1 for _ in rows], ["\0x", "qqqqqqqqqqq"], "spans")


def test_who_finds_the_answer_likeliest_teaches():
    rows = lambda p, ce: Knowledge([(np.array([[0, 1]]), np.array([[p, 1 - p]]))] * 2, np.array(ce))  # noqa: E731
    own, a, b = rows(0.1, [1.0, 2.0]), rows(0.2, [3.0, 1.0]), rows(0.3, [2.0, 5.0])
    first = lambda k: [float(p[0, 0]) for _, p in k.top]  # noqa: E731
    assert first(picked([own, a, b], "greater")) == [0.1, 0.2]
    assert first(picked([own, a, b], "other")) == [0.3, 0.2]
    mixed = picked([own, a], "weighted_mean")
    weight = np.exp(-np.array([1.0, 3.0]))
    assert mixed.top[0][1][0] == pytest.approx(np.concatenate([x * np.array([p, 1 - p]) for x, p in zip(
        weight / weight.sum(), (0.1, 0.2), strict=True)]))


def test_what_is_measured_is_each_targets_likeliest_words(one):
    run, client = one
    model, theta, rows = client.model, client.memory["theta"], run.method.rows(client, 0)
    told = knows(client, theta, rows, 3, 2.0)
    for r, (w, p), ce in zip(rows, told.top, told.ce, strict=True):
        with torch.no_grad(), model.using([theta]):
            _, z, y = model.target_logits(collate([[r]], model.pad, model.device))
        assert np.array_equal(w, z.topk(3)[1].numpy()) and len(w) == r.n_target
        assert p == pytest.approx((z / 2).topk(3)[0].softmax(-1).numpy())
        assert ce == pytest.approx(float(torch.nn.functional.cross_entropy(z, y, reduction="sum")))
    assert Told(3, 4) == Told(3, 4)  # clients share a forward


def test_reply_of_other_shape_is_refused_and_the_round_goes_on(begin):
    run = begin("fedmkt", engine="in_process", top_k=4, alignment=4)
    kept = type(run.method).tell

    class Bad(type(run.method)):
        """One client's words are none of the server's."""

    def tell(self, msg, client):
        reply = kept(self, msg, client)
        return {**reply, "words": reply["words"] + 1000} if client.id == "c1" else reply

    tell.__dict__.update(kept.__dict__)
    Bad.tell, Bad.__name__ = tell, "FedMKT"
    object.__setattr__(run.method, "__class__", Bad)
    run.go(1)
    [said] = [e for e in run.engine.record.events if e["kind"] == "refused"]
    assert said["client"] == "c1" and "none of 64" in said["why"]


def test_no_public_rows_and_other_tasks_are_refused(begin):
    run = begin("fedavg", task="classification", space="full")
    with pytest.raises(CompositionError, match=r"needs language models that can be trained, and data.task"):
        make_method("fedmkt").check(run.world.model)
    assert make_method("fedmkt").public_at() == ("clients", "server")  # by which a recipe without is refused


def test_the_server_keeps_its_model_where_it_takes_no_steps(begin, gap):
    run = begin("fedmkt", engine="in_process", top_k=4, alignment=4, teach_steps=0)
    before = dict(run.state["theta"])
    run.go(1)
    assert gap(run.state["theta"], before) == 0
    scores = drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine)
    assert all(s["n"] for s in scores.values())  # every client is tested with its own
