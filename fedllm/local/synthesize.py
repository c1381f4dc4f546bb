"""Server training without any rows: texts are made up on which models agree, and a student learns them (DENSE)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedllm.core.errors import ModelError
from fedllm.core.payload import Tree
from fedllm.local.flops import FORWARD, cost_of
from fedllm.local.spec import LocalSpec
from fedllm.models.encoder import HeadedEncoder
from fedllm.models.model import Model


@dataclass(frozen=True)
class Teacher:
    """A client's classifier, and mean and variance of its pooled states on the client's rows [d] each."""

    model: Model
    theta: Tree
    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Making:
    """How texts are made up and learned from."""

    epochs: int
    g_steps: int
    distill_steps: int
    batch: int
    length: int
    words: int
    lambda_oh: float
    lambda_stat: float
    lambda_adv: float
    noise: bool
    """Random words in the generator's place."""
    width: int = 64
    nz: int = 32


def seen(model: Model, batch: Any) -> Tensor:
    """For `client.measure`: each row's pooled state [N, d]."""
    return model.net.pool(model.hidden(batch), batch.mask)


def lanes(teachers: Sequence[Teacher]) -> Iterator[tuple[Model, list[Teacher]]]:
    """Teachers of one network together, which one forward serves; one by one where it has no stacked form."""
    groups: dict[int, list[Teacher]] = {}
    for i, t in enumerate(teachers):
        groups.setdefault(id(t.model) if t.model.stackable else -i - 1, []).append(t)
    for mine in groups.values():
        yield mine[0].model, mine


