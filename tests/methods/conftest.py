"""A tiny federation on a tiny Llama, and a driver for a few rounds of any method."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.core.client import Profile
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines import ENGINES
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method, method_class
from fedllm.models.dual import DualEncoder
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.names import Names
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space
from fedllm.tasks.row import Encoded
from tests.conftest import PLACE
from tests.methods import applications

torch.set_num_threads(1)
WORDS = [f"w{i}" for i in range(60)]
SIZES = (5, 7, 9, 12)
KINDS = ("one", "two", "three")


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


def words(rnd: random.Random, least: int, most: int) -> str:
    return " ".join(rnd.choices(WORDS, k=rnd.randint(least, most)))


def rows(rnd: random.Random, n: int) -> list[dict[str, str]]:
    return [{"prompt": words(rnd, 3, 8), "response": words(rnd, 1, 4)} for _ in range(n)]


def labelled(rnd: random.Random, n: int) -> list[dict[str, Any]]:
    """Texts with one of three labels; rows of one id at several clients are parts of one thing."""
    return [{"text": words(rnd, 3, 8), "label": rnd.randrange(3), "id": f"x{i}", "lang": "ab"[i % 2]}
            for i in range(n)]


def preferred(rnd: random.Random, n: int) -> list[dict[str, str]]:
    return [{"prompt": words(rnd, 3, 8), "chosen": words(rnd, 1, 4), "rejected": words(rnd, 1, 4)} for _ in range(n)]


def tagged(rnd: random.Random, n: int) -> list[dict[str, Any]]:
    """Words with one of three tags each, of which the first is `O`."""
    said = [words(rnd, 3, 8).split() for _ in range(n)]
    return [{"tokens": text, "tags": [rnd.randrange(3) for _ in text]} for text in said]


def pictured(rnd: random.Random, n: int) -> list[Encoded]:
    """Pictures of noise with a text that ends in the end token, and one of three labels."""
    noise = np.random.default_rng(rnd.randrange(2**32))
    said = [np.array([1, *(4 + rnd.randrange(60) for _ in range(rnd.randint(3, 8))), 2]) for _ in range(n)]
    return [Encoded(np.zeros(1, np.int32), rnd.randrange(3), 1, {
        "pixels": noise.normal(0, 1, (3, 8, 8)).astype(np.float32), "words": text}, {"words": -1.0}) for text in said]


ROWS = {"generation": rows, "classification": labelled, "preference": preferred, "tokens": tagged,
        "image_text": pictured, **applications.ROWS}
LABELS = {**applications.LABELS, "classification": KINDS, "image_text": KINDS, "tokens": ("O", "a", "b")}


def federation(sizes: tuple[int, ...] = SIZES, task: str = "generation") -> Federation:
    """Clients with so many rows each, and a few public ones."""
    rnd, made = random.Random(int(task != "generation")), ROWS[task]
    held = 3 if task == "classification" else 2
    shards = {f"c{i}": Shard(made(rnd, n), made(rnd, held)) for i, n in enumerate(sizes)}
    return Federation(shards, made(rnd, 4), task, LABELS.get(task, ()), made(rnd, 5))


def net_for(task: str, dtype: torch.dtype) -> Any:
    """The tiny Llama, with a head for the task's labels where it has some."""
    if task in applications.NETS:
        return applications.NETS[task]().to(dtype)
    if task not in LABELS:
        return llama(dtype)
    if task == "image_text":
        prompts = torch.tensor([[1, 4 + c, 2] for c in range(3)])
        names = Names((1,), ((4,), (5,), (6,)), (2,), (7,), (8, 9))
        return DualEncoder(clip(dtype), prompts, cached=False, names=names)
    return HeadedEncoder(llama(dtype).model, len(LABELS[task]), "each" if task == "tokens" else "mean").to(dtype)


