"""What a method's card says that leaves is what leaves: without words or tokens declared, tensors and numbers alone."""

import pytest

from fedllm.core.program import Fold, drive
from fedllm.engines.far.leaving import Words, held_back
from fedllm.methods.registry import METHODS, method_class
from tests.methods.conftest import begin, tried

APART = {name for name in METHODS if method_class(name).trial.apart}
"""Methods with no common trial of rounds; which of them say words."""


@pytest.mark.slow
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


def test_methods_that_answer_with_text_say_so():
    assert {name for name in APART if method_class(name).card.kinds} >= {"fed_rag", "fed_sp_sc"} & APART
