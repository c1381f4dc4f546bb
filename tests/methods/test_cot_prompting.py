"""Chain-of-thought prompting: answers that are stated and never guessed, votes, and examples that may leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evidence.rigs.text import untrained
from fedllm.cli.serve_model import serving
from fedllm.core.errors import PayloadError, RecipeError
from fedllm.core.layer import Layer
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.text import LocalText
from fedllm.methods.inference.cot_prompting import ANSWER
from fedllm.methods.registry import make_method
from fedllm.models.endpoint import Completion, Endpoint
from fedllm.models.questions import Thought, stated, vote

STATED = {
    "The answer is 5.": "5", "the answer is $1,200.50": "1200.5", "#### 42": "42", "so 3 + 4 = 7 #### 7": "7",
    "The answer is 3. No, the answer is 4.": "4", "The answer is -2": "-2", "Answer is: 07": "7",
    "The answer is  8 apples": "8", "x #### $9 y": "9", "The answer is 0.0": "0", "The answer is 5.0 of 6": "5",
    "the answer is 12, I think": "12", "The answer is 3\n#### 4": "4", "#### 1 then The answer is 2": "2",
    "The answer is 1,000,000": "1000000"}
UNSTATED = ["", " ", "5", "It is 5.", "The answer is five.", "The answer is", "answer: 5", "#5", "### 5", "3 + 4 = 7",
            "The answer is unknown. 5 is a guess", "####", "The answer is $", "I cannot say", "Answer 5", "#### x 5"]


def test_an_answer_is_stated_or_there_is_none():
    assert len(STATED) + len(UNSTATED) >= 30
    assert {t: stated(t, ANSWER) for t in STATED} == STATED
    assert [t for t in UNSTATED if stated(t, ANSWER) is not None] == []
    assert stated("so (B) it is", r"\(([A-Z])\)") == "b" and stated("none", r"\(([A-Z])\)") is None


def test_nine_votes_help_above_half_and_not_below():
    rng = np.random.default_rng(0)

    def right(p, n):
        """Over 2,000 questions: with chance p the right answer, else always the same wrong one."""
        said = rng.random((2000, n)) < p
        return np.mean([vote([Thought("q", "", "1" if x else "2") for x in row]).answer == "1" for row in said])

    assert right(0.65, 9) > right(0.65, 1) + 0.1 and right(0.35, 9) < right(0.35, 1) - 0.1
    none = vote([Thought("q", "", None), Thought("q", "", None)])
    assert none.answer is None and none.agreement == 0


class Says:
    """A text model that states the number of `good` in its prompt, else nothing; what it was asked is kept."""

    task, tokenizer = "generation", None

    def __init__(self):
        self.asked = []

    def complete(self, prompts, max_new_tokens, temperature=0.0, seed=0):
        self.asked += prompts
        return [Completion(f" thus. The answer is {p.count('good')}.\nQ: next", -1.0, 1, 1) for p in prompts]


ROWS = {
    "c0": [("good a", "one, so #### 1"), ("b", "none, so #### 0"), ("good c", "#### 2")],
    "c1": [("good good d", "a secret #### 2"), ("e", "no number here"), ("f", "The answer is 1")]}


def world(model, withheld=("good good d",)):
    shards = {c: Shard([{"prompt": q, "response": r, **({"withheld": True} if q in withheld else {})}
                        for q, r in rows]) for c, rows in ROWS.items()}
    return World(model, Federation(shards, (), "generation"))


class Tape(Layer):
    def __init__(self):
        self.said = []

    def client(self, fn, msg, client, call):
        self.said.append((fn.__name__, client.id, call(msg)))
        return self.said[-1][2]


def test_examples_are_offered_chosen_by_others_rows_and_shown():
    """An example `good` in front adds one to what the model says: it is right on rows whose answer is one more."""
    model, tape = Says(), Tape()
    method = make_method("cot_prompting", exemplars=2, offered=2, validation=1)
    here = world(model)
    engine = InProcess((method, tape), here)
    state = drive(method.round(method.init(model), here.infos()), engine, [tape])
    left = {c: r["questions"] for fn, c, r in tape.said if fn == "offer"}
    assert left == {"c0": ["good a", "b"], "c1": ["f"]}  # withheld and answerless rows stay
    assert not any("secret" in str(r) for _, _, r in tape.said)
    # c0's last row (2) is right behind `good a`; c1's last row is itself among the examples
    assert [(e["questions"], s) for e, s in zip(state["shown"], state["scores"], strict=True)] == [
        ("good a", 1.0), ("f", 0.0)]
    got = drive(method.answer("good x", here.infos(), state=state), engine, [tape])
    assert got.answer == "2" and got.rationale == "thus. The answer is 2."
    assert model.asked[-1] == ("Q: good a\nA: one, so The answer is 1.\n\nQ: f\nA: The answer is 1.\n\nQ: good x\nA:")


@pytest.mark.parametrize("mode, head", [("standard", "Q: good a\nA: The answer is 1.\n\nQ: x\nA:"),
                                        ("zero_shot_cot", "Q: x\nA: Let's think step by step.")])
def test_the_other_modes(mode, head):
    model, here = Says(), None
    here = world(model)
    method = make_method("cot_prompting", mode=mode, exemplars=1, validation=0)
    engine = InProcess((method,), here)
    state = drive(method.round(method.init(model), here.infos()), engine)
    got = drive(method.answer("x", here.infos(), state=state), engine)
    assert head in model.asked and got.answer == ("1" if mode == "standard" else "0")


def test_samples_vote_over_an_endpoint_too():
    torch.set_num_threads(1)
    method = make_method("cot_prompting", exemplars=0, n_samples=4, temperature=1.0, max_new_tokens=4,
                         answer_pattern=r"(\w+)")
    with serving(LocalText(untrained(0, width=16))) as server:
        far = world(Endpoint(server.base_url))
        got = drive(method.answer("Tom has 3", far.infos()), Vectorized((method,), far))
    near = world(LocalText(untrained(0, width=16)))
    assert len(got.thoughts) == 4 and len({t.rationale for t in got.thoughts}) > 1
    assert got.answer == drive(method.answer("Tom has 3", near.infos()), InProcess((method,), near)).answer


def test_what_cannot_be_is_refused():
    with pytest.raises(RecipeError, match="all would say the same; it must be > 0"):
        make_method("cot_prompting", n_samples=3)
    with pytest.raises(RecipeError, match="has no group"):
        make_method("cot_prompting", answer_pattern=r"\d+")
    with pytest.raises(RecipeError, match="answer_pattern = '\\(': missing"):
        make_method("cot_prompting", answer_pattern="(")
    with pytest.raises(RecipeError, match="exemplars = 33"):
        make_method("cot_prompting", exemplars=33)
    with pytest.raises(PayloadError, match="'right' has 1 counts of 2"):
        make_method("cot_prompting").counted({"questions": ["a", "b"]}, {"right": [1.0], "n": 2})
