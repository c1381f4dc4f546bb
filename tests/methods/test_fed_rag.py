"""FedRAG: what is found and by whom, how lists are merged and graded, and which text leaves a site."""

import json
import sys

import numpy as np
import pytest
import torch

import fedllm
from fedllm.core.ask import Ask
from fedllm.core.client import SERVER, Profile, Query
from fedllm.core.errors import CompositionError, DataError, PayloadError, RecipeError
from fedllm.core.layer import Layer
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines.client import ClientCall
from fedllm.methods.registry import make_method
from fedllm.models import retrieval as rt
from fedllm.privacy.accountant import Release
from tests.methods.conftest import begin

pytest.importorskip("bm25s")
DOCS = {"c0": ["the court hears appeals on monday", "a clerk signs every invoice", ""],
        "c1": ["the ward opens at nine", "invoices above ten are signed by the bank manager"],
        "c2": ["buses leave the north station", "the east line is closed on sunday"]}


class Tape(Layer):
    def __init__(self):
        self.sent = []

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.sent.append((client.id, fn.__name__, reply))
        return reply


def world(docs=DOCS, engine="vectorized", layers=(), dtype=torch.float64, **knobs):
    run = begin("fed_rag", engine=engine, dtype=dtype, layers=layers, **knobs)
    shards = {c: Shard([{"text": t} for t in ts]) for c, ts in docs.items()}
    run.world.federation = Federation(shards, (), "generation")
    run.engine.infos = {c.id: c for c in run.world.infos()} | {"__global__": run.engine.infos["__global__"]}
    return run


def ask(run, query):
    run.engine.begin(9)
    return drive(run.method.answer(query, run.world.infos(), state=run.state), run.engine, run.engine.stack[1:])


def test_the_answer_cites_what_it_rests_on():
    run = world().go(1)
    assert run.state["documents"] == {"c0": 3, "c1": 2, "c2": 2}
    got = ask(run, "who signs an invoice")
    assert got.passages[0].id == "c0/1" and got.answer == "a clerk signs every invoice [1]" and "c0" in got.clients
    none = ask(run, "zebra")
    assert none.answer is None and none.passages == () and none.clients == ()


def test_without_a_round_the_index_is_made_for_the_question():
    assert ask(world(), "who signs an invoice") == ask(world().go(1), "who signs an invoice")


def test_sites_without_a_word_find_nothing():
    run = world({"c0": ["", "  "], "c1": ["invoice"]}).go(1)
    assert ask(run, "invoice").clients == ("c1",) and ask(run, "").answer is None


def test_bm25_is_the_packages_own():
    import bm25s

    texts = [t for ts in DOCS.values() for t in ts if t]
    index, known = rt.bm25_index(texts)
    theirs = bm25s.BM25()
    theirs.index([rt.words(t) for t in texts], show_progress=False)
    for query in ("who signs the invoice", "the north station on sunday", "zebra"):
        assert np.allclose(rt.bm25_scores(index, known, len(texts), query), theirs.get_scores(rt.words(query)))


def test_merging():
    lists = {"a": [("x", 30.0), ("y", 20.0)], "b": [("z", 0.9), ("x", 0.1)]}
    by_rank = {d: w for d, w, _ in rt.merge(lists, "rrf", 60)}
    assert by_rank == {"x": pytest.approx(1 / 61 + 1 / 62), "z": pytest.approx(1 / 61), "y": pytest.approx(1 / 62)}
    merged = rt.merge(lists, "zscore", spread={"a": (10.0, 10.0), "b": (0.1, 0.1)})
    assert [(d, round(w, 9), at) for d, w, at in merged] == [
        ("z", 8.0, ("b",)), ("x", 2.0, ("a", "b")), ("y", 1.0, ("a",))]
    assert rt.merge({}, "rrf") == [] and rt.merge({"a": []}, "zscore") == []


