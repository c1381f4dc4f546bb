"""FedNER: with all types annotated it is FedAvg; targets hold no mass that the annotator ruled out; engines agree."""

import numpy as np
import pytest
import torch

from fedllm.core.errors import CompositionError
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines import ENGINES
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space
from fedllm.tasks.row import IGNORE
from tests.methods.conftest import Run, gap, llama

TAGS = ("O", "B-a", "I-a", "b", "c")


def begin(name="fedner_tagset", engine="vectorized", dtype=torch.float64, hide=True, **knobs):
    """Three clients with unequal numbers of rows, of which client k shows one type alone if `hide`."""
    rng = np.random.default_rng(0)
    known = ((1, 2), (3,), (4,))

    def row(k):
        tags = rng.integers(0, len(TAGS), n := int(rng.integers(4, 9)))
        tags = np.where(np.isin(tags, known[k]), tags, 0) if hide else tags
        tags[0] = IGNORE
        return Encoded(rng.integers(4, 60, n).astype(np.int32), tags, n - 1)

    shards = {f"c{k}": Shard([row(k) for _ in range(5 + 3 * k)], [row(k)]) for k in range(3)}
    net = HeadedEncoder(llama(dtype).model, len(TAGS), "each").to(dtype)
    model = Model(net, None, "tokens", make_space("lora", rank=2), labels=TAGS, fast_kernels=False)
    world = World(model, Federation(shards, [row(0)], "tokens", TAGS), LocalSpec("sgd", 0.1, batch_size=4))
    method = make_method(name, **knobs)
    run = Run(method, ENGINES[engine]((method,), world), world)
    run.state = method.init(model)
    return run


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_engines_agree(dtype, most):
    """Two rounds: one of the warm-up, and one with a teacher."""
    one, other = (begin(engine=e, dtype=dtype, warmup_rounds=1).go(2).state["theta"] for e in ENGINES if e in (
        "in_process", "vectorized"))
    assert gap(one, other) <= most
    assert gap(one, begin("fedavg", dtype=dtype).go(2).state["theta"]) > 1e-3


def test_with_all_types_annotated_it_is_fedavg():
    mine, plain = (begin(name, hide=False).go(3).state["theta"] for name in ("fedner_tagset", "fedavg"))
    assert gap(mine, plain) < 1e-10


def test_a_target_is_the_open_tags_share():
    row = Encoded(np.zeros(3, np.int32), np.array([IGNORE, 0, 3]), 2)
    z, open_ = np.log(np.array([[1, 1, 1, 1, 1], [2, 3, 1, 4, 4], [1, 1, 1, 1, 1.0]])), np.array([1, 1, 1, 0, 0])
    got = make_method("fedner_tagset").completed(row, z, open_, 0)
    assert got[1] == pytest.approx([2 / 6, 3 / 6, 1 / 6, 0, 0])  # b is annotated here, so an O is no b
    assert got[2].tolist() == [0, 0, 0, 1, 0] and not got[0].any()


def test_a_task_without_tags_is_refused():
    run = begin()
    run.world.model.task = "classification"
    with pytest.raises(CompositionError, match=r"completes tags, and data\.task = 'classification' has none"):
        run.method.check(run.world.model)
    with pytest.raises(CompositionError, match="needs the tag 'O'"):
        run.method.check(Model(run.world.model.net, None, "tokens", make_space("bias"), labels=("a", "b")))
