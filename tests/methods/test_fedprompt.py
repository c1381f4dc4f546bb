"""FedPrompt: the mean of prompts is the central step, the model stays, and labels are compared among themselves."""

from __future__ import annotations

import pytest
import torch

from evidence.rigs.edge import backbone_of
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.payload import tensor_bytes
from fedllm.data.federation import Federation, Shard
from fedllm.local.forward import run_measures
from fedllm.local.objectives.label_words import LabelWords
from fedllm.local.objectives.verbalized import Said
from fedllm.local.requests import Limits, Measure
from fedllm.models.batch import collate
from tests.methods.conftest import WORDS

ALL = tuple(WORDS)
ONE_STEP = {"optimizer": "sgd", "lr": 0.1, "steps": 1, "batch_size": 64}
PROMPT = {"space": "soft_prompt", "space_knobs": {"length": 4}}


def test_one_step_of_each_and_the_mean_is_one_step_on_all_rows(begin, gap):
    apart = begin("fedprompt", verbalizer=ALL, local=ONE_STEP, **PROMPT)
    held = apart.world.federation
    pooled = [row for shard in held.clients.values() for row in shard.train]
    one = begin("fedprompt", verbalizer=ALL, local=ONE_STEP, sizes=(len(pooled),), **PROMPT)
    one.world.federation = Federation({"c0": Shard(pooled, [])}, held.test, "generation")
    start = apart.state["theta"]
    assert gap(apart.go().state["theta"], one.go().state["theta"]) < 1e-8  # trainables are fp32
    assert gap(start, one.state["theta"]) > 1e-4


@pytest.mark.parametrize("space", ["soft_prompt", "p_tuning", "prefix"])
def test_the_prompt_alone_travels_and_the_model_stays(begin, space):
    run = begin("fedprompt", space=space, space_knobs={"length": 4})
    before = backbone_of(run.world.model)
    run.go(2)
    told = run.method.report(run.state)
    assert backbone_of(run.world.model) == before
    assert told["sent"] * 4 == tensor_bytes(run.state["theta"])
    assert told["of"] == sum(p.numel() for p in run.world.model.net.parameters())
    assert told["share"] == told["sent"] / told["of"]
    if space == "soft_prompt":
        assert told["sent"] == 4 * 16


def test_a_label_is_held_against_the_other_labels_words_alone(begin):
    run = begin("fedprompt", **PROMPT)
    model, words = run.world.model, tuple(range(4, 14))
    rows = run.world.tokenized([{"prompt": "w20 w21", "response": f"w{k}"} for k in (0, 3, 30)], True, model)
    z = torch.from_numpy(run_measures([Measure("x", model, run.state["theta"], None, rows, fn=Said(words))],
                                      Limits())[0])
    batch = collate([rows], model.pad, model.device)
    with model.using([run.state["theta"]]), torch.no_grad():
        total, count = LabelWords(words).losses(model, batch, {})
    assert count.tolist() == [1, 1, 0]  # w30 is no label
    assert total[:2].double().tolist() == pytest.approx((-z.log_softmax(-1)[[0, 1], [0, 3]]).tolist(), abs=1e-9)
    assert float(total[2]) == 0


def test_what_is_no_prompt_or_no_label_is_refused(begin):
    with pytest.raises(CompositionError, match=r"'fedprompt' and space 'lora' do not fit.*soft_prompt, p_tuning"):
        begin("fedprompt")
    with pytest.raises(CompositionError, match=r"needs two words or more"):
        begin("fedprompt", verbalizer=("w1",), **PROMPT)
    with pytest.raises(CompositionError, match=r"data.task = 'classification' do not fit together"):
        begin("fedprompt", verbalizer=ALL, task="classification", **PROMPT)
    with pytest.raises(DataError, match=r"'w1 w2' is 2 tokens"):
        begin("fedprompt", verbalizer=("w1 w2", "w3"), **PROMPT).go()
