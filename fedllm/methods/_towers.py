"""Split learning over two towers: what a client makes of its rows, what the server makes of that, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.client import Client
from fedllm.core.errors import DataError
from fedllm.core.form import need
from fedllm.core.payload import Payload, Tree, add, part, zeros_like
from fedllm.local.segments import Slopes
from fedllm.models.batch import collate
from fedllm.models.fusion import Fusion, Taught, fuse, fusion_slopes, fusion_start, head_says, head_slopes, head_start
from fedllm.models.towers import PATHS, towers

BOTH = ("image", "text")


def halves(model: Any, side: int, theta: Tree) -> dict[str, tuple[Any, Tree]]:
    """By modality: the front (0) or the rest (1) of its tower, and that half's trainables."""
    return {m: (t[side], t[side].part(model, theta)) for m, t in towers(model, model.space.cut).items()}


def fusion_of(model: Any, hidden: int, heads: int) -> Fusion:
    """The fusion over this model's towers; its weights are the server's state."""
    clip = model.net.clip.config
    widths = {"image": clip.vision_config.hidden_size, "text": clip.text_config.hidden_size}
    with torch.device("meta"):
        return Fusion(widths, hidden, heads, len(model.labels))


def started(model: Any, net: Fusion, hidden: int) -> dict[str, Tree]:
    """What clients hold and send (`ends`: fronts' adapters and heads), the server's `tasks`, and the `fusion`."""
    theta, c = model.initial(), len(model.labels)
    wide, front = next(iter(theta.values())).dtype, {n for _, t in halves(model, 0, theta).values() for n in t}
    heads = {f"{m}.{n}": t.to(wide) for m in BOTH for n, t in
             head_start(net.enter[m].in_features, hidden, c, model.seed, m).items()}  # type: ignore[arg-type]
    return {"ends": {**{n: t for n, t in theta.items() if n in front}, **heads},
            "tasks": {n: t for n, t in theta.items() if n not in front},
            "fusion": {n: t.to(wide) for n, t in fusion_start(net, model.seed).items()}}


def settled(losses: Sequence[float], window: int, below: float) -> bool:
    """Whether a loss goes on evenly: its last round-to-round differences vary little against their mean."""
    steps = np.diff(losses)
    return len(steps) >= window and float(steps.std()) < below * abs(float(steps.mean()))


def ahead(client: Client) -> Payload:
    """The states of the next batch of the session's plan."""
    at, client.session["plan"] = client.session["plan"][0], client.session["plan"][1:]
    return states(client, client.session["ends"], [client.tokens[i] for i in at])


def states(client: Client, ends: Tree, rows: Sequence[Any]) -> Payload:
    """e_m = front_m(x_m) of these rows [B, T, d]; what is needed for the way back stays in the session."""
    model: Any = client.model
    batch = client.session["batch"] = collate([rows], model.pad, "cpu")  # type: ignore[arg-type, list-item]
    if not {"pixels", "words"} <= batch.parts.keys():
        raise DataError(f"client '{client.id}' has rows without a picture or without a text; method 'm2fedsa' needs "
                        "both in each (columns image and text)")
    ones, words = torch.ones(len(batch.ids), model.net.vision_tokens, dtype=torch.bool), batch.parts["words"]
    x = client.session["x"] = {"image": (batch.parts["pixels"], ones), "text": (words.clamp(min=0), words >= 0)}
    return {m: client.forward(s, theta, *x[m]) for m, (s, theta) in halves(model, 0, ends).items()} | {
        "mask": words >= 0}


def back(client: Client, g: Payload) -> None:
    """The fronts' step on the rows that they saw last, from dL/de_m."""
    x, ends, lr = client.session["x"], dict(client.session["ends"]), client.training.lr
    for m, (segment, theta) in halves(client.model, 0, ends).items():
        ends |= {n: theta[n] - lr * t for n, t in client.backward(segment, theta, *x[m], g[m]).theta.items()}
    client.session["ends"] = ends


def taught(client: Client, msg: Payload, by: Taught | None) -> Payload:
    """dL_m/df_m and the heads' own step; dCE/d(fused logits), from which the fusion learns, and that loss."""
    y, z = client.session["batch"].labels, msg["z"].detach().requires_grad_()
    ends, out = dict(client.session["ends"]), dict[str, Any]()
    for m in BOTH:
        head = head_of(ends, m)
        client.book(tokens=0, steps=0, flops=6.0 * len(y) * sum(t.numel() for t in head.values()))
        out[m], g = head_slopes(head, msg[f"f/{m}"], y, msg["fused"], msg["z"], by)
        ends |= {f"{m}.{n}": head[n] - client.training.lr * t for n, t in g.items()}
    client.session["ends"], loss = ends, F.cross_entropy(z, y)
    return {**out, "z": torch.autograd.grad(loss, z)[0], "loss": float(loss.detach())}


