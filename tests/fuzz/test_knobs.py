"""Every knob of every method, layer, space, selector and of local training, with every odd value, and two knobs at once
with any: taken, or refused in a sentence; never a fault, and no truth values or infinities in the place of numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import FedLLMError
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import METHODS, make_method
from fedllm.runs.layers import LAYERS, make_layer
from fedllm.selectors.registry import SELECTORS, make_selector
from fedllm.spaces.registry import SPACES, make_space
from tests.fuzz.hostile import ANYTHING, ODD, fuzzed, unfit, within

MAKE = {"methods": (METHODS, lambda name, knobs: make_method(name, **knobs)),
        "layers": (LAYERS, lambda name, knobs: make_layer(name, knobs, "layers.0")),
        "spaces": (SPACES, lambda name, knobs: make_space(name, **knobs)),
        "selectors": (SELECTORS, lambda name, knobs: make_selector(name, knobs)),
        "local": ({"local": LocalSpec}, lambda name, knobs: LocalSpec.make(knobs, "local"))}
WHEN_CLIENTS_ARE_KNOWN = {("gossip", "edges")}
"""Knobs that are looked at with the ids of the clients."""


def knobs_of(room, name):
    """The knobs of one part and their types."""
    names = MAKE[room][0]
    kind = names[name] if isinstance(names, dict) else names.find(name, room)
    return {knob: str(told["type"]) for knob, told in kind.knobs().items() if (name, knob) not in
            WHEN_CLIENTS_ARE_KNOWN}


@pytest.mark.parametrize("room", MAKE)
def test_every_knob_with_every_odd_value(room):
    names, make = MAKE[room]
    wrong = []
    for name in names:
        with within():
            for knob, kind in knobs_of(room, name).items():
                for value in ODD:
                    if why := judged(lambda: make(name, {knob: value}), {kind: value}):  # noqa: B023
                        wrong.append(f"{name}.{knob} = {value!r:.60}: {why}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", MAKE)
def test_knobs_with_any_values(room):
    names, make = MAKE[room]
    parts = {name: knobs for name in names if (knobs := knobs_of(room, name))}

    @fuzzed(30)
    @given(st.data())
    def each(data):
        name = data.draw(st.sampled_from(sorted(parts)), "part")
        told = data.draw(st.dictionaries(st.sampled_from(sorted(parts[name])), ANYTHING, min_size=1, max_size=2))
        with within():
            assert not judged(lambda: make(name, told), {parts[name][knob]: v for knob, v in told.items()})

    each()


def judged(make, told):
    """What is wrong with how values were met, given by their knobs' types."""
    try:
        make()
    except FedLLMError as error:
        return f"a sentence of {len(str(error))} characters" if len(str(error)) > FedLLMError.LONGEST else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    for kind, value in told.items():
        number = ("int" in kind or "float" in kind) and "bool" not in kind
        inner = value if isinstance(value, list) else [value]
        if unfit(value) or (number and any(isinstance(x, bool) for x in inner)) or "\ud800" in inner or "\0" in inner:
            return f"taken: {value!r:.60}"
    return ""
