"""FedCoT: without rationales it is learning answers, and what leaves are other words."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare

from fedllm.core.errors import QuorumError, RecipeError
from fedllm.methods.registry import make_method
from fedllm.models.endpoint import Completion
from fedllm.models.shelf import Shelf
from fedllm.privacy.word_noise import WordNoise, table

KNOBS = {"max_new_tokens": 3, "repair": "none", "seed": 0}


class Script:
    """A teacher that says what it is told to, and keeps what it was asked."""

    def __init__(self, say):
        self.say, self.asked = say, []

    def complete(self, prompts, max_new_tokens, temperature=0.0, seed=0):
        self.asked += prompts
        return [Completion(self.say(i, p), None, len(p.split()), 1) for i, p in enumerate(prompts)]


def taught(begin, say, **knobs):
    run = begin("fedcot", **{**KNOBS, **knobs})
    teacher = Script(say)
    run.world.models = Shelf({"teacher": lambda: teacher})
    return run, teacher


def test_without_rationales_it_is_learning_answers_and_nothing_is_sent(begin, gap):
    run, teacher = taught(begin, lambda i, p: "w1", alpha=0.0)
    alone = begin("local_only").go(2)
    run.go(2)
    for c in run.engine.memory:
        assert gap(run.engine.memory[c]["theta"], alone.engine.memory[c]["theta"]) < 1e-10
    assert not teacher.asked and run.method.server_asks_for() == ()
    assert all("question" not in str(e) for e in run.engine.record.events)


def test_rationales_are_asked_once_and_learned_with_their_share(begin):
    run, teacher = taught(begin, lambda i, p: f"w{i % 7}", epsilon=None, alpha=0.25)
    run.go(2)
    assert len(teacher.asked) == sum(c.n for c in run.world.infos())  # once a question, over both rounds
    assert run.engine.memory["c0"]["rationales"] == [f"w{i % 7}" for i in range(5)]
    fits = []
    kept = type(run.engine).work

    def work(self, job, submit):
        def look(request):
            fits.extend([request] if hasattr(request, "plan") else [])
            return submit(request)
        return kept(self, job, look)

    type(run.engine).work = work
    try:
        run.go(1)
    finally:
        type(run.engine).work = kept
    first = fits[0]
    assert first.side["weight"] == [1.5] * 5 + [0.5] * 5 and len(first.rows) == 10


def test_a_teacher_that_says_the_same_to_all_is_no_round(begin):
    run, _ = taught(begin, lambda i, p: "w1")
    with pytest.raises(QuorumError, match=r"models.teacher repeats itself: 1 of its 33 texts"):
        run.go(1)


def grams(text, n=4):
    words = text.split()
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def test_no_four_words_in_a_row_of_a_question_leave(begin):
    """At epsilon 1 and below, in anything that the server is asked."""
    run, teacher = taught(begin, lambda i, p: f"w{i}", epsilon=1.0)
    own = [r["prompt"] for c in run.world.infos() for r in run.world.rows(c.id, "train")]
    run.go(1)
    assert len(teacher.asked) == len(own)
    assert not set().union(*map(grams, own)) & set().union(*map(grams, teacher.asked))
    plain, seen = taught(begin, lambda i, p: f"w{i}", epsilon=None)
    plain.go(1)
    assert set().union(*map(grams, own)) <= set().union(*map(grams, seen.asked))


def test_words_are_drawn_as_the_exponential_mechanism_says(begin):
    model = begin("fedavg").world.model
    unit, allowed, spread = table(model)
    noise, rng = WordNoise(6.0), np.random.default_rng(0)
    t = int(allowed[5])
    p = np.exp(6.0 / 4 * (unit[allowed] @ unit[t]))
    got = np.bincount([noise.drawn(unit, allowed, spread, t, rng) for _ in range(4000)], minlength=len(unit))[allowed]
    assert chisquare(got, 4000 * p / p.sum()).pvalue > 0.01
    # and between any two words the odds of any outcome differ by exp(epsilon) at the most
    both = [np.exp(6.0 / 4 * (unit[allowed] @ unit[int(x)])) for x in allowed]
    both = np.log(np.stack([q / q.sum() for q in both]))
    assert (both.max(0) - both.min(0)).max() <= 6.0


@pytest.mark.parametrize("mechanism", ["exponential", "rantext"])
def test_more_words_stay_with_more_epsilon_and_none_is_lost(begin, mechanism):
    model = begin("fedavg").world.model
    text, kept = " ".join(f"w{i % 60}" for i in range(200)), []
    for epsilon in (0.5, 10.0, 60.0, 400.0):
        [said], most = WordNoise(epsilon, mechanism)(model, [text], np.random.default_rng(1))
        assert len(said.split()) == most == 200
        kept.append(np.mean([a == b for a, b in zip(said.split(), text.split(), strict=True)]))
    assert kept == sorted(kept) and kept[0] < 0.15 and kept[-1] > 0.95


def test_what_is_promised_is_told(begin):
    run, _ = taught(begin, lambda i, p: f"w{i}", seed=None)
    run.go(1)
    said = run.method.report(run.state)
    longest = max(len(r["prompt"].split()) for c in run.world.infos() for r in run.world.rows(c.id, "train"))
    assert said["longest_question"] == longest and said["epsilon"] == 3.0 * longest
    assert WordNoise(3.0, "rantext").spent(9) is None


def test_templates_must_name_their_parts():
    with pytest.raises(RecipeError, match=r"FedCoT.ask = 'why' is not allowed; it must name \{question\}"):
        make_method("fedcot", ask="why")
