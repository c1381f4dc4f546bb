"""What a run left is the model that it tested, in whatever form: an adapter, weights with a head, trainables alone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedllm
from fedllm.cli.chat import Speaker
from fedllm.evaluation.measure import on_tasks
from fedllm.evaluation.rows import evaluate_rows
from fedllm.evaluation.trained import Trained
from fedllm.models.load import load_model
from fedllm.models.peft_io import HEAD
from fedllm.spaces import make_space
from tests.conftest import WORDS

LABELS = ("animal", "color")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    path = tmp_path_factory.mktemp("told") / "told.jsonl"
    path.write_text("".join(json.dumps({"text": f"{w} {WORDS[i % 20]}", "label": LABELS[i % 2]}) + "\n"
                            for i, w in enumerate(["cat", "red", "dog", "blue"] * 12)))
    return str(path)


@pytest.mark.parametrize("space, form", [("head", "model"), ("layers", "model"), ("lora", "adapter"),
                                         ("mlp_head", "trainables")])
def test_a_classifier_is_loaded_again_with_its_trained_head(told, tiny_bert_folder, tmp_path, space, form):
    knobs = {"lora": {"rank": 2}, "layers": {"layers": [-1]}}.get(space, {})
    run = fedllm.run({"model": tiny_bert_folder, "rounds": 2, "local": {"lr": 0.05, "steps": 6}, "data": {
        "source": told, "task": "classification", "partition": {"kind": "iid", "clients": 2}},
        "space": {"name": space, **knobs}}, root=tmp_path)
    assert run.adapter_path.name == form
    got = evaluate_rows(Trained(run.folder))
    tested = run.evaluation["global"]
    assert got.metrics["loss"].after == pytest.approx(tested["loss"], abs=1e-5)
    assert got.metrics["accuracy"].after == pytest.approx(tested["accuracy"]) and abs(
        got.metrics["loss"].after - got.metrics["loss"].before) > 1e-3
    if form != "trainables":
        out = fedllm.export(run.folder, tmp_path / "out", merge=form == "adapter")
        again = load_model(str(out), "classification", make_space("head"), labels=LABELS)
        kept = load_file(out / HEAD)["classifier.weight"]
        assert again.initial()["classifier.weight"].equal(kept) and not any(HEAD in s for s in again.said)
        turned = load_model(str(out), "classification", make_space("head"), labels=LABELS[::-1])
        assert turned.initial()["classifier.weight"].equal(kept.flip(0))


def test_a_head_of_other_labels_shape_or_pooling_is_not_used_and_it_is_said(tiny_bert_folder, tmp_path):
    import shutil

    shutil.copytree(tiny_bert_folder, folder := tmp_path / "m")
    new = load_model(str(folder), "classification", make_space("head"), labels=LABELS).initial()
    good = {"classifier.weight": torch.ones(2, 32), "classifier.bias": torch.ones(2)}
    for tree, meta, why in ((good, {"labels": '["a", "b"]'}, "of the labels a, b"),
                            (good, {"pooling": "cls"}, "over model.pooling = 'cls'"),
                            ({"classifier.weight": torch.ones(2, 8)}, None, "of the shape")):
        save_file(tree, folder / HEAD, metadata=meta)
        model = load_model(str(folder), "classification", make_space("head"), labels=LABELS)
        assert any(why in s and "a new one is trained" in s for s in model.said)
        assert model.initial()["classifier.weight"].equal(new["classifier.weight"])


TASK = """task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: asked.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: gold
doc_to_choice: "{{choices}}"
"""


@pytest.mark.parametrize("space", [{"name": "adapter", "size": 4}, {"name": "layer_prefix", "length": 2},
                                   {"name": "head"}], ids=lambda s: s["name"])
def test_trainables_alone_are_measured_talked_to_and_asked_by_lm_eval(recipe, tmp_path, space):
    run = fedllm.run(recipe, root=tmp_path, rounds=1, space=space, clients={"per_round": 2})
    got = evaluate_rows(Trained(run.folder))
    assert got.metrics["loss"].after == pytest.approx(run.evaluation["global"]["loss"], abs=1e-5)
    assert got.metrics["loss"].after != got.metrics["loss"].before
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "say the word", "choices": ["red", "cat"], "gold": 0}))
    (tmp_path / "colors.yaml").write_text(TASK)
    found, _ = on_tasks(run.folder, [str(tmp_path / "colors.yaml")])
    assert 0 <= found["after"]["results"]["colors"]["acc,none"] <= 1
    if run.adapter_path.name == "trainables":
        assert isinstance(Speaker(run.folder).say("say the word"), str)
