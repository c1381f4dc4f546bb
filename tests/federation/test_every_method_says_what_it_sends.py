"""What a method's card says that leaves is what leaves: without words or tokens declared, tensors and numbers alone."""

import pytest

from fedllm.core.form import CODES, TEXT
from fedllm.core.program import Fold, drive
from fedllm.engines.far.leaving import Words, held_back
from fedllm.methods.registry import METHODS, method_class
from tests.methods.conftest import begin, tried

APART = {name for name in METHODS if method_class(name).trial.apart}
"""Methods with no common trial of rounds; which of them say words."""


@pytest.mark.parametrize("name", [n for n in METHODS if n not in APART and not method_class(n).simulation_only])
def test_a_method_sends_what_its_card_declares(name, monkeypatch):
    made, found, take = begin(name, **tried(name)), [], Fold.take
    names = made.world.model.initial()

    def look(self, client, reply, seconds=None):
        sealed = self.ask.fn.__dict__.get("sealed", False)
        words = Words.of([], [*names, *self.ask.msgs.get(client, ())]).content()
        if client != "__global__" and (why := held_back(reply, words, sealed)):
            found.append(f"{self.ask.phase}: {why}")
        return take(self, client, reply, seconds)

    monkeypatch.setattr(Fold, "take", look)
    made.go(1)
    drive(made.method.evaluate(made.state, made.world.infos(), "local"), made.engine)
    assert bool(found) <= bool(method_class(name).card.kinds), found[:3]


def test_a_method_without_text_on_its_card_declares_no_words():
    """A site that keeps its text to itself holds back any word, whatever it stands for."""
    odd = {f"{name}.{part}" for name, kind in METHODS.items() if not kind.card.kinds for part in dir(kind)
           if (form := getattr(getattr(kind, part), "__dict__", {}).get("form"))
           and {*TEXT, *CODES} & {*form.parts.values()}}
    assert not odd


def test_a_digest_is_no_text_and_a_number_of_a_card_is():
    words = Words.of([], []).content()
    assert not held_back({"hash": "0f" * 32}, words) and not held_back({"hash": ""}, words)
    assert all(held_back({"hash": said}, words) for said in ("0f" * 31, "0F" * 32, "4111111111111111", "Zoe" * 21))


def test_methods_that_answer_with_text_say_so():
    assert {name for name in APART if method_class(name).card.kinds} >= {"fed_rag", "fed_sp_sc"} & APART