def test_grades():
    assert rt.ndcg(["a", "b"], {"a": 3, "b": 1}, 10) == 1.0
    assert rt.ndcg(["x", "a"], {"a": 1}, 10) == pytest.approx(1 / np.log2(3))
    assert rt.ndcg(["x", "a"], {"a": 1}, 1) == 0.0 and rt.recall(["x", "a"], {"a": 1, "q": 2, "r": 0}, 2) == 0.5
    assert rt.relevant({"relevant": ["a"]}) == rt.relevant({"relevant": "a"}) == {"a": 1.0}


@pytest.mark.parametrize("text, most", [("all", 6), ("picked", 1)])
def test_no_more_text_leaves_than_the_card_says(text, most):
    tape = Tape()
    got = ask(world(layers=(tape,), text=text, snippet=12).go(1), "the invoice on sunday")
    said = [t for _, _, r in tape.sent for t in r.get("texts", ())]
    assert len(said) == most and all(len(t) <= 12 for t in said) and got.passages[0].text in said
    if text == "picked":
        found = sum(len(r["at"]) for _, fn, r in tape.sent if fn == "lookup")
        assert found > 1 and said == [got.passages[0].text]


@pytest.mark.parametrize("knobs", [{"rank_by": "vectors"}, {"vectors_at": ("c1",)}, {"rank_by": "both"},
                                   {"merge_by": "rerank", "select_by": "redde", "top_sites": 2, "sample": 2},
                                   {"select_by": "centroids", "top_sites": 2, "merge_by": "cori"},
                                   {"select_by": "learned", "top_sites": 2, "merge_by": "round_robin"}])
def test_engines_agree(knobs):
    one, other = (world(engine=e, **knobs).go(1) for e in ("in_process", "vectorized"))
    for query in ("w1 w2 w3", "w7 w9"):
        a, b = ask(one, query), ask(other, query)
        assert [p.id for p in a.passages] == [p.id for p in b.passages]
        assert np.allclose([p.worth for p in a.passages], [p.worth for p in b.passages], atol=1e-10)
        chosen = 2 if "select_by" in knobs else 3
        assert set(a.clients) <= set(a.asked) == set(b.asked) and len(a.asked) == chosen
    assert other.engine.memory["c1"]["vectors"].shape == (2, 16)


def test_sites_that_are_not_chosen_hear_nothing_and_send_nothing():
    tape = Tape()
    run = world(layers=(tape,), select_by="redde", sample=2, top_sites=1).go(1)
    tape.sent.clear()
    got = ask(run, "the clerk signs an invoice")
    assert len(got.asked) == 1 and {c for c, _, _ in tape.sent} - {SERVER} == set(got.asked)


def test_a_query_goes_to_sites_that_are_there(monkeypatch):
    """Those that are gone take no place among the chosen, and a reply of another shape is refused at the door."""
    run = world(select_by="redde", sample=2, top_sites=1).go(1)
    first = ask(run, "the clerk signs an invoice").asked[0]
    left = [c for c in run.world.infos() if c.id != first]
    run.engine.begin(9)
    [(_, asked, _)] = drive(run.method.search(["the clerk signs an invoice"], left, run.state), run.engine)
    assert len(asked) == 1 and asked[0] != first
    with pytest.raises(PayloadError, match=r"'sample' has the shape \[3, 4\], allowed are up to 2 vectors"):
        run.method.charted({"sample": 2, "centers": 0}, {"sample": torch.zeros(3, 4)})


def shares(run, **levels):
    for c, level in levels.items():
        run.world.profiles[c] = Profile(shares=level)
    run.engine.infos = {c.id: c for c in run.world.infos()} | {"__global__": run.engine.infos["__global__"]}
    return run


