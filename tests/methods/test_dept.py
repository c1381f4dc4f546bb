"""DEPT: whose row a word's row is, what crosses, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.errors import CompositionError, FedLLMError, PayloadError
from fedllm.core.layer import Layer
from fedllm.methods.pretraining.dept import DEPT
from fedllm.methods.registry import make_method
from fedllm.spaces.params import lookup_of, tables_of

WORD = "lm_head.weight"


class Heard(Layer):
    """Keeps all that crosses."""

    def __init__(self):
        self.said = []

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.said.append((fn.__name__, client.id, msg, reply))
        return reply


def grown(begin, rounds=2, **options):
    ear = Heard()
    return begin("dept", space="full", layers=(ear,), **options).go(rounds), ear.said


def test_with_all_words_known_trim_is_glob_and_fedavg(begin, gap, monkeypatch):
    plain = begin("fedavg", space="full").go(2).state["theta"]
    glob, _ = grown(begin, variant="glob")
    assert gap(glob.state["theta"], plain) < 1e-12
    monkeypatch.setattr(DEPT, "own", lambda self, client: torch.arange(64, dtype=torch.int32))
    trim, _ = grown(begin, variant="trim")
    assert gap(trim.state["theta"], plain) < 1e-10


def test_a_row_is_the_mean_over_who_knows_its_word(begin, monkeypatch):
    """c0 alone knows token 9, c1 alone token 10, both token 11, nobody token 12."""
    known = {"c0": [4, 5, 6, 9, 11], "c1": [4, 5, 6, 10, 11]}
    monkeypatch.setattr(DEPT, "own", lambda self, client: torch.tensor(
        sorted({*range(64)} - {9, 10, 11, 12} | {*known[client.id]}), dtype=torch.int32))
    run = begin("dept", space="full", layers=(ear := Heard(),))
    start = run.world.model.initial()
    run.go(1, ["c0", "c1"])
    n = {c: run.engine.infos[c].n for c in known}
    delta = {}
    for fn, c, _, reply in ear.said:
        if fn == "local":
            at = reply[f"at/rows/{WORD}"].tolist()
            delta[c] = dict(zip(at, reply[f"delta/{WORD}"], strict=True))
    moved = run.state["theta"][WORD] - start[WORD]
    assert torch.allclose(moved[9], delta["c0"][9]) and torch.allclose(moved[10], delta["c1"][10])
    both = (n["c0"] * delta["c0"][11] + n["c1"] * delta["c1"][11]) / (n["c0"] + n["c1"])
    assert torch.allclose(moved[11], both) and not moved[12].any() and moved[9].any()


def test_spec_sends_nothing_along_the_vocabulary_and_least_of_all(begin):
    sent = {}
    for variant in ("glob", "trim", "spec"):
        run, said = grown(begin, 1, variant=variant)
        crossed = [m for fn, _, msg, reply in said if fn == "local" for m in (msg, reply)]
        sent[variant] = sum(v.numel() for m in crossed for v in m.values() if isinstance(v, torch.Tensor)
                            and v.is_floating_point())
        if variant == "spec":
            assert not [k for m in crossed for k, v in m.items() if isinstance(v, torch.Tensor) and 64 in v.shape]
            kept = run.engine.memory["c0"]["embeddings"]
            assert set(kept) == tables_of(run.world.model.net)
            assert not torch.equal(kept[WORD], run.engine.memory["c1"]["embeddings"][WORD])
    net = run.world.model.net
    words, d = len(lookup_of(net)) * 64, 16
    assert sent["glob"] - sent["spec"] == 2 * 4 * words * d  # four silos, down and up
    assert sent["spec"] < sent["trim"] < sent["glob"]


def test_training_and_tests_among_own_words_are_of_a_model_without_others(begin):
    """The loss that a silo reports is the one of a network whose head has its rows alone."""
    run, _ = grown(begin, 1)
    words = run.engine.memory["c0"]["words"]
    model, theta = run.world.model, run.state["theta"]
    from fedllm.local.objectives.own_words import among
    from fedllm.methods.pretraining.dept import known_of
    from fedllm.models.batch import collate

    batch = collate([run.world.encoded("c0", "train", model)], model.pad, "cpu")
    with torch.no_grad(), model.using([theta]):
        told = among(known_of(words, model))(model, batch)
        _, z, y = model.target_logits(batch)
    z = z[:, words.long()]
    want = torch.nn.functional.cross_entropy(z.double(), torch.searchsorted(words.long(), y), reduction="sum")
    assert float(told[:, 0].sum()) == pytest.approx(float(want), rel=1e-9) and float(told[:, 1].sum()) == len(y)


def test_what_does_not_fit_is_refused(begin):
    with pytest.raises(CompositionError, match=r"dept.*lora.*full"):
        make_method("dept").check(begin("fedavg").world.model)
    for words in (torch.tensor([3, 64]), torch.tensor([5, 5]), torch.tensor([-1, 2]), torch.zeros(0).int()):
        with pytest.raises(PayloadError, match="ascending tokens below 64"):
            DEPT.greet.__dict__["fits"](DEPT(), {"size": 64}, {"words": words})
    with pytest.raises(FedLLMError, match=r"no token stands 1000000 times.*lower min_count"):
        begin("dept", space="full", min_count=10**6).go(1)
