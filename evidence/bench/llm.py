"""A real language model, trained and asked, beside what one would write by hand in transformers and PEFT.

FEDLLM_LLM names the model (`smollm2`, or a folder), FEDLLM_LLM_DATA the folder of `code_alpaca_2k.jsonl` and
`gsm8k_test.jsonl`. Speed is taken turn by turn in one process, memory in processes of their own:
`python -m evidence.bench.llm SIDE CASE` writes one side's peak.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from evidence.bench.rows import Row, memory_mb, peer, row, subprocess_row
from evidence.bench.simulation import Contender, race, ratio, span
from fedllm.core.errors import FedLLMError
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.local.generate import run_generates
from fedllm.local.requests import Generate, Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.load import load_model, load_tokenizer, resolve
from fedllm.models.model import Model
from fedllm.spaces import make_space

LR, ANSWERS, WORDS = 1e-3, 100, 64


@dataclass(frozen=True)
class Case:
    """The work of one round: 8 clients of LoRA of rank 8 on queries and values."""

    batch: int
    length: int
    steps: int
    gate: float
    moonshot: float
    chat: bool = False
    """Code Alpaca behind the model's chat template, of which responses are learned; else all tokens of full rows."""


CASES = {"4 x 128": Case(4, 128, 1, 1.3, 1.5), "chat rows": Case(4, 192, 2, 1.6, 2.0, chat=True),
         "1 x 64": Case(1, 64, 2, 2.0, 3.0)}


def name_of() -> str:
    """The model that is measured."""
    return os.environ.get("FEDLLM_LLM", "smollm2")


def rows_in(file: str) -> list[dict[str, Any]]:
    """A file of the data; FedLLMError where nobody says where it lies."""
    folder = os.environ.get("FEDLLM_LLM_DATA")
    if not folder or not (Path(folder) / file).exists():
        raise FedLLMError(f"bench llm: FEDLLM_LLM_DATA = {folder!r} must be a folder that holds {file}")
    return [json.loads(line) for line in (Path(folder) / file).read_text().splitlines()]


def space() -> Any:
    return make_space("lora", rank=8, alpha=16.0, targets=("q_proj", "v_proj"))


@functools.cache
def ours() -> Model:
    """One model for all of our side."""
    return load_model(name_of(), "generation", space())


def net() -> Any:
    """The model as transformers has it."""
    return AutoModelForCausalLM.from_pretrained(resolve(name_of()), dtype=torch.float32)


def shards(case: Case) -> dict[str, Shard]:
    """Each client's rows."""
    data, each = rows_in("code_alpaca_2k.jsonl"), case.batch * case.steps
    if case.chat:
        made = [{"messages": [{"role": "user", "content": f"{r['instruction']}\n{r['input']}".strip()},
                              {"role": "assistant", "content": r["output"]}]} for r in data]
        made = [{**r, "prompt": r["messages"][0]["content"], "response": r["messages"][1]["content"]} for r in made]
    else:  # long enough to fill the length, whatever the row
        text = "\n".join(r["output"] for r in data)
        made = [{"prompt": "", "response": text[i * 1000 : (i + 1) * 1000]} for i in range(8 * each)]
    return {f"c{k}": Shard(made[k * each : (k + 1) * each]) for k in range(8)}


class Ours:
    """FedAvg on the vectorized engine, as `fedllm run` would do it."""

    def __init__(self, model: Model, case: Case) -> None:
        local = LocalSpec(lr=LR, batch_size=case.batch, max_length=case.length)
        self.world = World(model, Federation(shards(case), [], "generation"), local, completion_only=case.chat)
        self.method = make_method("fedavg")
        self.engine = Vectorized((self.method,), self.world)
        self.state, self.done = self.method.init(model), 0

    def rows(self) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        """Tokens and labels of each client."""
        return {c.id: [(e.ids.astype(np.int64), np.asarray(e.labels)) for e in self.world.encoded(c.id, "train")]
                for c in self.world.infos()}

    def round(self) -> int:
        self.engine.begin(self.done)
        self.state = drive(self.method.round(self.state, self.world.infos()), self.engine)
        self.engine.commit()
        self.done += 1
        return sum(len(ids) for rows in self.rows().values() for ids, _ in rows)


