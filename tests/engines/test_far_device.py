"""Models on another device: every method and every kind of space gives the same there, and nothing mixes the two."""

import pytest
import torch

from fedllm.engines import Vectorized
from fedllm.spaces import make_space
from tests.engines.test_vectorized import ADAMW, CAUSAL, gap, outcome
from tests.far import THERE, There, far
from tests.methods.conftest import begin
from tests.methods.conftest import gap as tree_gap
from tests.methods.test_matrix import METHODS, agree, end

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the card is the other device")


def test_the_two_sides_do_not_mix():
    with far():
        x = torch.ones(3, device=THERE)
        assert x.device == THERE and isinstance(2 * x + 1, There) and not isinstance(x.cpu(), There)
        with pytest.raises(RuntimeError, match="lie here and others there"):
            x + torch.ones(3)
    assert begin("fedavg").world.model.device.type != THERE.type


UNSEEN = {"fed_synth_upload": "second derivatives go through torch's composite attention, which makes its mask by the "
                             "wrapper's device and not by ours"}
"""Methods of which the device made up here cannot show anything."""


FEW = ("fedavg", "flexlora", "fedmezo", "fedprompt", "fedbiot", "fed_dpo")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_methods(name):
    if name in UNSEEN:
        pytest.skip(UNSEEN[name])
    here = end(begin, name, rounds=1)
    with far():
        assert begin(name, **METHODS[name]).world.model.device == THERE
        there = end(begin, name, rounds=1)
    agree(tree_gap, here, there, 1e-10)


@pytest.mark.parametrize("name, knobs", [("lora", {})] + [(n, k) for n, k in CAUSAL if n != "lora"], ids=str)
def test_spaces_with_every_kind_of_request(tiny_llama_folder, name, knobs):
    work = Vectorized, tiny_llama_folder, "generation", make_space(name, **knobs), ADAMW
    here = outcome(*work)
    with far():
        there = outcome(*work)
    assert gap(here, there) < 1e-10
