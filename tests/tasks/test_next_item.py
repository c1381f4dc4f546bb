"""Next items: rows of interactions, ranks by hand, rules by hand, and codes of names."""

import json

import numpy as np
import pytest
import torch

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.load import load_federation
from fedllm.models.made import Made, make_net
from fedllm.models.shop import codes_of
from fedllm.spaces import make_space
from fedllm.tasks.next_item import ranked, within
from fedllm.tasks.registry import task_of
from fedllm.tasks.row import Encoded

SPEC = {"task": "next_item", "sequences": {"least": 2}, "partition": {"kind": "by_key", "key": "town"}, "test": 0.1,
        "client_test": 0.1}


def load(tmp_path, rows, **data):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_federation({"source": str(tmp_path / "rows.jsonl"), **SPEC, **data}, 0)


def row(history, item):
    x = np.array(history, np.int64)
    return Encoded(x.astype(np.int32), item, 1, {"history": x}, {"history": -1.0})


def test_each_users_last_item_is_the_test_and_the_one_before_its_clients_own(tmp_path):
    taken = {"ann": "abcdeabcdeab", "bob": "bca", "eve": "a"}
    rows = [{"user": u, "item": i, "time": str(t), "town": "x"} for u, items in taken.items()
            for t, i in enumerate(items)]
    fed = load(tmp_path, rows[::-1])  # by time, not by the file's order
    assert fed.labels == tuple("abcde")
    name = lambda r: ("".join(fed.labels[i] for i in r["history"]), fed.labels[r["item"]])  # noqa: E731
    assert sorted(map(name, fed.test)) == [("abcdeabcdea", "b"), ("bc", "a")]
    assert sorted(map(name, fed.clients["x"].test)) == [("abcdeabcde", "a")]
    assert sorted(map(name, fed.clients["x"].train))[:2] == [("a", "b"), ("ab", "c")]
    assert len(fed.clients["x"].train) == 10 and ("b", "c") in map(name, fed.clients["x"].train)
    short = load(tmp_path, rows, sequences={"least": 2, "history": 1})
    assert all(len(r["history"]) == 1 for r in short.test)


@pytest.mark.parametrize("rows, why", [
    ([{"user": "a", "item": "", "time": 1, "town": "x"}], "'item' is empty; every interaction has a user and an item"),
    ([{"user": "a", "item": "b", "town": "x"}], "no field 'time'"),
    ([{"user": "a", "item": "b", "time": 1, "town": "x"}], "no user has data.sequences.least = 2 interactions")])
def test_interactions_that_cannot_be_used_are_refused(rows, why, tmp_path):
    with pytest.raises(DataError, match=why):
        load(tmp_path, rows)
    with pytest.raises(RecipeError, match="allowed with sequences is 'next_item'"):
        load(tmp_path, rows, task="classification")


def test_ranks_by_hand():
    z = torch.tensor([[3.0, 2.0, 1.0, *[0.0] * 20], [0.0] * 23])
    assert ranked(z, torch.tensor([1, 0])).tolist() == [[1.0, pytest.approx(1 / np.log2(3))], [0.0, 0.0]]
    labels = ("a/x", "a/y", "b/x", "b/y")
    got = within(torch.tensor([[1.0, 2.0, 9.0, 9.0]]), torch.tensor([0]), labels)
    assert ranked(got, torch.tensor([0]))[0, 1] == pytest.approx(1 / np.log2(3))  # only y of its own shop is above it


def test_rules_by_hand():
    train = [row([0], 1), row([0, 1], 2), row([3], 1), row([0], 2)]
    task, labels = task_of("next_item"), ("a", "b", "c", "d")
    scores = task.rules["popularity"](train, [row([3], 0)], 4)
    assert scores.tolist() == [[2.0, 2.0, 2.0, 1.0]]
    near = task.rules["item_knn"](train, [row([3], 0), row([0, 1], 2)], 4)
    assert near[0].tolist() == pytest.approx([0.0, 1 / np.sqrt(2), 0.0, 0.0])
    assert near[1].tolist() == pytest.approx([0.5, 0.5, 1.5, 1 / np.sqrt(2)])
    assert task.by_rule("item_knn", train, [row([0, 1], 2)], labels)["ndcg10"] == 1.0


def test_codes_are_of_words_and_of_nothing_else():
    names = ["a/red ink no1", "b/red ink no7", "a/green tea no2", "b/old oak no3", "a/tall tree no4", "b/red tree no5"]
    codes = codes_of(names, 2, 4)
    assert codes.shape == (6, 2) and (codes[0] == codes[1]).all() and not (codes[0] == codes[2]).all()
    assert (codes == codes_of(names, 2, 4)).all() and codes.max() < 4


def test_a_history_is_read_in_order_up_to_its_end_and_prompts_begin_as_nothing():
    labels = ("red ink", "green tea", "old oak", "tall tree")
    model = make_net("shop", Made(8, 1, labels, codes=(2, 4), prompts=3), make_space("full"), seed=0)
    from fedllm.models.batch import collate

    theta = model.initial()
    plain = {n: t for n, t in theta.items() if not n.startswith("prompt.")}
    batch = collate([[row([0, 1], 2), row([0, 1, 3], 2), row([1, 0], 2)]], 0, torch.device("cpu"))
    alone = collate([[row([0, 1], 2)]], 0, torch.device("cpu"))
    with torch.no_grad(), model.using([plain]):
        z, one = model.class_logits(batch), model.class_logits(alone)
    with torch.no_grad(), model.using([theta]):
        prompted = model.class_logits(batch)
    assert torch.allclose(z[0], one[0], atol=1e-6) and not torch.allclose(z[0], z[2]) and not torch.allclose(z[0], z[1])
    assert torch.equal(z, prompted)
    theta["prompt.gate.weight"] = torch.ones(1)
    with torch.no_grad(), model.using([theta]):
        assert not torch.allclose(model.class_logits(batch), z)
    with pytest.raises(RecipeError, match=r"ranks the items of a catalog, and data\.labels holds 1"):
        make_net("shop", Made(8, 1, ("one",)), make_space("full"))