def theirs(rows: Mapping[str, Any], case: Case, pad: int) -> Contender:
    """The loop by hand on the same rows."""
    from peft import LoraConfig

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peer("plain_llm").PlainLoop(net(), config, rows, case.batch, pad, lr=LR)


def prompts() -> list[np.ndarray]:
    """Questions behind the chat template."""
    tokenizer = load_tokenizer(name_of())
    asked = [tokenizer.apply_chat_template([{"role": "user", "content": r["question"]}], add_generation_prompt=True,
                                           tokenize=False) for r in rows_in("gsm8k_test.jsonl")[:ANSWERS]]
    return [np.array(ids, np.int32) for ids in tokenizer(asked, add_special_tokens=False)["input_ids"]]


def answer(model: Model, asked: Sequence[np.ndarray]) -> list[list[int]]:
    """Our answers."""
    return run_generates([Generate("bench", model, model.initial(), None, asked, WORDS)], Limits())[0]


def llm() -> Iterator[Row]:
    """Training in three shapes and generation: speed and peak memory."""
    for name, case in CASES.items():
        mine = Ours(ours(), case)
        speeds = race({"ours": mine, "plain": theirs(mine.rows(), case, ours().pad)}, 3)
        yield row(f"llm/{name} vs plain PEFT", ratio(speeds, "ours", "plain"), "times", "plain PEFT loop",
                  case.gate, case.moonshot, span=span(speeds, "ours", "plain"),
                  tokens_per_cpu_s={n: round(median(s), 1) for n, s in speeds.items()})
        yield _memory(name, 1.2)
    yield from _generation()


def _generation(repeats: int = 2) -> Iterator[Row]:
    asked, model, plain = prompts(), ours(), net().eval()
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: answer(model, asked),
        "plain": lambda: peer("plain_llm").generate(plain, asked, WORDS, model.pad)}
    spent: dict[str, list[float]] = {n: [] for n in sides}
    said: dict[str, Any] = {}
    for _ in range(repeats):
        for side, work in sides.items():
            start = time.process_time()
            said[side] = work()
            spent[side].append(time.process_time() - start)
    cut = [next((row[:i] for i, w in enumerate(row) if w in model.ends), row) for row in said["plain"]]
    yield row(f"llm/{ANSWERS} answers vs transformers.generate", median(
        p / o for o, p in zip(spent["ours"], spent["plain"], strict=True)), "times", "transformers, 16 at once",
        1.3, cpu_s={n: round(median(s), 1) for n, s in spent.items()},
        equal=sum(a == b for a, b in zip(said["ours"], cut, strict=True)))
    yield _memory("answers", 1.0)


def _memory(name: str, gate: float) -> Row:
    peak = {side: subprocess_row("evidence.bench.llm", side, name)["peak_mb"] for side in ("ours", "plain")}
    return row(f"llm/{name} memory", peak["ours"] / peak["plain"], "times", "the same by hand", gate, least=True,
               peak_mb=peak)


def alone(side: str, name: str) -> dict[str, float]:
    """One side's peak memory at one case, of two rounds."""
    torch.set_num_threads(1)
    if name == "answers":
        asked = prompts()
        if side == "ours":
            answer(ours(), asked)
        else:
            peer("plain_llm").generate(net().eval(), asked, WORDS, 2)
    else:
        case = CASES[name]
        if side == "ours":
            work: Contender = Ours(ours(), case)
        else:
            from types import SimpleNamespace

            from fedllm.tasks.registry import task_of

            tokenizer = load_tokenizer(name_of())
            reader: Any = SimpleNamespace(tokenizer=tokenizer, task="generation", images=None, rules=task_of(
                "generation"), positions=8192, room=8192, space=space(), read=list)
            work = theirs(Ours.rows(SimpleNamespace(world=World(  # type: ignore[arg-type]
                reader, Federation(shards(case), [], "generation"), LocalSpec(max_length=case.length),
                completion_only=case.chat))), case, tokenizer.pad_token_id or 0)
        for _ in range(2):
            work.round()
    return {"peak_mb": round(memory_mb(peak=True), 1)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(alone(*sys.argv[1:3])) + "\n")