def test_a_site_answers_with_what_its_profile_shares():
    tape = Tape()
    run = shares(world(layers=(tape,), select_by="centroids", top_sites=1), c0="scores", c1="ids", c2="snippets").go(1)
    assert set(run.state["samples"]) == {"c1", "c2"}  # who shares scores alone gives no vector either
    tape.sent.clear()
    got = ask(run, "the invoice on sunday")
    assert "c0" in got.asked  # and is asked each time, since nobody knows what it has
    said = {c: r for c, fn, r in tape.sent if fn == "lookup"}
    assert said["c0"]["scores"] and not said["c0"]["ids"] and not said["c0"]["texts"]
    run = shares(world(layers=(tape,)), c0="scores", c1="ids", c2="ids").go(1)
    tape.sent.clear()
    got = ask(run, "invoice sunday")
    assert got.answer == "What matches lies at c0, and its text stays there [1]" and got.passages[0].id == "c0/1"
    said = {c: r for c, fn, r in tape.sent if fn == "lookup"}
    assert said["c2"]["ids"] and not any(r["texts"] for r in said.values())


def test_counts_are_noisy_and_all_that_a_site_gives(monkeypatch):
    tape, spent = Tape(), []
    monkeypatch.setattr(ClientCall, "spend", lambda self, release, count=1: spent.append((self.id, release)))
    run = shares(world(layers=(tape,), noise_multiplier=1e-3), c0="counts", c1="counts", c2="ids").go(1)
    assert {c: r["new"] for c, fn, r in tape.sent if fn == "index"} == {"c0": 0, "c1": 0, "c2": 2}
    tape.sent.clear()
    got = ask(run, "w1 w2 w3")
    said = {c: r for c, fn, r in tape.sent if fn == "lookup"}
    assert all(not said[c][part] for c in ("c0", "c1") for part in ("at", "scores", "ids", "texts", "near"))
    assert sum(said["c0"]["counts"]) <= 3 and said["c1"]["mean"] == 0.0 and said["c2"]["counts"] == []
    assert set(got.near) == {"c0", "c1"}
    released = [(c, r) for c, r in spent if isinstance(r, Release)]
    assert released == [(c, Release(1e-3, law="discrete")) for c in ("c0", "c1")]  # booked before each answer
    assert sorted(c for c, r in spent if isinstance(r, Query)) == ["c0", "c1", "c2"]
    loud = shares(world(noise_multiplier=1e6), c0="counts", c1="counts", c2="counts").go(1)
    assert ask(loud, "w1 w2 w3").answer is None or max(ask(loud, "w1 w2 w3").near.values()) >= 0


def test_a_document_is_fetched_only_if_its_site_has_just_named_it():
    run = world(text="picked").go(1)
    run.engine.begin(9)
    got = drive((lambda m: (yield Ask(m.fetch, {"c0": {"at": [0, 1]}})))(run.method), run.engine)
    assert got["c0"]["texts"] == ["", ""]


def test_the_index_follows_its_documents():
    run = world(rank_by="vectors").go(1)
    run.world.federation.clients["c1"].train.append({"text": "a new rule"})
    run.engine.begin(1)
    state = drive(run.method.round(run.state, run.world.infos()), run.engine)
    run.engine.commit()
    assert state["documents"]["c1"] == 3 and len(run.engine.memory["c1"]["vectors"]) == 3


def test_equal_ids_of_two_sites_are_two_documents_unless_all_know_them():
    docs = {"c0": ["a clerk signs"], "c1": ["the manager signs"], "c2": ["nobody"]}
    for shared, most in ((False, 2), (True, 1)):
        run = world(docs, shared_ids=shared)
        for c in docs:
            run.world.federation.clients[c].train[0]["id"] = "1.txt"
        run.engine.begin(0)
        [(found, _, _)] = drive(run.method.search(["who signs"], run.world.infos(), None, 3), run.engine)
        assert [p.id for p in found] == ["1.txt"] * most
        assert {c for p in found for c in p.clients} == {"c0", "c1"}
        assert shared or {p.text for p in found} == {"a clerk signs", "the manager signs"}


