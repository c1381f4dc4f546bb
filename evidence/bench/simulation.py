"""Training tokens per CPU-second of a simulated round, beside OpenFedLLM's loop and a plain PEFT loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evidence.bench.rows import Row, peer, row
from fedllm.core.errors import FedLLMError
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines import Vectorized
from fedllm.engines.client import ClientCall
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.kernels import fast
from fedllm.models.model import Model
from fedllm.spaces import make_space

VOCABULARY = 4096
LR = 1e-3


@dataclass(frozen=True)
class Size:
    """A model and the work of one round."""

    label: str
    hidden: int
    layers: int
    targets: str | tuple[str, ...] = "all-linear"
    clients: int = 8
    steps: int = 5
    batch: int = 4
    length: int = 64
    vocabulary: int = VOCABULARY
    gate: float | None = None  # tokens per CPU-second over OpenFedLLM's
    moonshot: float | None = None
    moonshot_peft: float = 2.5
    device: str = "cpu"

    @property
    def flops(self) -> float:
        """Multiply-adds times two, per token, of a forward and a backward with frozen weights."""
        d, ff = self.hidden, wide(self.hidden)
        blocks = self.layers * (4 * d * d + 3 * d * ff)
        sites = [(d, d)] * (2 if self.targets != "all-linear" else 4)
        sites += [(d, ff)] * 3 if self.targets == "all-linear" else []
        adapters = self.layers * sum(8 * (i + o) for i, o in sites)
        return 4.0 * (blocks + d * self.vocabulary) + 6.0 * adapters + 6.0 * self.layers * self.length * d


SIZES = (
    Size("S B4 T64", 128, 2, ("q_proj", "v_proj"), gate=8, moonshot=12),
    Size("S B1 T32", 128, 2, ("q_proj", "v_proj"), batch=1, length=32, gate=30, moonshot=50, moonshot_peft=3.5),
    Size("M B4 T64", 256, 4, steps=3, gate=3.5, moonshot=6),
    Size("L B4 T64", 512, 8, clients=4, steps=2, gate=2.5, moonshot=4),
)


class Contender(Protocol):
    """Something that can train one federated round; returns the tokens that it trained on."""

    def round(self) -> int: ...


class Ours:
    """FedAvg on the vectorized engine, as `fedllm run` would do it."""

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32, optimizer: str = "adamw",
                 rank: int = 8) -> None:
        tokenizer, self.texts = tokenizer_of(size), texts_of(size)
        space = make_space("lora", rank=rank, alpha=16.0, targets=size.targets)
        self.model = Model(net_of(size, dtype), tokenizer, "generation", space)
        shards = {c: Shard([{"prompt": "", "response": text} for text in rows]) for c, rows in self.texts.items()}
        local = LocalSpec(optimizer=optimizer, lr=LR, batch_size=size.batch, max_length=size.length)
        self.world = World(self.model, Federation(shards, [], "generation"), local, completion_only=False)
        self.method = make_method("fedavg")
        self.engine = Vectorized((self.method,), self.world)
        self.state, self.rounds_done = self.method.init(self.model), 0

    def round(self) -> int:
        self.engine.begin(self.rounds_done)
        self.state = drive(self.method.round(self.state, self.world.infos()), self.engine)
        self.engine.commit()
        self.rounds_done += 1
        return sum(len(e.ids) for c in self.texts for e in self.world.encoded(c, "train"))  # one epoch: each row once

    def plans(self) -> dict[str, list]:
        """Each client's batches in the first round."""
        calls = {c.id: ClientCall(c, self.world, {}, 0, "FedAvg.local", 1, _refuse) for c in self.world.infos()}
        return {c: call.batches(len(self.texts[c]) // self.world.local.batch_size) for c, call in calls.items()}


def _refuse(request: Any) -> Any:
    raise FedLLMError(f"{type(request).__name__}: this client only tells its batches")


def wide(hidden: int) -> int:
    """The width of the feed-forward part."""
    return hidden * 11 // 4


def net_of(size: Size, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of this size with the same random weights every time."""
    torch.manual_seed(0)
    heads = max(4, size.hidden // 64)
    config = LlamaConfig(vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=wide(size.hidden),
                         num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads,
                         max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                         attn_implementation="sdpa")
    with torch.device(size.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tokenizer_of(size: Size) -> PreTrainedTokenizerFast:
    """One word, one token."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(size.vocabulary - len(special))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


def texts_of(size: Size) -> dict[str, list[str]]:
    """Each client's rows; all are longer than the limit, so that every side trains on exactly `length` tokens."""
    rng, words = Random(0), size.vocabulary - 4
    return {f"c{k}": [" ".join(f"w{rng.randrange(words)}" for _ in range(size.length + 2))
                      for _ in range(size.steps * size.batch)] for k in range(size.clients)}


def plain_peft(size: Size, ours: Ours, dtype: torch.dtype = torch.float32, optimizer: str = "adamw") -> Contender:
    """The plain PEFT loop on the rows and batches that our side trains on."""
    rows = {c: [e.ids for e in ours.world.encoded(c, "train")] for c in ours.texts}
    config = ours.model.space.peft_config(ours.model.net, "generation")
    return peer("plain_peft").PlainPeft(net_of(size, dtype), config, rows, ours.plans(), lr=LR, optimizer=optimizer)


def openfedllm(size: Size, ours: Ours) -> Contender:
    """OpenFedLLM's loop on the same texts."""
    config = ours.model.space.peft_config(ours.model.net, "generation")
    return peer("openfedllm").OpenFedLLM(net_of(size), config, tokenizer_of(size), ours.texts, steps=size.steps,
                                         batch_size=size.batch, max_length=size.length, lr=LR)


def race(contenders: Mapping[str, Contender], repeats: int, floor: float = 0.4,
         clock: Callable[[], float] = time.process_time) -> dict[str, list[float]]:
    """Tokens per second of each, turn by turn, after one warm-up round each; `clock` tells seconds (CPU time).

    A turn lasts `floor` seconds or one round, whichever is longer, so that short rounds are not lost in noise.
    """
    for contender in contenders.values():
        contender.round()
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            gc.collect()
            tokens, start = 0, clock()
            while not tokens or clock() - start < floor:
                tokens += contender.round()
            speeds[name].append(tokens / (clock() - start))
    return speeds


def ratio(speeds: Mapping[str, Sequence[float]], ours: str, theirs: str) -> float:
    """Median over turns of how many times faster."""
    return median(a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True))


def simulation() -> list[Row]:
    """All sizes in fp32 beside both peers; S and M once more with the frozen base in bf16."""
    rows: list[Row] = []
    for size in SIZES:
        rows += _size_rows(size)
    for size in (SIZES[0], SIZES[2]):
        rows.append(_half_row(size))
    return rows


def _size_rows(size: Size, repeats: int = 3) -> list[Row]:
    ours = Ours(size)
    speeds = race({"ours": ours, "openfedllm": openfedllm(size, ours), "plain_peft": plain_peft(size, ours)}, repeats)
    peak, tokens = gemm_rate(size), {name: round(median(s)) for name, s in speeds.items()}
    facts = {"tokens_per_cpu_s": tokens, "gemm_gflops": round(peak / 1e9, 1),
             "share_of_gemm_rate": {n: round(t * size.flops / peak, 2) for n, t in tokens.items()}}
    name = f"simulation/{size.label}"
    return [row(f"{name} vs OpenFedLLM", ratio(speeds, "ours", "openfedllm"), "times", "OpenFedLLM's loop", size.gate,
                size.moonshot, span=span(speeds, "ours", "openfedllm"), **facts),
            row(f"{name} vs plain PEFT", ratio(speeds, "ours", "plain_peft"), "times", "plain PEFT loop", 1.7,
                size.moonshot_peft, span=span(speeds, "ours", "plain_peft"), **facts)]


def _half_row(size: Size, repeats: int = 1) -> Row:  # one turn: a CPU without bf16 products needs minutes for it
    half, full = Ours(size, torch.bfloat16), Ours(size)
    speeds = race({"bf16 base": half, "fp32": full}, repeats)
    return row(f"simulation/{size.label} bf16 base vs fp32", ratio(speeds, "bf16 base", "fp32"), "times",
               "ours with the base in fp32", span=span(speeds, "bf16 base", "fp32"),
               tokens_per_cpu_s={name: round(median(s)) for name, s in speeds.items()})


def gemm_rate(size: Size) -> float:
    """Flop per CPU-second of the size's own matrix product here, best of five: the ceiling of all contenders."""
    x, w = torch.randn(1024, size.hidden), torch.randn(size.hidden, size.hidden)
    work, best, times = 2.0 * 1024 * size.hidden**2, 0.0, max(4, int(4e9 / (2.0 * 1024 * size.hidden**2)))
    with fast(torch.device("cpu"), size.length):
        for _ in range(5):
            start = time.process_time()
            for _ in range(times):
                torch.mm(x, w)
            best = max(best, work * times / (time.process_time() - start))
    return best


def span(speeds: Mapping[str, Sequence[float]], ours: str, theirs: str) -> list[float]:
    """Least and most over turns of how many times faster."""
    each = sorted(a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True))
    return [round(each[0], 2), round(each[-1], 2)]
