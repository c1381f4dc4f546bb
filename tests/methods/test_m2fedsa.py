"""M2FedSA: split equals unsplit, what crosses and what stays, the fusion's phases, pictures with texts from files."""

from __future__ import annotations

import json

import pytest
import torch

import fedllm
from evidence.rigs.two_views import two_views
from fedllm.core.errors import ClientError, CompositionError, DataError, ModelError, RecipeError
from fedllm.core.layer import Layer
from fedllm.core.payload import tensor_bytes
from fedllm.core.program import drive
from fedllm.methods._towers import settled, shared
from fedllm.models.towers import towers
from tests.methods.conftest import tried
from tests.tasks.test_parts import FIELDS, clip_folder, painted  # noqa: F401

OURS = tried("m2fedsa")


class Heard(Layer):
    """Keeps what each reply held, by client function."""

    def __init__(self):
        self.said = []

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.said.append((fn, client.id, dict(reply)))
        return reply


def test_one_step_of_the_split_model_is_one_of_the_unsplit():
    assert two_views("m2fedsa", 3, whole=True)["off_unsplit"] <= 1e-5


def test_frozen_weights_stay_and_a_client_needs_a_share_of_the_towers(begin):
    run = begin("m2fedsa", **OURS)
    before = {n: t.clone() for n, t in run.world.model.net.state_dict().items()}
    first = run.state
    run.go(2)
    assert all(torch.equal(t, before[n]) for n, t in run.world.model.net.state_dict().items())
    for part in ("ends", "tasks", "fusion"):
        assert any(not torch.equal(t, first[part][n]) for n, t in run.state[part].items())
    for front, rest in towers(run.world.model, 1).values():
        mine, theirs = ([n for n in before if half.holds(n)] for half in (front, rest))
        assert {n.split("layers.")[1][0] for n in mine if "layers." in n} == {"0"}  # 1 of 2 blocks, and embeddings
        assert any("embeddings" in n for n in mine) and not any("embeddings" in n for n in theirs)
        assert any(("post_layernorm" in n) or ("final_layer_norm" in n) for n in theirs)
    a, b = (run.state["tasks"][f"clip.{v}_model.encoder.layers.1.mlp.adapter_mid.weight"] for v in ("vision", "text"))
    assert torch.equal(a, b) and a.shape == (4, 4)  # the square layer alone is one for both modalities


def test_what_crosses_in_a_step_is_what_the_formula_says(begin):
    ear = Heard()
    begin("m2fedsa", layers=(ear,), sizes=(4, 4), **OURS).go(1)
    bytes_of = {}
    for fn, c, reply in ear.said:
        bytes_of.setdefault((fn, c), []).append((tensor_bytes(reply), reply))
    b, tokens, widths, classes, size = 4, 5, {"image": 16, "text": 12}, 3, 8  # fp64
    for key in [k for k in bytes_of if k[0] in ("begin", "turn")]:
        for total, reply in bytes_of[key]:
            if "image" in reply:
                t = reply["text"].shape[1]
                assert total == size * b * (tokens * widths["image"] + t * widths["text"]) + b * t  # and the mask
    for key in [k for k in bytes_of if k[0] == "top"]:
        assert all(total == size * b * (sum(widths.values()) + classes) for total, _ in bytes_of[key])
    kinds = {n for _, _, reply in ear.said for n in reply}
    assert not kinds & {"pixels", "words", "labels", "ids"} and len(bytes_of) >= 6


def test_once_it_goes_on_evenly_the_fusion_is_fixed_and_teaches(begin, gap):
    assert not settled([1.0, 0.9], 3, 0.3) and settled([1.0, 0.9, 0.8, 0.7], 3, 0.3)
    assert not settled([1.0, 0.5, 0.9, 0.2], 3, 0.3)
    run = begin("m2fedsa", **OURS, fuse_window=3, fuse_below=1e9).go(4)
    assert run.state["fused"]
    fixed, ends = run.state["fusion"], run.state["ends"]
    taught = run.go(1).state
    assert gap(taught["fusion"], fixed) == 0 and gap(taught["ends"], ends) > 0
    alone = begin("m2fedsa", **OURS, fuse_window=3, fuse_below=1e9, own=1.0, feedback=0.0, align=0.0).go(5).state
    plain = begin("m2fedsa", **OURS, fuse_window=9).go(5).state
    assert gap(alone["ends"], plain["ends"]) < 1e-10 < gap(taught["ends"], plain["ends"])  # CE(fused) moves nobody here
    assert set(shared({"x.adapter_up.weight": torch.ones(2)})) == {"x.adapter_up.weight"}


def test_each_modality_is_scored_and_who_has_no_test_rows_counts_nothing(begin):
    run = begin("m2fedsa", **OURS).go(1)
    run.world.federation.clients["c0"].test.clear()
    told = drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine, run.engine.stack[1:])
    assert told["c0"] == {"n": 0} and {"loss", "accuracy", "image_accuracy", "text_accuracy"} <= set(told["c1"])


@pytest.mark.parametrize("changed, error, why", [
    ({"space": "lora", "space_knobs": {"rank": 2, "targets": ("q_proj",)}}, CompositionError,
     "'m2fedsa' and space 'lora' do not fit together"),
    ({"task": "generation"}, ModelError, "it lies in both towers of an image-text model of the family CLIP"),
    ({"space_knobs": {"cut": 2}}, ModelError, r"space\.cut = 2: allowed are 1 to 1"),
    ({"heads": 3}, CompositionError, r"method\.heads = 3 does not divide method\.hidden = 8"),
    ({"fuse_window": 2}, RecipeError, "fuse_window")])
def test_what_it_refuses_before_a_round(begin, changed, error, why):
    with pytest.raises(error, match=why):
        begin("m2fedsa", **{**OURS, **changed})


def test_adamw_and_rows_of_one_modality_are_refused(begin):
    with pytest.raises(CompositionError, match=r"m2fedsa and local\.optimizer = 'adamw' .*plain SGD"):
        begin("m2fedsa", **{**OURS, "local": {"optimizer": "adamw"}}).go(1)
    run = begin("m2fedsa", **OURS)
    for row in run.world.federation.clients["c0"].train:
        row.parts.pop("words")
        row.pads.clear()
    with pytest.raises((DataError, ClientError), match="client 'c0' has rows without a picture or without a text"):
        run.go(1)


def test_a_recipe_reads_pictures_with_texts_and_serves_what_was_trained(painted, clip_folder, tmp_path):  # noqa: F811
    rows = [{**json.loads(line), "say": "one two"} for line in (painted / "list.jsonl").read_text().splitlines()]
    (painted / "both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {"model": {"name": clip_folder}, "method": {"name": "m2fedsa", "steps": 1, "hidden": 8, "heads": 2},
              "space": {"name": "split_adapter", "size": 4}, "rounds": 1, "local": {"optimizer": "sgd", "lr": 0.1},
              "data": {"source": str(painted / "both.jsonl"), "task": "image_text", "fields": {**FIELDS, "text": "say"},
                       "partition": {"kind": "iid", "clients": 2}}}
    result = fedllm.run(recipe, root=tmp_path)
    assert 0 <= result.evaluation["global"]["image_accuracy"] <= 1 and result.adapter_path.name == "trainables"
    with pytest.raises((DataError, ClientError), match="without a text"):
        fedllm.run({**recipe, "data": {**recipe["data"], "fields": FIELDS}}, root=tmp_path / "one")
