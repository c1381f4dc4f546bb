"""A site's index is brought up to date in place, and sites are chosen by what their samples say."""

import numpy as np
import pytest
import torch

from fedllm.models import indexing, reading, routing
from fedllm.models import retrieval as rt

pytest.importorskip("bm25s")


class Encoder:
    """Counts what it is asked to embed; a text's vector follows from its letters."""

    def __init__(self):
        self.read = []

    def __call__(self, texts):
        self.read += texts
        return np.stack([np.bincount([ord(c) % 16 for c in t] or [0], minlength=16) for t in texts]).astype(np.float32)


def test_only_what_is_new_is_read_again():
    memory, encoder = {}, Encoder()
    assert indexing.update(memory, ["a b", "c d", "e f"], True, encoder) == indexing.Changed(3, 0, 3)
    before = {k: id(v) for k, v in memory.items()}
    assert indexing.update(memory, ["a b", "c d", "e f"], True, encoder) == indexing.Changed(0, 0, 3)
    assert encoder.read == ["a b", "c d", "e f"] and {k: id(v) for k, v in memory.items()} == before
    assert indexing.update(memory, ["e f", "new", "a b"], True, encoder) == indexing.Changed(1, 1, 3)
    assert encoder.read[3:] == ["new"]
    fresh = {}
    indexing.update(fresh, ["e f", "new", "a b"], True, Encoder())
    assert all(torch.equal(memory[k], fresh[k]) for k in ("vectors", "marks")) and memory["words"] == fresh["words"]
    assert all(torch.equal(memory["bm25"][k], fresh["bm25"][k]) for k in fresh["bm25"])
    indexing.update(memory, ["e f", "new", "a b"], True, encoder, "another")
    assert encoder.read[4:] == ["e f", "new", "a b"]  # another encoder's vectors are no use
    assert indexing.update(memory, [], True, None).gone == 3 and len(memory["marks"]) == 0


def test_an_index_that_lacks_a_part_or_is_of_other_documents_is_made_anew_once():
    """Another version's, or of documents that have changed since; the memory itself stays as it was."""
    followed, encoder, rows, made = indexing.Followed(), Encoder(), ["a b", "c d"], []

    def of(memory, rows=rows):
        return followed.of("c", rows, lambda: rows, memory, ["bm25", "words", "vectors"],
                           lambda m: made.append(1) or indexing.update(m, rows, True, encoder))

    memory = {}
    indexing.update(memory, rows, True, encoder)
    assert of(memory) is memory and not made
    for lost in ("words", "bm25", "vectors"):
        part = {k: v for k, v in memory.items() if k != lost}
        followed.__init__()
        again = of(part)
        assert lost in again and lost not in part and of(part) is again and again["words"] == memory["words"]
    assert len(made) == 3 and len(of(memory, ["e f"])["marks"]) == 1 and len(made) == 4


def test_both_rankings_are_added_each_by_its_own_spread():
    memory, encoder = {}, Encoder()
    texts = ["red cat", "blue dog", "green bird"]
    indexing.update(memory, texts, True, encoder)
    vector = indexing.unit(encoder(["red cat"]))[0]
    words, _ = indexing.scores(memory, "bm25", "red cat", None)
    near, hit = indexing.scores(memory, "vectors", "red cat", vector, least=0.9)
    both, _ = indexing.scores(memory, "both", "red cat", vector)
    assert hit.tolist() == (near > 0.9).tolist() and hit[0] and near[0] == pytest.approx(1.0)
    assert np.allclose(both, indexing.standard(words) + indexing.standard(near)) and both.argmax() == 0


def test_redde_by_hand():
    samples = {"a": torch.eye(3)[:2], "b": torch.eye(3)[2:]}
    got = routing.redde(torch.tensor([0.9, 0.5, 0.1]), samples, {"a": 10, "b": 100}, depth=2)
    assert got["a"] == pytest.approx(1.0, abs=1e-5) and got["b"] == pytest.approx(0.0, abs=1e-5)
    deep = routing.redde(torch.tensor([0.9, 0.5, 0.1]), samples, {"a": 10, "b": 100}, depth=3)
    assert deep["b"] == pytest.approx(100 / 110, abs=1e-5)  # one sample of b stands for a hundred documents
    assert routing.best(deep, 1) == ["b"] and routing.best({"y": 1.0, "x": 1.0}, 1) == ["x"]


