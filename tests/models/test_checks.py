"""Nothing runs unasked, nothing that is used is random, and what cannot be read is refused by name."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration, LlamaForSequenceClassification, LlamaModel

from fedllm.core.errors import CompositionError, ModelError
from fedllm.models.load import load_model, load_tokenizer
from fedllm.spaces import make_space


@pytest.fixture
def folder(tiny_llama_folder, tmp_path):
    return shutil.copytree(tiny_llama_folder, tmp_path / "model")


def load(folder, task="generation", **options):
    labels = ("a", "b") if task == "classification" else ()
    return load_model(str(folder), task, make_space("lora", rank=2), labels=labels, **options)


CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("file, entry", [
    ("config.json", {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}),
    ("tokenizer_config.json", {"AutoTokenizer": [None, "own.OwnTokenizer"]})])
def test_code_of_a_folder_runs_only_when_it_is_trusted(folder, tmp_path, monkeypatch, file, entry):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    said = json.loads((folder / file).read_text())
    said |= {"auto_map": entry} | ({"model_type": "own"} if file == "config.json" else {
        "tokenizer_class": "OwnTokenizer"})
    (folder / file).write_text(json.dumps(said))
    with pytest.raises(ModelError, match=rf"brings code of its own \({file}: auto_map\).*nothing of it was run"):
        load(folder)
    if file == "tokenizer_config.json":
        with pytest.raises(ModelError, match=r"trust_remote_code"):
            load_tokenizer(str(folder))
    assert not mark.exists()
    model = load(folder, trust_remote_code=True)
    assert mark.exists() and "Own" in type(model.net if file == "config.json" else model.tokenizer).__name__


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path(self.mark),)


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load(folder).stackable  # plain tensors are fine
    torch.save({**weights, "x": Evil(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle that holds more than tensors.*safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil(str(tmp_path / "ran"))}))
    with pytest.raises(ModelError):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_that_a_checkpoint_lacks_are_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for 'model.layers.1.mlp.up_proj.weight'.*would be random"):
        load(folder)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_folder_of_another_head_cannot_continue_texts(folder, kind):
    kind.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"no weights for 'lm_head.weight'"):
        load(folder)
    model = load(folder, "classification")  # the classifier is ours
    assert model.stackable
    assert any("score.weight" in s for s in model.said) is (kind is LlamaForSequenceClassification)


def test_shapes_other_than_the_configs_are_refused(folder):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "intermediate_size": 64}))
    with pytest.raises(ModelError, match=r"cannot be loaded|other shapes"):
        load(folder)


@pytest.mark.parametrize("harm, why", [(lambda b: b[: len(b) // 2], "no whole safetensors file"),
                                       (lambda b: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer")])
def test_broken_files_are_named(folder, harm, why):
    path = folder / "model.safetensors"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ModelError, match=rf"model.safetensors is {'a' if 'LFS' in why else 'no'} .*"):
        load(folder)


def test_an_encoder_with_a_decoder_is_refused_in_a_sentence(folder):
    torch.manual_seed(0)
    config = BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    (folder / "model.safetensors").unlink()
    BartForConditionalGeneration(config).save_pretrained(folder)
    for task in ("generation", "classification"):
        with pytest.raises(ModelError, match=r"encoder with a decoder.*do not work here"):
            load(folder, task)


def test_a_tokenizer_of_another_model_and_a_folder_without_one_are_refused(folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["quokka"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"has the word 'quokka' as number 34, and the network has embeddings for 34"):
        load(folder)
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        load(folder)


def test_dropout_that_is_off_is_said(folder):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "attention_dropout": 0.3}))
    assert load(folder).said == ["dropout is off while clients train, though the model's config has "
                                 "attention_dropout > 0"]


@pytest.mark.parametrize("harm, why", [
    (lambda f: (f / "config.json").unlink(), "has no config.json, so that it is no model"),
    (lambda f: ((f / "config.json").unlink(), (f / "adapter_config.json").write_text("{}")), "holds a PEFT adapter"),
    (lambda f: config(f, quantization_config={"quant_method": "fp8"}), "its weights are packed .*'fp8'"),
    (lambda f: narrowed(f), r"'model\.norm\.weight' in 8 bits")])
def test_a_folder_that_is_no_model_or_a_packed_one_is_told_as_that(folder, harm, why):
    harm(folder)
    with pytest.raises(ModelError, match=why):
        load(folder)


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_folder_that_one_stands_in(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    with pytest.raises(ModelError, match=rf"model\.name = '{name}' names no model"):
        load(name)


def test_a_url_is_no_model_and_what_it_holds_is_not_repeated():
    with pytest.raises(ModelError, match="nothing is fetched from a URL") as error:
        load("https://user:hf_SECRET@host/x/y")
    assert "SECRET" not in str(error.value)


def test_a_first_token_that_sees_no_other_stands_for_no_text(folder, tiny_bert_folder):
    with pytest.raises(CompositionError, match=r"pooling = 'cls' .* first token sees none of those after it"):
        load(folder, "classification", pooling="cls")
    load(tiny_bert_folder, "classification", pooling="cls")


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def narrowed(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path, {"format": "pt"})
