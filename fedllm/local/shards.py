"""One of several processes that train one client: its shard of the weights, and its share of each batch's rows.

The network is cut by FSDP2 (`fully_shard`, Zhao et al., arXiv 2304.11277): each block's weights are gathered when it
runs and let go after it. In space `full` the weights are the trainables, so that gradients and the optimizer's state
are cut too; trainables of other spaces are small, lie whole in each process, and their gradients are added.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.local import moments
from fedllm.local.blob import Blob
from fedllm.local.fit import freezes, slice_of
from fedllm.local.objective import Objective, Side, lane_sums, taken
from fedllm.local.packing import packed
from fedllm.local.spec import LocalSpec
from fedllm.local.terms import Term
from fedllm.models.checkpointing import checkpointed, layers_of
from fedllm.models.kernels import keep_no_freed_memory, products
from fedllm.models.model import Model
from fedllm.spaces.full import Full

LOCAL = {"GLOO_SOCKET_IFNAME": "lo"}
"""What goes between the processes of one client stays on this machine."""


@dataclass(frozen=True)
class Place:
    """Which of the processes this is, and where they meet."""

    rank: int
    size: int
    folder: str
    threads: int = 1
    patience: float = 600.0
    """Seconds after which whoever waits for another gives up."""


@dataclass(frozen=True)
class Work:
    """A fit as the processes are told it; tensors lie in shared memory, where the answer is put too."""

    blob: Blob
    rows: Sequence[Encoded]
    plan: Sequence[np.ndarray]
    spec: LocalSpec
    freeze: tuple[str, ...]
    terms: Sequence[Term]
    objective: Objective
    side: Side
    goes_on: bool
    """Whether the blob holds an optimizer's state to go on from."""
    keeps: bool
    """Whether that state is wanted at the end."""