def test_the_learned_map_is_the_closed_form():
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    w = routing.fit(x, y, ridge=0.5)
    one = torch.cat([x, torch.ones(9, 1, dtype=torch.float64)], 1)
    slope = one.T @ (one @ w - y) + torch.diag(torch.tensor([0.5, 0.5, 0.5, 1e-9])).double() @ w
    assert slope.abs().max() < 1e-9
    samples = {"a": torch.eye(4)[:2], "b": torch.eye(4)[2:].repeat(5, 1)}
    chart = routing.of_samples(samples)
    assert routing.best(routing.learned(torch.eye(4)[0], chart, list(samples)), 1) == ["a"]
    assert routing.best(routing.learned(torch.eye(4)[3], chart, list(samples)), 1) == ["b"]
    centers = routing.centers_of(torch.eye(4), 1, np.random.default_rng(0))
    assert torch.allclose(centers, torch.full((1, 4), 0.5))
    assert routing.centers_of(torch.eye(4).repeat(3, 1), 2, np.random.default_rng(0)).shape == (2, 4)


def test_merging_by_lists_values_and_turns():
    lists = {"a": [("x", 30.0), ("y", 20.0), ("z", 10.0)], "b": [("u", 0.9), ("x", 0.1)]}
    worth = {d: w for d, w, _ in rt.merge(lists, "minmax")}
    assert worth == {"x": 1.0, "y": 0.5, "z": 0.0, "u": 1.0}
    cori = {d: w for d, w, _ in rt.merge(lists, "cori", value={"a": 1.0, "b": 3.0})}
    assert cori == {"x": pytest.approx(1 / 1.4), "y": pytest.approx(0.5 / 1.4), "z": 0.0, "u": pytest.approx(1.0)}
    assert [d for d, _, _ in rt.merge(lists, "round_robin")] == ["x", "u", "y", "z"]
    assert [(d, w) for d, w, _ in rt.merge(lists, "rerank")][:2] == [("x", 30.0), ("y", 20.0)]


def test_equals_are_ordered_by_their_scores_and_not_by_the_names_of_sites():
    """A site of one document has no spread, and every site's best is alike within its own list."""
    lists = {"a": [("court", 0.29)], "b": [("ward", 0.58)], "c": [("bus", 0.1)]}
    alone = {"a": (0.29, 0.0), "b": (0.58, 0.0), "c": (0.1, 0.0)}
    for by in ("zscore", "minmax", "cori"):
        assert [d for d, _, _ in rt.merge(lists, by, spread=alone)] == ["ward", "court", "bus"], by
    apart = {"a": (0.0, 0.01), "b": (0.0, 1.0), "c": (0.0, 1.0)}  # a's stands out most where it was found
    assert [d for d, _, _ in rt.merge(lists, "minmax", spread=apart)] == ["court", "ward", "bus"]
    assert [d for d, _, _ in rt.merge(lists, "rrf", spread=apart)] == ["bus", "court", "ward"]  # ranks alone, then ids


def test_words_of_texts_that_are_written_otherwise():
    assert rt.words("ﬁnal cafe\u0301 Straße") == rt.words("final caf\xe9 straße") == ["final", "café", "straße"]
    assert rt.words("病房 CT一览") == ["病", "房", "病房", "ct", "一", "览", "一览"]
    texts = ["病房早上九点开门。", "法院星期一审理上诉。"]
    index, known = rt.bm25_index(texts)
    assert rt.bm25_scores(index, known, 2, "病房什么时候开门").argmax() == 0
    once, often = (rt.bm25_scores(index, known, 2, "法院" * n) for n in (1, 40_000))
    assert often[0] == 0 and often[1] > 10_000 * once[1] > 0  # counted and not looked up each time


def test_selection_by_hand():
    values = {"a": 60.0, "b": 30.0, "c": 0.0}
    assert rt.np_at(["a", "b", "c"], values, 1) == 1.0 and rt.np_at(["b", "c"], values, 2) == pytest.approx(30 / 90)
    assert rt.np_at(["a"], {"a": 0.0}, 1) is None and rt.precision(["a", "c"], values, 4) == 0.25


def test_sentences_are_cited_by_the_passage_that_holds_their_words():
    passages = ["Invoices are signed by the clerk of the court.", "The ward opens at nine in the morning."]
    text, numbers = reading.cited("The clerk signs invoices. The ward opens at nine. Zebras are striped. [7]", passages)
    assert text == "The clerk signs invoices. [1] The ward opens at nine. [2] Zebras are striped."
    assert numbers == (1, 2)
    assert reading.cited("", passages) == ("", ()) and reading.cited("A word.", []) == ("A word.", ())
