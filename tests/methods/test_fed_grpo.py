"""FedGRPO: rewards are the recipe's metric, nothing of a single answer leaves, and isolated clients keep their own."""

import pytest
import torch

from fedllm.core.errors import CompositionError, DataError
from fedllm.core.layer import Layer
from fedllm.core.payload import leaves
from tests.methods.conftest import begin

SMALL = {"prompts": 2, "answers": 3, "max_new_tokens": 2, "local": {"lr": 0.5}}


class Seen(Layer):
    def __init__(self):
        self.sent = []

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.sent += [(msg, reply)] if fn.__name__ == "local" else []
        return reply


def test_equal_rewards_move_nothing_and_others_do(gap):
    run = begin("fed_grpo", **SMALL)
    start = run.state["theta"]
    assert gap(run.go(1).state["theta"], start) == 0.0  # no random answer of a random model is right
    paid = begin("fed_grpo", **SMALL)
    paid.world.metric = "call:tests.methods.test_fed_grpo:even_words"
    assert gap(paid.go(2).state["theta"], start) > 1e-4


def even_words(said, wanted):
    return sum(ord(c) for c in said) % 2


def test_what_leaves_and_what_stays():
    seen = Seen()
    run = begin("fed_grpo", **SMALL, layers=(seen,), weigh="gain").go(2)
    names = {n.split("/")[0] for _, reply in seen.sent for n, _ in leaves(reply)}
    assert names == {"delta", "n", "reward"} and set(run.engine.memory["c0"]) == {"past"}
    assert all(0 < reply["n"] <= run.world.infos()[0].n * 3 for _, reply in seen.sent)
    seen = Seen()
    alone = begin("fed_grpo", **SMALL, layers=(seen,), share="nothing").go(1)
    assert not any(isinstance(v, torch.Tensor) for msg, reply in seen.sent for v in (*msg.values(), *reply.values()))
    assert "theta" in alone.engine.memory["c0"] and not alone.method.serves


def test_one_client_is_plain_grpo(gap):
    one = begin("fed_grpo", **SMALL, sizes=(9,))
    alone = begin("fed_grpo", **SMALL, sizes=(9,), share="nothing")
    for run in (one, alone):
        run.world.metric = "call:tests.methods.test_fed_grpo:even_words"
        run.go(3)
    assert gap(one.state["theta"], alone.engine.memory["c0"]["theta"]) < 1e-12


def test_what_it_cannot_reward_is_refused():
    with pytest.raises(CompositionError, match="fit together: it samples"):
        run = begin("fed_grpo", task="classification")
        run.method.check(run.world.model)
    run = begin("fed_grpo")
    with pytest.raises(DataError, match="several turns"):
        run.method.check_rows((), {"c0": [{"messages": []}]})
