"""FeS: votes that cover, pseudo-labels that never see the hidden ones, a pace, and depth that is not sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evidence.rigs.few_shot import few_shot
from fedllm.core.errors import CompositionError
from fedllm.core.payload import tensor_bytes
from fedllm.data.federation import Federation, Shard
from fedllm.methods._words import surest
from fedllm.methods.registry import method_class
from fedllm.models.similar import vote_k

KNOBS = dict(method_class("fes").trial.knobs)


def test_votes_cover_more_clusters_than_chance():
    of = np.repeat(np.arange(10), [40, 30, 20, 10, 8, 8, 8, 8, 8, 8])
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(10, 16))[of] + 0.1 * rng.normal(size=(len(of), 16))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        voted = len({int(of[i]) for i in vote_k(x, 10, k=5)})  # votes stay within a cluster
        drawn = [len({int(c) for c in rng.choice(of, 10, replace=False)}) for _ in range(50)]
        assert voted > np.mean(drawn) + 1
    assert sorted(vote_k(x, len(x) + 5)) == list(range(len(x)))
    assert vote_k(x[:1], 3) == [0] and vote_k(np.zeros((0, 4)), 3) == []


def test_votes_by_hand():
    """Three are near one another and one stands apart: the middle one first, and then who was not heard."""
    angle = np.array([0.0, 0.1, 0.19, 2.0])
    x = np.stack([np.cos(angle), np.sin(angle)], 1)
    assert vote_k(x, 2, k=1) == [1, 2]  # 1 has the votes of 0 and 2; then 2 those of 1 and 3, neither of them heard


def test_the_surest_are_kept_and_labels_are_alike_many():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    assert surest(p, 2) == [0, 1] and surest(p, 2, balanced=True) == [0, 3]
    assert surest(p, 4, limit=0.75) == [0, 1] and surest(p[:3], 4, balanced=True) == [0, 1]


def one_word(run, hidden=None):
    """The same federation with answers of one word; of all rows but the first two of a client, this one."""
    held = run.world.federation

    def turned(rows):
        return [{**r, "response": hidden if hidden and i >= 2 else r["response"].split()[0]}
                for i, r in enumerate(rows)]

    run.world.federation = Federation({c: Shard(turned(s.train), s.test) for c, s in held.clients.items()}, held.test,
                                      held.task)
    return run


def test_hidden_labels_change_nothing(begin, gap):
    knobs = {**KNOBS, "pace": 1.0, "annotators": 4}
    one, other = (one_word(begin("fes", **knobs), hidden).go(2) for hidden in (None, "w59"))
    assert gap(one.state["theta"], other.state["theta"]) == 0 and one.state["pseudo"] == other.state["pseudo"]
    assert min(one.state["pseudo"].values()) > 0
    none = one_word(begin("fes", **knobs), "nowhere").go(2)  # whose answers are no labels at all
    assert gap(one.state["theta"], none.state["theta"]) == 0 and none.state["right"][-1] == 0


def test_the_pace_bounds_pseudo_labels_and_none_is_plain_few_shot(begin, gap):
    run = begin("fes", **{**KNOBS, "pace": 0.25, "annotators": 4, "balanced": False, "vote_k": 1.0})
    seen = []
    for _ in range(3):
        seen.append(dict(run.go().state["pseudo"]))
    free = {"c0": 3, "c1": 7, "c2": 7, "c3": 12}  # c0 and c2 hold two gold labels each
    for t, counts in enumerate(seen):
        assert counts == {c: int(np.ceil(0.25 * (t + 1) * n)) for c, n in free.items()}
    assert run.state["gold"] == ["c0", "c2"]
    none = begin("fes", **{**KNOBS, "pace": 0.0}).go(2)
    assert none.state["pseudo"] == {} and none.state["right"] == [1.0, 1.0]
    sent = {e["client"] for e in none.engine.record.events if e["kind"] == "wire"}
    assert sent == {"c0", "c2"}  # nobody else has anything to train on


def test_frozen_depth_is_neither_trained_nor_sent(begin):
    whole, half = begin("fes", **KNOBS), begin("fes", freeze_depth=1, **KNOBS)
    assert tensor_bytes(half.state["theta"]) * 2 == tensor_bytes(whole.state["theta"])
    before = {n: t.clone() for n, t in half.state["theta"].items()}
    half.go()
    assert half.state["theta"].keys() == before.keys()
    assert any(not torch.equal(t, before[n]) for n, t in half.state["theta"].items())
    with pytest.raises(CompositionError, match="freeze_depth = 2 leaves nothing to train"):
        begin("fes", freeze_depth=2, **KNOBS)


@pytest.mark.slow
def test_a_reply_is_the_biases():
    got = few_shot("fes", 0, rounds=2)
    assert 0 < got["up_bytes"] < 12_000 and got["pseudo"] > 0
