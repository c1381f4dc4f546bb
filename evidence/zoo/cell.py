"""One cell of the table: an architecture with a space, trained by both engines and judged by plain transformers."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evidence.zoo.configs import config_of, tiny
from evidence.zoo.plain import Plain, moves, prompts
from fedllm.core.errors import FedLLMError
from fedllm.core.layer import Layer
from fedllm.core.payload import Tree, part
from fedllm.core.program import drive
from fedllm.data.encode import IGNORE, Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines import ENGINES
from fedllm.engines.world import World
from fedllm.local.generate import run_generates
from fedllm.local.requests import Generate, Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.checks import reads_texts
from fedllm.models.dual import DualEncoder
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.proof import examine
from fedllm.spaces.registry import make_space

LENGTHS = ((11, 4, 7), (6, 3))
"""Tokens of the two clients' rows: none as the examination's."""
STEPS, RATE, WORDS = 2, 0.05, 3
NEAR = {torch.float64: 1e-4, torch.float32: 2e-2}
"""By how much a change of the trainables may differ, by the largest change of the tensor (trainables are fp32)."""
SEEN = {"targets": ["k_proj", "v_proj", "fc2"]}
KNOBS: dict[tuple[str, str], dict[str, Any]] = {
    ("", "lora"): {"rank": 4}, ("", "soft_prompt"): {"length": 3}, ("", "prefix"): {"length": 3},
    ("", "adapter"): {"size": 4}, ("", "layers"): {"layers": [-1]}, ("", "mask"): {"density": 0.1},
    ("image_text", "ia3"): {**SEEN, "feedforward": ["fc2"]}}
"""Of a space, or of a task and a space."""


class Seen(Layer):
    """Stands next to the wire and keeps what each client sends."""

    def __init__(self) -> None:
        self.got: dict[str, Any] = {}

    def client(self, fn: Any, msg: Any, client: Any, call: Any) -> Any:
        self.got[client.id] = call(msg)
        return self.got[client.id]


@dataclass
class Verdict:
    """right, falls back, refused, wrong or broken; `why` says which ways are left out, or what is refused or wrong."""

    task: str
    name: str
    space: str
    outcome: str
    why: str = ""
    dtype: str = ""
    ways: list[str] = field(default_factory=list)


def judge(name: str, space: str, task: str = "generation") -> Verdict:
    """Train two clients for a round in both engines, and each of them in plain transformers."""
    dtype = torch.float64
    try:
        if task != "image_text":
            reads_texts(name, config_of(name, task), task != "generation")
        net = tiny(name, task, dtype)
        if not _runs(net, task):
            dtype = torch.float32  # transformers itself cannot run it in fp64
            net = tiny(name, task, dtype)
    except FedLLMError as error:
        return Verdict(task, name, space, "refused", str(error))
    except Exception as error:
        return Verdict(task, name, space, "no model", f"{type(error).__name__}: {str(error).splitlines()[0]}")
    kind = str(dtype).removeprefix("torch.")
    try:
        model = _model(name, net, space, task, dtype)
        examine(model, cache=False)
        left = model.ways.without(type(model.ways)()) + (["silent"] if model.silent else [])
        if not model.stackable and "together" not in left:  # the space itself says that its modules take one at a time
            left.insert(0, "together")
        with tempfile.TemporaryDirectory() as folder:
            wrong = _wrong(model, name, dtype, Path(folder))
    except FedLLMError as error:
        return Verdict(task, name, space, "refused", str(error), kind)
    except Exception as error:
        return Verdict(task, name, space, "broken", f"{type(error).__name__}: {str(error).splitlines()[:1]}", kind)
    if wrong:
        return Verdict(task, name, space, "WRONG", wrong, kind, left)
    return Verdict(task, name, space, "falls back" if left else "right", " ".join(model.said), kind, left)


def _runs(net: Any, task: str) -> bool:
    words = getattr(net, "text_model", net).get_input_embeddings().weight
    seen = {"pixel_values": torch.randn(1, 3, 16, 16).to(words)} if task == "image_text" else {}
    try:
        out = net(input_ids=torch.arange(2, 8)[None], **seen)
        [grad] = torch.autograd.grad(out[0].sum(), words)
    except RuntimeError:
        return False
    except Exception:
        return True  # what else is wrong is the examination's to say
    return bool(grad.isfinite().all())


def _model(name: str, net: Any, space: str, task: str, dtype: torch.dtype) -> Model:
    made = make_space(space, **KNOBS.get((task, space), KNOBS.get(("", space), {})))
    if task in ("generation", "masked_words"):
        return Model(net, None, task, made, name=name)
    ours = DualEncoder(net, *prompts()) if task == "image_text" else HeadedEncoder(net, 3, "mean")
    return Model(ours.to(dtype), None, task, made, labels=("a", "b", "c"), name=name)


def _wrong(model: Model, name: str, dtype: torch.dtype, folder: Path) -> str:
    rng = torch.Generator().manual_seed(7)
    start = {n: t + 0.05 * torch.randn(t.shape, generator=rng).to(t) for n, t in model.initial().items()}
    model.start = start
    rows = {f"c{k}": [_row(model, int(n), i, rng) for i, n in enumerate(LENGTHS[k])] for k in range(2)}
    plain = {c: Plain(model, start, tiny(name, model.task, dtype), folder / c) for c in rows}
    said = {c: [p.says(torch.from_numpy(r.ids).long(), WORDS) for r in rows[c]] for c, p in plain.items()} if (
        model.task == "generation" and not model.silent) else {}
    ends = {c: p.train(rows[c], STEPS, RATE) for c, p in plain.items()}
    for engine in ("in_process", "vectorized"):
        got = _round(model, rows, engine)
        for c, (end, loss) in ends.items():
            if abs(got[c]["loss"] - loss) > NEAR[dtype] * 0.1 * max(1.0, abs(loss)):
                return f"{engine}: loss {got[c]['loss']:.6f}, plain {loss:.6f}"
            if apart := _apart(part(got[c], "delta"), moves(start, True, end), start, NEAR[dtype]):
                return f"{engine}: {apart}"
    if said:
        asked = [Generate(c, model, start, None, [r.ids for r in rows[c]], WORDS) for c in rows]
        together = run_generates(asked, Limits()) if model.stackable else [
            run_generates([a], Limits())[0] for a in asked]
        for c, words in zip(rows, together, strict=True):
            plainly = [list(itertools.takewhile(lambda word: word not in model.ends, ids)) for ids in said[c]]
            if words != plainly:  # an answer ends before its end token
                return f"says {words}, plain {plainly}"
    return ""


def _row(model: Model, length: int, i: int, rng: torch.Generator) -> Encoded:
    if model.task == "image_text":
        pixels = torch.randn(3, 16, 16, generator=rng).numpy()
        return Encoded(np.zeros(1, np.int32), i % 3, 1, {"pixels": pixels.astype(np.float32)})
    ids = torch.randint(5, 64, (length,), generator=rng).numpy().astype(np.int32)
    if model.task == "classification":
        return Encoded(ids, i % 3, 1)
    labels = ids.astype(np.int64)
    labels[: length // 2] = IGNORE
    if model.task == "masked_words":
        ids[length // 2 :: 2] = 4
    return Encoded(ids, labels, int((labels != IGNORE).sum()))


def _round(model: Model, rows: dict[str, list[Encoded]], engine: str) -> dict[str, Any]:
    """What each client sends in a round of FedAvg."""
    shards: Any = {c: Shard(r, []) for c, r in rows.items()}
    labels = {"labels": model.labels} if model.labels else {}
    federation = Federation(shards, [], model.task, **labels)
    spec = LocalSpec(optimizer="sgd", lr=RATE, steps=STEPS, batch_size=max(map(len, rows.values())))
    method, seen = make_method("fedavg"), Seen()
    world = World(model, federation, spec)
    driver = ENGINES[engine]((method, seen), world)
    driver.begin(0)
    drive(method.round(method.init(model), world.infos()), driver, [seen], [seen.init()])
    return seen.got


def _apart(got: Tree, want: Tree, start: Tree, near: float) -> str:
    for n, w in want.items():
        far = float((got[n].double() - w).abs().max())
        scale: float = float(w.abs().max())
        if not far <= near * scale + 3e-7 * float(start[n].abs().max().clamp(min=1e-2)):
            return f"{n} moves by {far:.2g} otherwise than in plain transformers (it moves by {scale:.2g})"
    return ""
