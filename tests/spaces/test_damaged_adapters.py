"""An adapter that is damaged, or another's, is refused by file and value, wherever it is read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.cli.chat import Speaker
from fedllm.core.errors import FedLLMError, ModelError
from fedllm.models.load import load_model
from fedllm.models.peft_io import CONFIG, WEIGHTS, knobs_of, load_adapter, save_adapter
from fedllm.models.reread import begin_with
from fedllm.runs.export import export
from fedllm.spaces.registry import make_space


@pytest.fixture(scope="module")
def model(tiny_llama_folder):
    return load_model(tiny_llama_folder, "generation", make_space("lora", rank=2, targets=("q_proj",)))


@pytest.fixture
def folder(tmp_path, model, tiny_llama_folder):
    save_adapter(tmp_path / "ad", model, model.initial(), tiny_llama_folder)
    return tmp_path / "ad"


def config(folder, **changes):
    said = json.loads((folder / CONFIG).read_text())
    said |= changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in said.items() if v != "gone"}))


def tensors(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


@pytest.mark.parametrize("changes, said", [
    ({"r": "gone"}, "lacks 'r'"), ({"lora_alpha": "gone"}, "lacks 'lora_alpha'"),
    ({"target_modules": "gone"}, "lacks 'target_modules'"), ({"lora_alpha": "x"}, "not as PEFT writes it"),
    ({"lora_alpha": None}, "not as PEFT writes it"), ({"target_modules": 3}, "not as PEFT writes it"),
    ({"target_modules": None}, "not as PEFT writes it")])
def test_a_config_that_is_none_is_refused_by_its_key(folder, changes, said):
    config(folder, **changes)
    with pytest.raises(ModelError, match=rf"{CONFIG} .*{said}|{CONFIG} {said}"):
        knobs_of(folder, "lora")


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_a_config_that_is_no_object_is_refused(folder, model, text):
    (folder / CONFIG).write_text(text)
    for read in (lambda: knobs_of(folder, "lora"), lambda: load_adapter(folder, model)):
        with pytest.raises(ModelError, match="PEFT writes an object there"):
            read()


def test_a_config_may_begin_with_a_mark(folder):
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    assert knobs_of(folder, "lora")["rank"] == 2


def one(change):
    return lambda tree: {n: change(t) if i == 0 else t for i, (n, t) in enumerate(sorted(tree.items()))}


@pytest.mark.parametrize("change, said", [
    (one(lambda t: t * float("nan")), "holds NaN or infinity"), (one(lambda t: t / 0), "holds NaN or infinity"),
    (one(lambda t: t.to(torch.int32)), "is of type torch.int32"), (one(lambda t: t[:, :-1].contiguous()), "has shape"),
    (one(lambda t: torch.cat([t, t])), "do not belong together"),
    (lambda tree: {n: t.T.contiguous() for n, t in tree.items()}, "do not belong together|has shape")])
def test_damaged_tensors_are_refused_by_name(folder, model, change, said):
    tensors(folder, change)
    with pytest.raises(ModelError, match=said):
        load_adapter(folder, model)


@pytest.mark.parametrize("changes", [{"r": 16}, {"rank_pattern": {"q_proj": 1}}])
def test_a_rank_that_the_tensors_do_not_have_is_refused(folder, model, changes):
    config(folder, **changes)
    with pytest.raises(ModelError, match="says that the rank is"):
        load_adapter(folder, model)


def test_numbers_that_are_too_large_to_think_with_are_refused(folder, model):
    tensors(folder, lambda tree: {n: t + 1e30 for n, t in tree.items()})
    with pytest.raises(ModelError, match="logits are no longer finite"):
        begin_with(folder, model)
    model.start = None


def test_an_adapter_of_another_base_is_said(folder, model):
    config(folder, base_model_name_or_path="/models/another-7b")
    begin_with(folder, model)
    model.start = None
    assert any("was made for the base model '/models/another-7b'" in s for s in model.said)


def test_a_damaged_product_is_not_handed_out(recipe, tmp_path):
    import fedllm

    result = fedllm.run(recipe, root=tmp_path, rounds=1, space={"name": "lora", "rank": 2, "targets": ["q_proj"]})
    assert export(result.folder, tmp_path / "good").is_dir()
    whole = (result.folder / "adapter" / WEIGHTS).read_bytes()
    for spoil in (lambda f: (f / WEIGHTS).write_bytes(whole[:-40]), lambda f: (f / CONFIG).write_text("{"),
                  lambda f: tensors(f, lambda tree: {n: t * float("nan") for n, t in tree.items()})):
        shutil.copytree(result.folder / "adapter", tmp_path / "kept", dirs_exist_ok=True)
        spoil(result.folder / "adapter")
        for act in (lambda: export(result.folder, tmp_path / "bad"),
                    lambda: export(result.folder, tmp_path / "bad", merge=True), lambda: Speaker(result.folder)):
            with pytest.raises(FedLLMError, match="adapter"):
                act()
        assert not (tmp_path / "bad").exists()
        shutil.copytree(tmp_path / "kept", result.folder / "adapter", dirs_exist_ok=True)
