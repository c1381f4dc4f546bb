"""A recipe's `data` section becomes a federation: the same for the same seed, and no other rows than the source's."""

import json
from collections import Counter

import numpy as np
import pytest

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.load import load_federation
from fedllm.data.section import DataSpec, OfficeSpec
from fedllm.data.sources import resolve

QA = {"fields": {"prompt": "question", "response": "answer"}}


@pytest.fixture
def qa(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [{"question": f"q{i}", "answer": f"a{i}", "lang": "ab"[i % 2], "category": "xyz"[i % 3]} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def topics(tmp_path):
    for name, labels in (("train", ["sport", "art"]), ("dev", ["sport", "war"])):
        (tmp_path / f"{name}.csv").write_text(
            "sentence,topic,lang\n" + "".join(f"s{i},{labels[i % 2]},{'ab'[i % 2]}\n" for i in range(40)))
    return str(tmp_path / "train.csv"), str(tmp_path / "dev.csv")


def prompts(rows):
    return [row["prompt"] for row in rows]


def test_every_source_row_is_trained_on_or_tested_on_once(qa):
    federation = load_federation({"source": qa, **QA}, seed=1)
    assert len(federation.clients) == 10
    assert [len(s.train) + len(s.test) for s in federation.clients.values()] == [9] * 10
    assert len(federation.test) == 10
    assert sorted(prompts([*federation.pooled(), *federation.test])) == sorted(f"q{i}" for i in range(100))
    assert set(federation.test[0]) == {"prompt", "response", "category"}


def test_the_seed_decides_and_knobs_of_one_draw_do_not_move_another(qa):
    spec = {"source": qa, **QA, "partition": {"kind": "dirichlet", "clients": 3, "alpha": 0.5}}
    assert load_federation(spec, 1) == load_federation(dict(spec), 1)
    one, two = load_federation(spec, 1), load_federation(spec, 2)
    assert prompts(one.test) != prompts(two.test)
    assert {name: prompts(s.train) for name, s in one.clients.items()} != {
        name: prompts(s.train) for name, s in two.clients.items()}
    other = load_federation({**spec, "client_test": 0.5}, 1)
    assert other.test == load_federation(spec, 1).test
    assert load_federation(DataSpec(**spec), 1) == load_federation(DataSpec(**spec).model_dump(), 1)


def test_clients_keep_a_tenth_back_from_ten_rows_on(qa):
    federation = load_federation({"source": qa, **QA, "test": 0, "client_test": 0.2, "partition": {
        "kind": "quantity", "clients": 20, "skew": 1.5}}, 0)
    for shard in federation.clients.values():
        n = len(shard.train) + len(shard.test)
        assert len(shard.test) == (round(0.2 * n) if n >= 10 else 0)
        assert sum(shard.info["categories"].values()) == len(shard.train)
    assert federation.test == []


def test_a_client_with_one_row_trains_on_it(qa):
    spec = {"source": qa, **QA, "test": 0.0, "limit": 3}
    federation = load_federation({**spec, "partition": {"kind": "iid", "clients": 3}}, 0)
    assert [(len(s.train), len(s.test)) for s in federation.clients.values()] == [(1, 0)] * 3
    with pytest.raises(DataError, match="client-03 would have"):
        load_federation({**spec, "partition": {"kind": "iid", "clients": 4}}, 0)


def test_labels_are_indexed_over_training_and_test_rows(topics):
    train, dev = topics
    spec = {"source": train, "test": dev, "task": "classification", "fields": {"text": "sentence", "label": "topic"},
            "partition": {"kind": "by_key", "key": "lang"}}
    federation = load_federation(spec, 0)
    assert federation.labels == ("art", "sport", "war")
    assert list(federation.clients) == ["a", "b"]
    assert {row["label"] for row in federation.clients["b"].train} == {0}
    assert Counter(row["label"] for row in federation.test) == {1: 20, 2: 20}
    assert federation.clients["a"].info == {"partition": "by_key", "categories": {"sport": 18}}
    given = load_federation({**spec, "labels": ["war", "sport", "art"]}, 0)
    assert {row["label"] for row in given.clients["b"].train} == {2}
    with pytest.raises(DataError, match=r"dev\.csv, row 2 \(line 3\): 'label' is 'war'; the labels are sport, art"):
        load_federation({**spec, "labels": ["sport", "art"]}, 0)


def test_per_file_names_clients_after_files_even_where_stems_repeat(tmp_path):
    for site in ("north", "south"):
        (tmp_path / site).mkdir()
        (tmp_path / site / "notes.txt").write_text("a\nb\nc\n")
    files = [str(tmp_path / site / "notes.txt") for site in ("north", "south")]
    spec = {"source": files, "template": "text", "test": 0, "partition": {"kind": "per_file"}}
    federation = load_federation(spec, 0)
    assert {name: len(shard.train) for name, shard in federation.clients.items()} == dict(north_notes=3, south_notes=3)


def test_embeddings_follow_their_rows_through_the_hold_out(qa):
    points = np.array([[float(i % 2)] for i in range(100)])
    spec = {"source": qa, **QA, "limit": 60, "partition": {"kind": "by_cluster", "clients": 2}}
    federation = load_federation(spec, 0, points)
    for shard in federation.clients.values():
        assert len({int(row["prompt"][1:]) % 2 for row in shard.train}) == 1
    with pytest.raises(DataError, match=r"embed has 3 vectors; data\.source has 100"):
        load_federation({"source": qa, **QA}, 0, points[:3])


def test_a_missing_field_names_file_row_and_nearest(qa):
    with pytest.raises(DataError, match=r"qa\.jsonl, row 1 \(line 1\) has no field 'qestion'; .*mean 'question'"):
        load_federation({"source": qa, "fields": {"prompt": "qestion"}}, 0)
    with pytest.raises(DataError, match="has no field 'prompt'"):
        load_federation({"source": qa}, 0)


@pytest.mark.parametrize("change, said", [
    ({"partitoin": {}}, r"data\.partitoin: no such key; did you mean 'partition'"),
    ({"test": 1.0}, r"data\.test = 1\.0: allowed is a file, or a fraction"),
    ({"client_test": -0.1}, r"data\.client_test = -0\.1: .*greater than or equal to 0"),
    ({"limit": 0}, r"data\.limit = 0"),
    ({"task": "regresion"}, r"data\.task = 'regresion' is unknown; did you mean 'regression'"),
    ({"labels": ["a"]}, r"data\.labels .* is of no use to data\.task = 'generation'"),
    ({"template": "alpca"}, r"data\.template = 'alpca' .*did you mean 'alpaca'"),
    ({"partition": {"kind": "dirichlet", "clients": 2, "alpha": -1}}, r"^data\.partition\.alpha = -1: allowed is"),
    ({"office": {"clients": 2}}, r"data\.office: data\.source is"),
    ({"source": "office", "limit": 3}, r"data\.limit: the office makes its own"),
    ({"source": "office", "office": {"clinets": 3}}, r"data\.office\.clinets: no such key; did you mean 'clients'"),
    ({"source": "office", "office": {"style_skew": 2}}, r"data\.office\.style_skew = 2"),
])
def test_what_the_recipe_may_not_say(qa, change, said):
    with pytest.raises(RecipeError, match=said):
        load_federation({"source": qa, **change}, 0)


def test_the_office_takes_its_knobs():
    federation = load_federation({"source": "office", "office": {"clients": 3, "rows": 5, "test_rows": 4}}, 7)
    assert (len(federation.clients), len(federation.test)) == (3, 4)
    assert load_federation(DataSpec(office=OfficeSpec(clients=3, rows=5, test_rows=4)).model_dump(), 7) == federation


def test_every_key_is_documented():
    for model in (DataSpec, OfficeSpec):
        assert all(field.description for field in model.model_fields.values())


def shared(name):
    try:
        return str(resolve(f"shared:{name}"))
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.shared
@pytest.mark.parametrize("source, spec, clients, size", [
    ("sst2_train.jsonl", {"test": "shared:sst2_dev.jsonl", "task": "classification",
                          "partition": {"kind": "dirichlet", "clients": 10, "alpha": 0.1}}, 10, 6920 + 872),
    ("masakhanews_train.jsonl", {"test": "shared:masakhanews_test.jsonl", "task": "classification",
                                 "partition": {"kind": "by_key", "key": "lang"}}, 8, 1977 + 3965),
    ("code_alpaca_2k.jsonl", {"template": "alpaca", "empty": "leave_out",
                              "partition": {"kind": "by_cluster", "clients": 5}}, 5, 2015),
    ("gsm8k_train.jsonl", {"test": "shared:gsm8k_test.jsonl", "template": "Question: {question}\nAnswer:",
                           "fields": {"response": "answer"}}, 10, 2300),
])
def test_real_data_loads_whole(source, spec, clients, size):
    shared(source)
    federation = load_federation({"source": f"shared:{source}", **spec}, 0)
    assert len(federation.clients) == clients
    kept_back = sum(len(shard.test) for shard in federation.clients.values())
    assert len(federation.pooled()) + kept_back + len(federation.test) == size
    assert all(shard.train for shard in federation.clients.values())


def test_a_test_limit_draws_rows_of_the_test(tmp_path):
    for name, count in (("a", 30), ("b", 50)):
        rows = [{"prompt": f"{name}{i}", "response": "x"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spec = {"source": str(tmp_path / "a.jsonl"), "test": str(tmp_path / "b.jsonl"), "test_limit": 7}
    got = load_federation(spec, seed=1).test
    assert len({row["prompt"] for row in got}) == 7 and got == load_federation(spec, seed=1).test