def test_two_documents_that_a_site_calls_alike_are_two():
    """Files of the same name in two folders, rows with the same id: neither hides the other or adds to its worth."""
    docs = {"c0": ["the court hears appeals", "the ward opens at nine", "a clerk"], "c1": ["buses"], "c2": ["trams"]}
    for shared in (False, True):
        run = world(docs, shared_ids=shared)
        for row in run.world.federation.clients["c0"].train:
            row["id"] = "rules.txt"
        run.go(1)
        got = ask(run, "when does the ward open the court")
        assert got.answer == "the court hears appeals [1]" and got.passages[0].clients == ("c0",)
        [(found, _, _)] = drive(run.method.search(["the ward opens"], run.world.infos(), run.state, 3), run.engine)
        assert [p.text for p in found] == ["the ward opens at nine", "the court hears appeals"][: 2 - shared]


def test_documents_that_changed_since_the_index_was_made_are_found_as_they_are():
    """Rows are read anew where a site is started again, or a run is asked later: its index follows them."""
    run = world().go(1)
    before = {c: dict(m) for c, m in run.engine.memory.items()}
    shard = run.world.federation.clients["c2"]
    run.world.federation.clients["c2"] = Shard([{"text": "trams stop at the harbor"}, {"text": "a ferry"}])
    assert ask(run, "where do trams stop").answer == "trams stop at the harbor [1]"
    assert "c2" not in ask(world(rank_by="bm25").go(1), "zebra").clients
    assert not any("buses" in p.text for p in ask(run, "buses leave").passages)
    run.world.federation.clients["c2"] = shard
    assert ask(run, "where do buses leave").answer == "buses leave the north station [1]"
    assert all(run.engine.memory[c][k] is v for c, m in before.items() for k, v in m.items())  # none kept


def test_what_a_model_is_asked_for_by_name_is_there():
    assert make_method("fed_rag", writer="w", encoder="e").server_asks_for() == ("w",)
    assert make_method("fed_rag", writer="w", encoder="e").asks_for() == ("e",)
    with pytest.raises(RecipeError, match="select_by = 'best' is not allowed"):
        make_method("fed_rag", select_by="best")


def test_generation_reads_the_passages(monkeypatch):
    run = world(generate=True, max_new_tokens=3).go(1)
    monkeypatch.setattr(run.world.model.net.config, "max_position_embeddings", 256)
    got = ask(run, "the clerk")
    assert got.answer and len(got.passages) == 3 and set(got.clients) == {"c0", "c1", "c2"} == set(got.asked)
    assert got.cited == () and "[" not in got.answer  # three random words, which no passage holds


def test_a_writer_reads_as_many_passages_as_fit(monkeypatch):
    """Too long a prompt would lose its start: the rules, and the best passage."""
    docs = {c: [f"the clerk signs {w} " + "word " * 30] for c, w in (("c0", "one"), ("c1", "two"), ("c2", "three"))}
    run = world(docs, generate=True, max_new_tokens=3, snippet=150).go(1)
    for window, passages in ((200, 3), (150, 2), (110, 1)):
        monkeypatch.setattr(run.world.model.net.config, "max_position_embeddings", window)
        assert len(ask(run, "the clerk").passages) == passages
    monkeypatch.setattr(run.world.model.net.config, "max_position_embeddings", 70)
    with pytest.raises(RecipeError, match="one passage take more than the 67 tokens that the writer reads"):
        ask(run, "the clerk")


def test_a_writer_is_a_model_that_writes(recipe_of_documents):
    data = {**recipe_of_documents["data"], "task": "documents", "template": None, "fields": {}}
    for knobs, models, who in (({}, {}, "the main model"), ({"writer": "w"}, {"w": "embedded"}, r"models\.w")):
        with pytest.raises(CompositionError, match=rf"method\.generate: {who} is there for documents and writes no"):
            fedllm.ask({**recipe_of_documents, "data": data, "models": models,
                        "method": {"name": "fed_rag", "generate": True, **knobs}}, "x")


