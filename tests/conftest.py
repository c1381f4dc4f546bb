"""What tests of all rooms stand on: one torch thread, and two tiny models saved as ordinary transformers folders."""

import json
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same tests on every machine; set it to 0 to run them on a card
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the Hub, and its library asks again for half a minute

import pytest
import torch

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "say", "the", "word", "is", "a",
         "good", "bad", "film", "of", "and", "to", "yes", "no", "north", "south", "east", "west",
         "bank", "court", "ward", "bus"]


def pytest_addoption(parser):
    parser.addoption("--plugin", action="append", default=[], metavar="FILE", help="A file with a method of one's own, "
                     "which the tests that hold for all methods then try too.")


def pytest_configure(config):
    hypothesis_profile()
    if files := config.getoption("--plugin"):
        from fedllm.runs.plugins import plugged

        plugged([(file, None) for file in files])


def hypothesis_profile():
    """The same inputs each time, or with FEDLLM_FUZZ (`make fuzz`) new ones, and what it takes to make a failing one
    again. Nothing is kept on disk; a machine's speed decides nothing."""
    from hypothesis import HealthCheck, settings

    new = "FEDLLM_FUZZ" in os.environ
    settings.register_profile("fedllm", derandomize=not new, print_blob=new, database=None, deadline=None,
                              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large,
                                                     HealthCheck.large_base_example,
                                                     HealthCheck.function_scoped_fixture])
    settings.load_profile("fedllm")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def word_tokenizer():
    """A tokenizer with one token for each of WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory):
    """A Llama of 2 layers and width 32 with random weights, and a word tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(WORDS) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
                         bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_bert_folder(tmp_path_factory):
    """A BERT of 2 layers and width 32 with random weights, and a word tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS) + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0)
    BertModel(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def other_words(folder):
    """A tokenizer of the same words under other numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *reversed(WORDS)])},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def wide_bert_folder(tmp_path_factory):
    """A BERT of one layer and width 48, and a tokenizer of its own."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("wide_bert")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        BertModel(BertConfig(vocab_size=len(WORDS) + 3, hidden_size=48, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=4, max_position_embeddings=128)).save_pretrained(folder)
    return other_words(folder)


@pytest.fixture(scope="session")
def wide_llama_folder(tmp_path_factory):
    """A Llama of one layer and width 48, and a tokenizer of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide_llama")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(LlamaConfig(
            vocab_size=len(WORDS) + 3, hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=1)).save_pretrained(folder)
    return other_words(folder)


RECORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "say", "the", "word"]


@pytest.fixture(scope="session")
def after(tiny_llama_folder):
    """Make (trainables, what each client sent last, layers' states): some rounds on the tiny Llama under layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedllm.core.layer import Facts, Layer
    from fedllm.core.program import drive
    from fedllm.data.federation import Federation, Shard
    from fedllm.engines import ENGINES
    from fedllm.engines.world import World
    from fedllm.local.spec import LocalSpec
    from fedllm.methods.registry import make_method
    from fedllm.models.model import Model
    from fedllm.spaces import make_space

    class Seen(Layer):
        """Stands next to the wire and keeps what each client sends last."""

        def __init__(self):
            self.got = {}

        def client(self, fn, msg, client, call):
            self.got[client.id] = call(msg)
            return self.got[client.id]

    def row(k, i):
        text = [RECORDS[(7 * i + 3 * k + j * (i + 1)) % len(RECORDS)] for j in range(3 + (5 * i + k) % 9)]
        return {"prompt": " ".join(text), "response": " ".join(text[:2])}

    def make(layers=(), rounds=2, engine="vectorized", method="fedavg", dtype=torch.float32, loopback=False,
             knobs=None, k=5, public=()):
        net = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=dtype).to(PLACE)
        model = Model(net, AutoTokenizer.from_pretrained(tiny_llama_folder), "generation", make_space("lora", rank=4))
        shards = {f"c{i}": Shard([row(i, j) for j in range(6 + i)], [row(i, 50)]) for i in range(k)}
        spec = LocalSpec(optimizer="sgd", lr=0.1, steps=2, batch_size=3)
        world = World(model, Federation(shards, [row(9, 1)], "generation", public=public), spec)
        facts = Facts({c: len(s.train) for c, s in shards.items()}, k, rounds, spec)
        seen = Seen()
        layers = [*(x.bind(facts) for x in layers), seen]
        m = make_method(method, **(knobs or {}))
        driver, state, states = ENGINES[engine]((m, *layers), world, loopback=loopback), m.init(model), [
            x.init() for x in layers]
        for t in range(rounds):
            driver.begin(t)
            state = drive(m.round(state, world.infos()), driver, layers, states)
            driver.commit()
        return m.served(state)[0], seen.got, states

    return make



@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """160 rows `say the word red cat` -> `cat red`, with the color as category."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(160):
            color, animal = draw.choice(["red", "green", "blue"]), draw.choice(["cat", "dog", "bird"])
            file.write(json.dumps({"prompt": f"say the word {color} {animal}", "response": f"{animal} {color}",
                                   "category": color}) + "\n")
    return str(path)


@pytest.fixture
def recipe(rows_file, tiny_llama_folder):
    """As a mapping, to be changed by the test."""
    return {
        "name": "small", "model": tiny_llama_folder, "rounds": 4, "local": {"lr": 0.02},
        "data": {"source": rows_file, "partition": {"kind": "iid", "clients": 5}, "client_test": 0.2},
        "clients": {"per_round": 3}, "evaluate": {"max_new_tokens": 4, "samples": 2}}
