"""Text drawn anew token by token: the law of the draw, its epsilon, the ledger, and a far model's draft of it."""

import numpy as np
import pytest
from scipy.stats import chisquare

from fedllm.core.errors import CompositionError, ModelError, RecipeError
from fedllm.core.program import drive
from fedllm.local.dp_tokens import Table, refuted
from fedllm.methods.registry import make_method
from fedllm.privacy.accountant import Ledger, Release, spent
from fedllm.privacy.dp_text import DPText
from tests.methods.conftest import begin


def table(words=60, d=8, seed=0):
    return Table(np.arange(words), np.random.default_rng(seed).normal(0, 1, (words, d)))


def test_no_two_tokens_are_told_apart_by_more_than_epsilon_and_not_much_is_given_away():
    t = table()
    for epsilon in (0.5, 3.0, 12.0):
        p = np.array([t.likely(i, t.scale(epsilon)) for i in range(60)])
        worst = np.log(p.max(0) / p.min(0)).max()  # over all pairs of tokens, and all that they may become
        assert worst == pytest.approx(epsilon, rel=1e-4) and worst <= epsilon * (1 + 1e-12)
        assert t.scale(epsilon) > t.scale(epsilon, exact=False) == epsilon / 4


def test_draws_follow_the_law():
    t, rng = table(12), np.random.default_rng(1)
    scale = t.scale(4.0)
    got = np.bincount(t.draw([3] * 6000, 4.0, rng), minlength=12)
    assert chisquare(got, 6000 * t.likely(3, scale)).pvalue > 0.01


def test_rantext_keeps_more_as_its_epsilon_rises_and_chooses_by_its_own_law():
    t, rng = table(200, 16), np.random.default_rng(2)
    ids = rng.integers(0, 200, 300)
    kept, sizes = zip(*(((np.array(new) == ids).mean(), np.mean(n)) for new, n in
                        (t.rantext(ids, e, rng) for e in (0.5, 5.0, 20.0, 80.0))), strict=True)
    assert list(kept) == sorted(kept) and list(sizes) == sorted(sizes, reverse=True) and kept[-1] > 0.95
    t.spread = np.full(16, 1e9)  # so much noise that about half of the tokens are candidates: all of the nearer half
    new, n = t.rantext([5] * 4000, 8.0, np.random.default_rng(3))
    assert len(new) == len(n) == 4000 and min(n) >= 1
    whole = [u for u, size in zip(new, n, strict=True) if size == 200]
    if len(whole) > 500:
        p = np.exp(4 * (t.unit @ t.unit[5]))
        big = np.flatnonzero(p / p.sum() > 5 / len(whole))
        counts = np.bincount(whole, minlength=200)
        seen = [*counts[big], len(whole) - counts[big].sum()]
        want = np.array([*(p / p.sum())[big], 1 - (p / p.sum())[big].sum()]) * len(whole)
        assert chisquare(seen, want).pvalue > 0.01


def test_rantexts_epsilon_is_refuted_and_the_guarantee_is_not():
    t, rng = table(200, 16, 4), np.random.default_rng(4)
    far = int(np.argmin(t.unit @ t.unit[0]))
    ours = [np.array(t.draw([i] * 2000, 3.0, rng)) for i in (0, far)]
    theirs = [np.array(t.rantext([i] * 2000, 3.0, rng)[0]) for i in (0, far)]
    assert refuted(*theirs, 200) > 3.0 > refuted(*ours, 200)


def test_epsilons_of_pure_releases_add_up():
    one = Release(1 / 12.0, law="pure")
    assert spent(((*one.row, 5),), 1e-5) == pytest.approx(60.0)
    ledger = Ledger({})
    ledger.book(one, 2)
    ledger.book(Release(1.0), 1)
    assert ledger.epsilon(1e-5) == pytest.approx(24 + spent(((*Release(1.0).row, 1),), 1e-5))
    with pytest.raises(CompositionError, match="pure noise and sampling"):
        Release(1.0, "poisson", 0.5, law="pure")


def test_text_leaves_as_other_tokens_of_the_same_number_and_is_drawn_once():
    layer = DPText(token_epsilon=2.0, seed=3)
    run = begin("inferdpt", layers=(layer,), protect="none", max_new_tokens=2)
    said = []

    def watch(fn, msg, client, call):
        reply = call(msg)
        said.append((client.id, fn.__name__, reply))
        return reply

    tape = type("Tape", (type(layer).__mro__[2],), {"client": lambda self, *a: watch(*a)})()
    run.engine.stack = (run.method, layer, tape)
    states = [layer.init(), {}]
    for t in range(2):
        run.engine.begin(t)
        run.state = drive(run.method.round(run.state, run.world.infos()), run.engine, [layer, tape], states)
        run.engine.commit()
    first, again = ({c: r["texts"] for c, name, r in said[k:] if name == "documents"} for k in (0, len(said) // 2))
    for c, texts in first.items():
        rows = [r["prompt"] for r in run.world.federation.clients[c].train]
        assert [len(a.split()) for a in texts] == [len(b.split()) for b in rows] and texts != rows
    assert first == again
    tokens = {c: sum(len(r["prompt"].split()) for r in s.train) for c, s in run.world.federation.clients.items()}
    assert states[0]["clients"] == tokens
    told = layer.statement(states[0])
    assert told["clients"] == pytest.approx({c: 2.0 * n for c, n in tokens.items()})
    assert any("seed is set" in why for why in told["void"])
    assert all(len(m["answers"]) == len(run.world.federation.clients[c].train)
               for c, m in run.engine.memory.items() if c in tokens)


def test_a_budget_is_kept_and_no_guarantee_is_said_of_rantext():
    small = DPText(token_epsilon=2.0, epsilon=3.0, seed=0)
    run = begin("inferdpt", layers=(small,), protect="none", max_new_tokens=1)
    from fedllm.core.errors import QuorumError

    with pytest.raises(QuorumError, match=r"more than its budget of 3"):
        drive(run.method.round(run.state, run.world.infos()), run.engine, [small], [small.init()])
    paper = DPText(mechanism="rantext")
    assert paper.statement({"clients": {"a": 5}})["epsilon"] == float("inf")
    assert DPText().statement({"clients": {"a": 5}})["epsilon"] == pytest.approx(60)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="no table of token embeddings"):
        Table.of(object())
    with pytest.raises(CompositionError, match="list dp_text"):
        make_method("inferdpt").check_layers([])
    from fedllm.privacy.responsible_gate import ResponsibleGate

    make_method("inferdpt").check_layers([DPText(), ResponsibleGate(encoder="off")])
    with pytest.raises(CompositionError, match="list dp_text first"):
        make_method("inferdpt").check_layers([ResponsibleGate(encoder="off"), DPText()])
    DPText().check(make_method("inferdpt"), {})
    for name in ("fedavg", "fed_rag", "fed_sp_sc"):  # no budget of a site's is kept by what covers a part
        with pytest.raises(CompositionError, match="sends more of rows than text"):
            DPText().check(make_method(name), {})
    with pytest.raises(RecipeError, match=r"InferDPT.read = 'x'"):
        make_method("inferdpt", read="x")
    with pytest.raises(RecipeError, match="token_epsilon"):
        DPText(token_epsilon=0.0)