def test_without_the_extra_words_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(RecipeError, match=r"'bm25' needs the optional extra: pip install 'fedlm\[rag\]'"):
        make_method("fed_rag")
    assert make_method("fed_rag", rank_by="vectors")


def test_a_run_over_files(tmp_path, tiny_bert_folder):
    """Folders of documents are indexed, queries of a file are the test, and the answer names the file."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "court.txt").write_text("The court hears appeals on monday.\n\nA clerk signs every invoice of the house.")
    (docs / "ward.md").write_text("The ward opens at nine.\n\n" + "\n\n".join(f"Rule {i} of the house."
                                                                              for i in range(9)))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"text": "who signs an invoice", "relevant": ["court.txt#2"]}))
    recipe = {"name": "files", "model": tiny_bert_folder, "rounds": 1, "method": "fed_rag", "data": {
        "source": str(docs), "task": "documents", "test": str(tmp_path / "queries.jsonl"),
        "passages": 10, "partition": {"kind": "per_file"}}, "evaluate": {"clients": False}}
    result = fedllm.run(recipe, root=tmp_path / "runs")
    assert result.evaluation["global"] == {"n": 1, "ndcg10": 1.0, "recall10": 1.0}
    [got] = fedllm.ask(result.folder, "when does the ward open")
    assert got.said["passages"][0]["id"] == "ward.md#1" and got.clients == ("ward",)
    with pytest.raises(CompositionError, match="documents are searched, and nothing is learned"):
        fedllm.run({**recipe, "method": "fedavg"}, root=tmp_path / "runs")


@pytest.fixture
def recipe_of_documents(tmp_path, tiny_llama_folder):
    docs, queries = tmp_path / "docs.jsonl", tmp_path / "queries.jsonl"
    rows = [{"id": f"{c}{i}", "text": t, "site": c} for c, ts in DOCS.items() for i, t in enumerate(ts) if t]
    docs.write_text("\n".join(map(json.dumps, rows)))
    queries.write_text("\n".join(map(json.dumps, [
        {"text": "where do buses leave", "relevant": ["c20"]}, {"text": "who signs an invoice", "relevant": ["c01"]}])))
    return {"name": "rag", "model": tiny_llama_folder, "rounds": 1, "method": "fed_rag",
            "data": {"source": str(docs), "test": str(queries), "fields": {"text": "text"},
                     "template": {"prompt": "{text}", "response": "{text}"},
                     "partition": {"kind": "by_key", "key": "site"}, "client_test": 0.0}}


def test_a_run_reports_its_own_metrics(recipe_of_documents, tmp_path):
    data = recipe_of_documents["data"]
    with pytest.raises(DataError, match="'relevant'"):
        fedllm.run(recipe_of_documents, root=tmp_path)
    data["fields"] |= {"id": "id", "relevant": "relevant"}
    data["source"], both = str(tmp_path / "both.jsonl"), (tmp_path / "docs.jsonl").read_text().splitlines()
    (tmp_path / "both.jsonl").write_text("\n".join(json.dumps({**json.loads(x), "relevant": []}) for x in both))
    queries = [{**json.loads(x), "id": "q"} for x in (tmp_path / "queries.jsonl").read_text().splitlines()]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    result = fedllm.run(recipe_of_documents, root=tmp_path)
    assert result.evaluation["global"] == {"n": 2, "ndcg10": 1.0, "recall10": 1.0}
    assert result.metrics == {"ndcg10": "max", "recall10": "max"} and result.bytes["evaluation"]["up"] > 0
    assert "ndcg10 (higher is better)" in (result.folder / "report.html").read_text()
    assert "ndcg10 (higher is better)" in (result.folder / "model_card.md").read_text()
    assert fedllm.plan(recipe_of_documents).metrics == result.metrics
    [got] = fedllm.ask(result.folder, "ward opens nine")
    assert got.clients == ("c1",) and got.answer == "the ward opens at nine [1]" and got.bytes["up"] > 0
    [none] = fedllm.ask(result.folder, "zebra")
    assert none.answer is None and none.clients == ()
