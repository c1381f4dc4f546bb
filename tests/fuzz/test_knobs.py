"""Every knob of every method, layer, space, selector and of local training, with every odd value: taken, or refused in
a sentence; never a fault, and no truth values or infinities in the place of numbers."""

import pytest

from fedllm.core.errors import FedLLMError
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import METHODS, make_method
from fedllm.runs.layers import LAYERS, make_layer
from fedllm.selectors.registry import SELECTORS, make_selector
from fedllm.spaces.registry import SPACES, make_space
from tests.fuzz.hostile import ODD, unfit

MAKE = {"methods": (METHODS, lambda name, knobs: make_method(name, **knobs)),
        "layers": (LAYERS, lambda name, knobs: make_layer(name, knobs, "layers.0")),
        "spaces": (SPACES, lambda name, knobs: make_space(name, **knobs)),
        "selectors": (SELECTORS, lambda name, knobs: make_selector(name, knobs)),
        "local": ({"local": LocalSpec}, lambda name, knobs: LocalSpec.make(knobs, "local"))}
WHEN_CLIENTS_ARE_KNOWN = {("gossip", "edges")}
"""Knobs that are looked at with the ids of the clients."""


@pytest.mark.parametrize("room", MAKE)
def test_every_knob_with_every_odd_value(room):
    names, make = MAKE[room]
    wrong = []
    for name in names:
        kind = names[name] if isinstance(names, dict) else names.find(name, room)
        for knob, told in kind.knobs().items():
            for value in ODD:
                if why := judged(lambda: make(name, {knob: value}), str(told["type"]), value):  # noqa: B023
                    wrong += [] if (name, knob) in WHEN_CLIENTS_ARE_KNOWN else [f"{name}.{knob} = {value!r:.60}: {why}"]
    assert not wrong, "\n".join(wrong)


def judged(make, kind, value):
    """What is wrong with how a value was met."""
    try:
        make()
    except FedLLMError as error:
        return f"a sentence of {len(str(error))} characters" if len(str(error)) > FedLLMError.LONGEST else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    number = ("int" in kind or "float" in kind) and "bool" not in kind
    inner = value if isinstance(value, list) else [value]
    if unfit(value) or (number and any(isinstance(x, bool) for x in inner)) or "\ud800" in inner or "\0" in inner:
        return "taken"
    return ""