def read(model: Model, trees: Sequence[Mapping[str, Tensor]], at: Tensor, soft: Tensor,
         stacked: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Pooled states [K, N, d] and class logits [K, N, C] of texts that are mixtures `soft` [N, T, M] of the words `at`
    [M]; differentiable in the mixtures, and in `stacked`."""
    if not isinstance(model.net, HeadedEncoder):
        raise ModelError("texts that are mixtures of words are read by classifiers of ours alone (task classification)")
    path = next(p for p, m in model.net.named_modules() if m is model.net.get_input_embeddings())
    k, n, t = len(trees), *soft.shape[:2]
    tables = [tree.get(f"{path}.weight", model.words).to(soft) for tree in trees]
    if stacked is not None and f"{path}.weight" in stacked:
        tables = list(stacked[f"{path}.weight"].to(soft))
    x = torch.stack([soft @ table[at] for table in tables]).flatten(0, 1)  # [K N, T, d]
    mask = torch.ones(k * n, t, dtype=torch.bool, device=x.device)
    with model.using(trees, None, stacked):
        model.stack.rows, model.stack.mask = k * n, mask
        h = model.net.body(inputs_embeds=x.to(model.net.dtype), attention_mask=mask.long()).last_hidden_state
        pooled = model.net.pool(h, mask)
        z = model.net.classifier(pooled)
    return pooled.view(k, n, -1), z.view(k, n, -1)


def ensemble(teachers: Sequence[Teacher], at: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """(mean logits [N, C], how far the pooled states' mean and variance are from those on the clients' own rows)."""
    total, far = soft.new_zeros(()), soft.new_zeros(())
    for model, mine in lanes(teachers):
        r, z = read(model, [t.theta for t in mine], at, soft)
        total = total + z.sum(0)
        for i, t in enumerate(mine):
            far = far + (r[i].mean(0) - t.mean.to(r)).norm() + (r[i].var(0) - t.var.to(r)).norm()
    return total / len(teachers), far / len(teachers)


class Writer(nn.Module):
    """From noise and a wanted label to mixtures of words [N, T, M]."""

    def __init__(self, how: Making, classes: int, words: int, draw: torch.Generator, dtype: torch.dtype,
                 there: torch.device) -> None:
        super().__init__()
        self.shape, sizes = (how.length, words), (how.nz + classes, how.width, how.length * words)
        self.maps = nn.ParameterList()
        for i, o in itertools.pairwise(sizes):
            self.maps.append((torch.randn(o, i, generator=draw, dtype=dtype) / i**0.5).to(there))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        first, second = self.maps
        return (4 * F.linear(F.relu(F.linear(torch.cat([z, y], 1), first)), second).view(-1, *self.shape)).softmax(-1)


def work(teachers: Sequence[Teacher], student: Model, theta: Tree, how: Making) -> dict[str, float]:
    """What `synthesized` will take, for `client.book`."""
    steps = how.epochs * ((0 if how.noise else how.g_steps) + how.distill_steps)
    rows = [(how.length, 1)] * how.batch
    each = cost_of(student, theta).of(rows, train=True)
    theirs = [cost_of(t.model, t.theta).of(rows, train=False) for t in teachers]
    return {"tokens": steps * (each.tokens + sum(w.tokens for w in theirs)),
            "steps": steps * (1 + FORWARD * len(theirs)),
            "flops": steps * (each.flops + sum(w.flops for w in theirs))}


def synthesized(teachers: Sequence[Teacher], student: Model, theta: Tree, how: Making, spec: LocalSpec,
                rng: np.random.Generator) -> tuple[Tree, float]:
    """The student's trainables after `epochs` of making texts up and learning them, and its last divergence.

    The writer descends lambda_oh CE(ensemble, y) + lambda_stat (states' mean and variance off the clients') -
    lambda_adv KL(student || ensemble) where the two say something else; the student KL(ensemble || student) on all
    texts so far.
    """
    dtype, classes = student.net.dtype, student.net.classifier.out_features
    draw = torch.Generator().manual_seed(int(rng.integers(2**62)))
    v = min(len(t.model.words) for t in (*teachers, Teacher(student, theta, torch.empty(0), torch.empty(0))))
    there = student.device
    at = torch.from_numpy(np.sort(rng.choice(v, min(how.words, v), replace=False))).to(there)
    params = {n: t.detach().to(there, copy=True).requires_grad_() for n, t in theta.items()}
    optimizer, pool, told = spec.optimizer_over(list(params.values())), [], 0.0
    for _ in range(how.epochs):
        soft = (_noise(how, len(at), draw, dtype).to(there) if how.noise else
                _written(teachers, student, params, at, how, classes, draw, dtype))
        with torch.no_grad():
            pool.append((soft, ensemble(teachers, at, soft)[0].log_softmax(-1)))
        for _ in range(how.distill_steps):
            x, want = pool[int(rng.integers(len(pool)))]
            _, z = read(student, [params], at, x, {n: p[None] for n, p in params.items()})
            loss = F.kl_div(z[0].log_softmax(-1), want, reduction="batchmean", log_target=True)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            told = float(loss.detach())
    return {n: p.detach().cpu() for n, p in params.items()}, told


def _noise(how: Making, words: int, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random words, one at each place."""
    at = torch.randint(words, (how.batch, how.length), generator=draw)
    return F.one_hot(at, words).to(dtype)


def _written(teachers: Sequence[Teacher], student: Model, params: Mapping[str, Tensor], at: Tensor, how: Making,
             classes: int, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    """The best texts of a writer that begins anew."""
    writer = Writer(how, classes, len(at), draw, dtype, at.device)
    optimizer = torch.optim.Adam(writer.parameters(), lr=1e-2, betas=(0.5, 0.999))
    y = torch.randint(classes, (how.batch,), generator=draw)
    z, wanted = torch.randn(how.batch, how.nz, generator=draw, dtype=dtype), F.one_hot(y, classes).to(dtype)
    y, z, wanted = (t.to(at.device) for t in (y, z, wanted))
    still = {n: p.detach() for n, p in params.items()}
    best, least = torch.empty(0), float("inf")
    for _ in range(how.g_steps):
        soft = writer(z, wanted)
        says, far = ensemble(teachers, at, soft)
        loss = how.lambda_oh * F.cross_entropy(says, y) + how.lambda_stat * far
        if how.lambda_adv:
            _, own = read(student, [still], at, soft)
            apart = (own[0].argmax(1) != says.argmax(1)).to(dtype)
            kl = F.kl_div(says.log_softmax(-1), own[0].log_softmax(-1), reduction="none", log_target=True).sum(1)
            loss = loss - how.lambda_adv * (apart * kl).mean()
        if float(loss.detach()) < least:
            best, least = soft.detach(), float(loss.detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return best
