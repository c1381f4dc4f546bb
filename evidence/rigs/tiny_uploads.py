"""A small classifier whose clients send inputs in the place of updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import LlamaModel

from evidence.rigs.missing_labels import LABELS, config, reader, text
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import SERVER
from fedllm.core.payload import part, tensor_bytes
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess
from fedllm.engines.world import World
from fedllm.local.forward import run_logits
from fedllm.local.requests import Logits
from fedllm.local.spec import LocalSpec
from fedllm.local.unrolled import replayed
from fedllm.methods.registry import METHODS
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space


class Seen(InProcess):
    """Keeps what clients sent last."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.sent: dict[str, Any] = {}
        super().__init__(*args, **more)

    def work(self, job: Any, submit: Any) -> Any:
        reply = super().work(job, submit)
        if job.client != SERVER and isinstance(reply, Mapping) and "x" in reply:
            self.sent[job.client] = (part(job.fold.ask.msgs[job.client], "theta"), reply)
        return reply


def tiny_uploads(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 1,
                 local: Mapping[str, Any] | None = None) -> Metrics:
    """Two clients with texts of four labels; a classifier of two blocks of width 16.

    `cosine` of the replayed change to the client's own (mean), `bytes_share` of the upload, `replay_gap` between two
    replays, `apart`: the share of inputs whose nearest row is further than rows' nearest rows are (median).
    """
    torch.set_num_threads(1)
    rng, read = numpy_stream(seed, "tiny uploads"), reader()
    rows = lambda n: [{"text": read.decode(text(rng, k)), "label": k} for k in range(4) for _ in range(n)]  # noqa: E731
    fed = Federation({f"client-{i}": Shard(rows(8)) for i in range(2)}, rows(40), "classification", LABELS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        net = HeadedEncoder(LlamaModel(config(16, 32)), 4, "mean")
    model = Model(net, read, "classification", make_space("full"), labels=LABELS, seed=seed, fast_kernels=False)
    spec = LocalSpec(**{"optimizer": "sgd", "lr": 0.3, "steps": 5, "batch_size": 32, "max_length": 16, **(local or {})})
    world = World(model, fed, spec, seed)
    told = {k: v for k, v in {"outer_steps": 60, **(knobs or {})}.items() if k in METHODS[method].knobs()}
    run = Trial(method, world, told, Seen).rounds(rounds)
    [z] = run_logits([Logits("x", model, run.state["theta"], None, world.encoded(SERVER, "test"))], world.limits)
    right = [int(np.argmax(v)) == int(e.labels) for v, e in zip(z, world.encoded(SERVER, "test"), strict=True)]  # type: ignore[arg-type]
    out: Metrics = {"accuracy": float(np.mean(right)), **run.work()}
    if run.engine.sent:
        sent = list(run.engine.sent.values())
        w, one = sent[0]
        twice = [replayed(model, w, one["x"], one["y"], one["a"], run.method.inner_steps) for _ in range(2)]
        out |= {"cosine": float(np.mean([r["cosine"] for _, r in sent])),
                "bytes_share": tensor_bytes({k: one[k] for k in ("x", "y", "a")}) / tensor_bytes(w),
                "replay_gap": max(float((a - twice[1][n]).abs().max()) for n, a in twice[0].items()),
                "apart": _apart(world, model, sent)}
    return out


def _apart(world: World, model: Model, sent: list[Any]) -> float:
    table = model.net.get_input_embeddings().weight.detach()  # type: ignore[operator]
    own = torch.stack([table[torch.as_tensor(e.ids).long()].mean(0) for c in world.federation.clients
                       for e in world.encoded(c, "train")])
    among = torch.cdist(own, own).fill_diagonal_(torch.inf).min(1).values.median()
    made = torch.cat([r["x"].mean(1) for _, r in sent]).to(own.dtype)
    return float((torch.cdist(made, own).min(1).values >= among).float().mean())


RIGS = {"tiny_uploads": tiny_uploads}