def figures(client: Client, msg: Payload) -> dict[str, float]:
    """`loss` and `accuracy` of the fusion, and how often each modality's own head is right."""
    y = torch.tensor([int(row.labels) for row in client.encode(client.held_out(msg["on"]))])
    if not len(y):
        return {"n": 0}
    said = {m: head_says(head_of(part(msg, "ends"), m), msg[f"f/{m}"])[1] for m in BOTH}
    right = {n: float((u.argmax(-1) == y).double().mean()) for n, u in (("accuracy", msg["z"]), *(
        (f"{m}_accuracy", u) for m, u in said.items()))}
    return {"n": len(y), "loss": float(F.cross_entropy(msg["z"], y)), **right}


def joined(client: Client, tasks: Tree, fusion: Tree, net: Fusion, of: Mapping[str, Payload]) -> dict[str, Payload]:
    """f_m = rest_m(e_m) [B, d] for each client, and what the fusion makes of both; e_m waits for its gradient."""
    rests, out, kept = halves(client.model, 1, tasks), dict[str, Payload](), dict[str, Any]()
    client.session["of"] = kept
    for c, got in of.items():
        masks = {"image": torch.ones(got["image"].shape[:2], dtype=torch.bool), "text": got["mask"].bool()}
        f = {m: client.forward(s, theta, got[m], masks[m])[:, 0] for m, (s, theta) in rests.items()}
        fused, z = fuse(net, fusion, f)
        kept[c], out[c] = (got, masks, f), {**{f"f/{m}": t for m, t in f.items()}, "fused": fused, "z": z}
    return out


def slopes(client: Client, tasks: Tree, fusion: Tree, net: Fusion, of: Mapping[str, Payload]
           ) -> tuple[Tree, Tree, dict[str, Tensor]]:
    """The clients' mean dL/d tasks and dCE/d fusion, and dL/de_m by `client/modality`."""
    total, other, down = zeros_like(tasks), zeros_like(fusion), dict[str, Tensor]()
    for c, up in of.items():
        got, masks, f = client.session["of"][c]
        for m, (segment, theta) in halves(client.model, 1, tasks).items():
            found: Slopes = client.backward(segment, theta, got[m], masks[m], up[m][:, None])
            total |= {n: total[n] + t / len(of) for n, t in found.theta.items()}
            assert found.x is not None
            down[f"{c}/{m}"] = found.x
        client.book(tokens=0, steps=0, flops=6.0 * len(up["z"]) * sum(t.numel() for t in fusion.values()))
        other = add(other, fusion_slopes(net, fusion, f, up["z"]), 1 / len(of))
    return total, other, down


def fit_slopes(method: Any, msg: Payload, reply: Payload) -> None:
    """PayloadError for gradients of something else than what was sent."""
    for key, mine in (("f/image", "image"), ("f/text", "text"), ("z", "z")):
        need(reply[mine].shape == msg[key].shape,
             f"'{mine}' has shape {tuple(reply[mine].shape)}, sent was {tuple(msg[key].shape)}")


def fit_states(method: Any, msg: Payload, reply: Payload) -> None:
    """PayloadError for states that no tower makes."""
    if msg.get("stop"):
        return need("done" in reply and "image" not in reply, "it was the last step, and states came")
    image, text, mask = (reply.get(k) for k in (*BOTH, "mask"))
    need(image is not None and text is not None and mask is not None, "of 'image', 'text' and 'mask' one is lacking")
    wide = {m: {t.shape[-1] for k, t in msg.items() if k == m or (k.endswith("adapter_down.weight") and PATHS[m] in k)}
            for m in BOTH}
    fits = image.dim() == text.dim() == 3 and len(image) == len(text) and mask.shape == text.shape[:2]
    need(fits and image.numel() > 0 and text.numel() > 0 and image.shape[-1] in wide["image"]
         and text.shape[-1] in wide["text"], f"states have shapes {tuple(image.shape)}, {tuple(text.shape)} and mask "
         f"{tuple(mask.shape)}, allowed are [B, T, d] and [B, T] of one B")


def head_of(ends: Tree, m: str) -> Tree:
    """One modality's head."""
    return {n.removeprefix(m + "."): t for n, t in ends.items() if n.startswith(m + ".")}


def each(payload: Payload, name: str, ids: Sequence[str]) -> dict[str, Payload]:
    """What was packed under `name` for each of these clients."""
    return {c: part(payload, f"{name}/{c}") for c in ids}


def under(replies: Mapping[str, Payload]) -> Payload:
    """Several clients' replies as one tree, by `client/part`."""
    return {f"{c}/{k}": v for c, reply in replies.items() for k, v in reply.items()}


def shared(tasks: Tree) -> Tree:
    """The square layers of both modalities' task adapters averaged; the others differ in width and stay as they are."""
    of: dict[str, list[str]] = {}
    for name in tasks:
        if ".adapter_mid." in name:
            of.setdefault(name.rpartition(".")[2], []).append(name)
    mean = {end: torch.stack([tasks[n] for n in names]).mean(0) for end, names in of.items()}
    return {n: mean[n.rpartition(".")[2]].clone() if ".adapter_mid." in n else t for n, t in tasks.items()}