def attend(place: Place, make: Callable[[int], Model], line: Any, halted: Any) -> None:
    """The process itself: it trains whatever comes down the line, until the line is closed."""
    for name, value in LOCAL.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(place.threads)
    try:
        model = make(place.rank)
        cards = model.device.type == "cuda"
        dist.init_process_group("nccl" if cards else "gloo", init_method=f"file://{place.folder}/meet",
                                rank=place.rank, world_size=place.size, timeout=timedelta(seconds=place.patience))
        shards = Shards(model, place)
        line.send(("ready", None))
        while True:
            work = line.recv()
            line.send(("done", shards.fit(work, lambda: halted.is_set(), lambda: line.send(("step", None)))))
            del work
    except EOFError:  # whoever asks has gone
        pass
    except Exception as error:
        with contextlib.suppress(OSError):  # or because whoever asks has gone
            line.send(("failed", f"{type(error).__name__}: {error}"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Step(nn.Module):
    """What FSDP takes for the whole network: whatever is run inside finds its weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class Shards:
    """A model of which this process holds its shard."""

    def __init__(self, model: Model, place: Place) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self.model, self.rank, self.size = model, place.rank, place.size
        self.whole = isinstance(model.space, Full)
        if self.whole:  # the plain network on its own weights, whose gradients FSDP sees
            model.go(replace(model.ways, sites=False, together=False, quick=False, fused=False))
            model.bare = None
            model.net.requires_grad_(True)
        mesh = init_device_mesh(model.device.type, (place.size,))
        self.step = Step(model.net)
        for block in layers_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(self.step, mesh=mesh)
        for module in self.step.modules():
            if isinstance(module, FSDPModule):  # losses are sums, and so are gradients
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.weights = dict(model.net.named_parameters()) if self.whole else {}
        keep_no_freed_memory()

    def mine(self, full: Tensor) -> Tensor:
        """This process's shard of a tensor of the trainables [1, n / size, ...]: rows along the first dimension."""
        parts = full.chunk(self.size) if self.whole else ()
        mine = full if not self.whole else parts[self.rank] if self.rank < len(parts) else full[:0]
        return mine.unsqueeze(0)

    def fit(self, work: Work, halted: Callable[[], bool], tell: Callable[[], None]) -> tuple[float, float] | None:
        """Train as `local/fit.py` does; (summed loss, summed rate), and what was trained in the blob. None: halted."""
        spec, device = work.spec, self.model.device
        theta = work.blob.under("theta")
        still = set(freezes(theta, work.freeze))
        params = self._begin(theta, still)
        frozen = {n: theta[n].to(device)[None] for n in still} if not self.whole else {}
        base = {n: t.to(device) for n, t in work.blob.under("base").items()}
        terms = [(t, {n: self.mine(v).to(device) for n, v in work.blob.under(f"term{i}").items()})
                 for i, t in enumerate(work.terms)]
        optimizer = spec.optimizer_over(list(params.values()), list(params))
        if work.goes_on:
            kept = {n: t if n == "step" else self.mine(t)[0] for n, t in work.blob.under("moments").items()}
            moments.go_on(optimizer, params, [{n: t for n, t in kept.items()
                                               if n == "step" or n.partition("/")[2] in params}])
        losses = lr_sum = 0.0
        for step, at in enumerate(work.plan):
            lr = spec.rate(step, len(work.plan))
            lr_sum += lr
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("times", 1.0)
            with products(device, self.model.fast_kernels):
                loss = self._descend(work, at, theta, base, params, frozen, halted())
                if loss is None:
                    return None
                self._penalize(params, terms)
                self._clip(params, spec.clip_norm)
                optimizer.step()
            losses += loss
            tell()
        self._hand_over(work, params, optimizer)
        return losses, lr_sum

    def _begin(self, theta: Mapping[str, Tensor], still: set[str]) -> Tree:
        """The trainables [1, ...] in their place; in space `full` they are the network's own shards."""
        if not self.whole:
            return {n: t.to(self.model.device, copy=True)[None].requires_grad_() for n, t in theta.items()
                    if n not in still}
        out: Tree = {}
        with torch.no_grad():
            for name, weight in self.weights.items():
                local: Tensor = weight.to_local()  # type: ignore[operator]
                local.copy_(self.mine(theta[name])[0])
                if name not in still and local.numel():
                    out[name] = local.detach()[None]
        return out

    def _descend(self, work: Work, at: np.ndarray, theta: Tree, base: Tree, params: Tree, frozen: Tree,
                 halt: bool) -> float | None:
        """Leave the gradient of the mean over all processes' targets in the parameters; the loss. None: halted."""
        spec, model = work.spec, self.model
        for p in (*params.values(), *self.weights.values()):
            p.grad = None
        figures = torch.tensor([0.0, 0.0, float(halt)], dtype=torch.float64, device=model.device)
        lanes = ([{}], None, {}) if self.whole else ([theta], base, params | frozen)
        with model.using(*lanes), checkpointed(model, spec.checkpointing):
            parts = max(1, -(-len(at) // spec.batch_size))
            for i in range(parts):
                part = slice_of(at, i, parts, spec)
                own = part[self.rank :: self.size]
                total, count = self._sums(work, own if len(own) else part[:1])
                weight = float(len(own) > 0)  # whoever has no row of it runs one for the others, which counts nothing
                figures[:2] += torch.stack([total.detach().sum(), count.sum()]).double() * weight
                if parts == 1:  # the mean itself, as in one process: parts in fp32 see gradients of the same size
                    dist.all_reduce(figures)
                    weight /= max(1.0, float(figures[1]))
                (total.sum() * weight).backward()
        if parts > 1:
            dist.all_reduce(figures)
        loss, targets, halt_all = figures.tolist()
        if halt_all:
            return None
        self._gather(params)
        for p in params.values():
            if parts > 1 and p.grad is not None:
                p.grad.div_(max(1.0, targets))
        return loss / max(1.0, targets)

    def _sums(self, work: Work, at: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = [work.rows[i] for i in at]
        lane = packed(rows) if work.spec.packing else rows
        return self.step(lambda: lane_sums(work.objective, self.model, [lane], [taken(work.side, at)]))

    def _gather(self, params: Tree) -> None:
        """Sum the gradients: FSDP did so for its shards; others cross in one piece, with which there are any."""
        if self.whole:
            for name, p in params.items():
                grad = self.weights[name].grad
                p.grad = None if grad is None else grad.to_local()[None]  # type: ignore[operator]
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params.values()]
                         + [torch.tensor([float(p.grad is not None) for p in params.values()]).to(
                             next(iter(params.values())))])
        dist.all_reduce(flat)
        *grads, some = flat.split([*(p.numel() for p in params.values()), len(params)])
        for p, grad, there in zip(params.values(), grads, some.tolist(), strict=True):
            p.grad = grad.view_as(p) if there else None

    def _penalize(self, params: Tree, terms: Sequence[tuple[Term, Tree]]) -> None:
        """Add the gradients of penalties: each process has those of the entries that it holds."""
        if not terms:
            return
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        total = torch.stack([term.loss(leaves, tensors).sum() for term, tensors in terms]).sum()
        for p, grad in zip(params.values(), torch.autograd.grad(total, list(leaves.values()), allow_unused=True),
                           strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad + grad

    def _clip(self, params: Tree, clip_norm: float | None) -> None:
        if clip_norm is None:
            return
        grads = [p.grad for p in params.values() if p.grad is not None]
        squares = sum((g.pow(2).sum() for g in grads), torch.zeros((), device=self.model.device, dtype=torch.float64))
        if self.whole:
            dist.all_reduce(squares)
        shrink = float((clip_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0))
        for g in grads:
            g.mul_(shrink)

    def _hand_over(self, work: Work, params: Tree, optimizer: torch.optim.Optimizer) -> None:
        """Put this process's part of what was trained into the blob; of what lies everywhere the first puts all."""
        if not self.whole and self.rank:
            return
        for name, full in work.blob.under("theta").items():
            if name in params:
                self.mine(full).copy_(params[name].detach())
        if not work.keeps:
            return
        for key, full in work.blob.under("moments").items():
            kind, _, name = key.partition("/")
            if name in params and (state := optimizer.state.get(params[name], {}).get(kind)) is not None:
                self.mine(full).copy_(state)
