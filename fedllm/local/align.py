"""Server training: make a thinned model say what the whole one says, on public rows (offsite tuning, FedBiOT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.local.flops import FORWARD, cost_of
from fedllm.local.spec import LocalSpec
from fedllm.models.batch import Batch, collate
from fedllm.models.heads import body_of
from fedllm.models.kernels import fast, products
from fedllm.models.model import Model


@dataclass(frozen=True)
class View:
    """A model with its trainables, and after how many blocks its middle ends."""

    model: Model
    theta: Mapping[str, Tensor]
    middle: int

    def look(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states where the middle ends [tokens, d], and logits [tokens, V], of all that is no padding."""
        net = self.model.net
        self.model.stack.rows = len(batch.ids)
        with self.model.using([self.theta]), fast(batch.ids.device, batch.ids.shape[1], self.model.fast_kernels):
            out = body_of(net)(input_ids=batch.ids, use_cache=False, output_hidden_states=True)
            z = self.model.logits_of(out.last_hidden_state)
        return out.hidden_states[self.middle][batch.mask], z[batch.mask].float()


def align_work(teacher: View, student: Model, trained: Tree, rows: Sequence[Encoded], plan: Sequence[np.ndarray]
               ) -> dict[str, float]:
    """What `align` will take, for `client.book`: a forward of the teacher beside each step of the student."""
    sizes = [(n := len(rows[i].ids), n) for at in plan for i in at]  # every token is predicted
    both = cost_of(teacher.model, {}).of(sizes, train=False) + cost_of(student, trained).of(sizes, train=True)
    return {"tokens": both.tokens, "flops": both.flops, "steps": len(plan) * (1 + FORWARD)}


def align(teacher: View, student: View, trained: Tree, rows: Sequence[Encoded], plan: Sequence[np.ndarray],
          spec: LocalSpec, gamma: float) -> tuple[Tree, float]:
    """Train `trained`, a part of the student's trainables, on the batches of `plan`; returns it with the mean loss.

    loss = mean ||(h_T - h_S) / rms(h_T)||^2 + gamma KL(teacher || student), over the tokens of right-padded rows;
    the rms is one number for the batch, as in FedBiOT's code.
    """
    params = {n: t.to(student.model.device).detach().clone().requires_grad_() for n, t in trained.items()}
    optimizer = spec.optimizer_over(list(params.values()))
    told = 0.0
    for at in plan:
        batch = collate([[rows[i] for i in at]], teacher.model.pad, teacher.model.device)
        with torch.no_grad():
            h_t, z_t = teacher.look(batch)
        h_s, z_s = View(student.model, {**student.theta, **params}, student.middle).look(batch)
        near = ((h_t - h_s) / h_t.pow(2).mean().sqrt()).pow(2).mean()
        loss = near + gamma * F.kl_div(z_s.log_softmax(-1), z_t.log_softmax(-1), reduction="batchmean", log_target=True)
        optimizer.zero_grad(set_to_none=True)
        with products(loss.device, student.model.fast_kernels):
            loss.backward()
        optimizer.step()
        told += float(loss.detach())
    return {n: p.detach().cpu() for n, p in params.items()}, told / max(1, len(plan))