def clip(dtype: torch.dtype = torch.float64) -> CLIPModel:
    """Towers of two blocks, the text's 12 wide and the picture's 16."""
    tower = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "attention_dropout": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPModel(CLIPConfig(
            text_config={**tower, "hidden_size": 12, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2,
                         "bos_token_id": 1, "pad_token_id": 0},
            vision_config={**tower, "hidden_size": 16, "image_size": 8, "patch_size": 4}, projection_dim=8)).to(dtype)


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """Its k and v projections are 8 x 16 and its feed-forward 24 x 16: no module of it is square but q and o."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                             attn_implementation="sdpa")
        return LlamaForCausalLM(config).to(dtype)


@dataclass
class Run:
    """What a few rounds of a method left."""

    method: Any
    engine: Any
    world: World
    state: dict = field(default_factory=dict)

    def go(self, rounds: int = 1, clients: list[str] | None = None) -> Run:
        for _ in range(rounds):
            infos = [c for c in self.world.infos() if clients is None or c.id in clients]
            if clients is not None:  # in the order that was asked for
                infos.sort(key=lambda c: clients.index(c.id))
            self.engine.begin(getattr(self, "t", -1) + 1)
            self.t = self.engine.round
            self.state = drive(self.method.round(self.state, infos), self.engine, self.engine.stack[1:])
            self.engine.commit()
        return self

    def up(self) -> int:
        return self.engine.record.totals()["up"]


def begin(name: str, *, engine: str = "vectorized", dtype: torch.dtype = torch.float64, space: str = "lora",
          space_knobs: dict | None = None, local: dict | None = None, layers: tuple = (), ranks: tuple = (),
          sizes: tuple[int, ...] = SIZES, loopback: bool = False, kind: type | None = None, task: str = "generation",
          **knobs: Any) -> Run:
    """A method on the tiny federation, before its first round."""
    knobs_of_space = {"rank": 4} if space == "lora" else {}
    bare = task == "image_text" or task in applications.NETS  # whose rows are tensors from the start
    reader = None if bare else tokenizer()
    model = Model(net_for(task, dtype).to(PLACE), reader, task,
                  make_space(space, **(knobs_of_space | (space_knobs or {}))), labels=LABELS.get(task, ()),
                  fast_kernels=False)
    plain = {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 4, "max_length": 32}
    spec = LocalSpec(**(plain | (local or {})))
    fed = federation(sizes, task)
    profiles = {c: Profile(rank=r) for c, r in zip(fed.clients, ranks, strict=False)}
    method = make_method(name, **knobs)
    world = World(model, fed, spec, profiles=profiles, exact_match=False, models=Shelf({
        n: functools.partial(named, n, method, dtype) for n in (*method.asks_for(), *method.server_asks_for())}))
    run = Run(method, (kind or ENGINES[engine])((method, *layers), world, loopback=loopback), world)
    run.state = method.init(model)
    return run


def named(name: str, method: Any, dtype: torch.dtype) -> Model:
    """A model that a method asks for by name: one of our own for what the method's trial says, else a language model of
    one block."""
    task = method.trial.models.get(name, "generation")
    net = net_for(task, dtype)
    blocks = (net.body if task in LABELS else net.model)
    blocks.layers = blocks.layers[:1]
    blocks.config.num_hidden_layers = 1
    return Model(net.to(PLACE), tokenizer(), task, make_space("lora", rank=2), labels=LABELS.get(task, ()), seed=1,
                 fast_kernels=False)


def tried(name: str) -> dict[str, Any]:
    """What a method's card says it is tried with, as `begin` takes it."""
    trial = method_class(name).trial
    space = dict(trial.space)
    return {"space": space.pop("name"), "space_knobs": space, "local": dict(trial.local), "ranks": trial.ranks,
            "task": trial.task, **trial.knobs}


@pytest.fixture(name="begin")
def begin_fixture():
    return begin


def gap(a: Any, b: Any) -> float:
    """Largest difference between two trees."""
    assert a.keys() == b.keys()
    return max((float((a[k].double() - b[k].double()).abs().max()) for k in a), default=0.0)


@pytest.fixture(name="gap")
def gap_fixture():
    return gap
