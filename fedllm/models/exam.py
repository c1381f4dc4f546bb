"""The questions to a model, and what the plain network of transformers answers: one row at a time, without padding."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from fedllm.core.errors import FedLLMError, ModelError
from fedllm.core.payload import Tree
from fedllm.core.rng import torch_stream
from fedllm.data.encode import Encoded
from fedllm.models.batch import collate
from fedllm.models.decode import Continuation
from fedllm.models.dual import DualEncoder
from fedllm.models.exam_rows import LENGTHS, near, rows_of, told
from fedllm.models.model import Model
from fedllm.models.plain import unpatched, widened
from fedllm.models.quantized import kind_of
from fedllm.models.reread import reread_at_once
from fedllm.models.unpacking import unpacking
from fedllm.models.ways import WORDS, Ways
from fedllm.spaces.params import Params
from fedllm.spaces.space import PEFT, Stack, stack_lanes

NEAR = {torch.float64: (1e-6, 1e-5), torch.float32: (2e-4, 5e-3)}
"""By how much a loss and a gradient may differ, relatively."""
LEAST, TIMES = (0.01, 0.05), 6
"""In half precision both may differ by so many times what rounding does to the plain network itself, and by so much."""
ROUGH = (0.05, 0.5)
"""The most in half precision."""
LANE_BYTES = 1 << 29
"""Trainables larger than this are never stacked, neither here nor afterwards."""


def what(model: Model) -> str:
    """The model and its space, as sentences begin."""
    return f"model {model.name or type(model.net).__name__!r} with space '{_name(model.space)}'"


def _name(space: Any) -> str:
    return type(space).__module__.rsplit(".", 1)[-1]


@dataclass
class Exam:
    """The questions to one model, and what the plain network answers: one row at a time, without padding."""

    plain: Model
    trees: list[Tree]
    lanes: list[list[Encoded]]
    losses: Tensor
    grads: list[dict[str, Tensor]]
    slack: tuple[float, float] = ROUGH
    """By how much a loss and a gradient may differ, relatively."""

    @classmethod
    def of(cls, model: Model) -> Exam:
        """Ask the plain network; a ModelError where transformers itself cannot run it."""
        plain = copy.copy(model)
        plain.stack, plain.said = Stack(causal=model.stack.causal), []
        if kind_of(model.net):
            plain.net = unpacking(unpatched(model.net))
        try:
            plain.go(Ways(*[False] * len(WORDS)))
            if isinstance(plain.net, DualEncoder):
                plain.net.cached = False
                vars(plain).pop("seen_once", None)
            rng = torch_stream(model.seed, "exam")
            trees = [_moved(plain.space.start(plain.net, rng), rng) for _ in LENGTHS]
            lanes = rows_of(plain, rng)
            answers = [_answer(plain, [tree], [plain.read([row])]) for tree, rows in zip(trees, lanes, strict=True)
                       for row in rows]
        except FedLLMError:
            raise
        except Exception as error:
            raise ModelError(f"{what(model)}: transformers cannot run it in {model.net.dtype}: {_where(plain, error)}"
                             f"{type(error).__name__}: {_line(error)}") from error
        grads, at = [], iter(answers)
        for rows in lanes:
            each = [next(at)[1][0] for _ in rows]
            grads.append({n: sum((g[n] for g in each[1:]), each[0][n]) for n in each[0]})
        said = torch.cat([losses for losses, _ in answers])
        if not all(bool(t.isfinite().all()) for t in (said, *(t for g in grads for t in g.values()))):
            raise ModelError(f"{what(model)}: in plain transformers too, losses or gradients of texts of 2 to 9 tokens "
                             f"are no numbers in {model.net.dtype}")
        exam = cls(plain, trees, lanes, said, grads)
        exam.slack = NEAR.get(plain.net.dtype) or exam.rounding()
        return exam

    def rounding(self) -> tuple[float, float]:
        """How far rounding alone may carry losses and gradients: by what the very same network says in fp32.

        Where there is no memory for it in fp32 it is the most that is allowed at all.
        """
        if 16 * sum(p.numel() for p in self.plain.net.parameters()) > psutil.virtual_memory().available:
            return ROUGH
        wide = copy.copy(self.plain)
        wide.stack, wide.said, wide.net = Stack(causal=self.plain.stack.causal), [], widened(self.plain.net)
        wide.go(Ways(*[False] * len(WORDS)))
        vars(wide).pop("seen_once", None)
        answers = [[_answer(wide, [tree], [wide.read([row])]) for row in rows]
                   for tree, rows in zip(self.trees, self.lanes, strict=True)]
        wide_losses = [torch.cat([loss for loss, _ in lane]) for lane in answers]
        far = max(float((w - s).abs().max()) / max(float(w.abs().max()), 1e-3) for w, s in zip(
            wide_losses, self.losses.split([len(w) for w in wide_losses]), strict=True))
        apart = [_apart(ours, {n: sum(g[0][n] for _, g in lane) for n in ours})
                 for ours, lane in zip(self.grads, answers, strict=True)]
        off = max((value for one in apart for value in one.values()), default=0.0)
        return tuple(min(most, max(least, TIMES * by)) for most, least, by in zip(  # type: ignore[return-value]
            ROUGH, LEAST, (far, off), strict=True))

    def differs(self, model: Model) -> list[str]:
        """Where `model` answers otherwise: trainables, the worst first, or what went wrong; empty where nowhere."""
        worth, model.worth = model.worth, 0
        try:
            if model.stackable and sum(t.numel() * t.element_size() for t in self.trees[0].values()) > LANE_BYTES:
                model.stackable, model.ways = False, replace(model.ways, together=False)
            asked = [([0, 1], self.trees)] if model.stackable else []
            for lanes, trees in [*asked, *(([k], [self.trees[k]]) for k in range(2))]:
                losses, grads = _answer(model, trees, [model.read(self.lanes[k]) for k in lanes])
                ends = np.cumsum([0, *map(len, self.lanes)])
                want = torch.cat([self.losses[ends[k] : ends[k + 1]] for k in lanes])
                if wrong := self._worst(grads, [self.grads[k] for k in lanes]):
                    return wrong
                if not near(losses, want, self.near(0)):
                    return ["its loss"]
        except Exception as error:
            return [f"{_where(model, error)}{type(error).__name__}: {_line(error)}"]
        finally:
            model.worth = worth
        return []

    def near(self, which: int) -> float:
        return self.slack[which]

    def _worst(self, got: Sequence[Mapping[str, Tensor]], want: Sequence[Mapping[str, Tensor]]) -> list[str]:
        wrong: dict[str, float] = {}
        dead = [n for ours, plain in zip(got, want, strict=True) for n, g in plain.items() if g.any()
                and not ours[n].any()]  # a weight that its module does not ask for its own forward
        if dead:
            return [_module(n) for n in dict.fromkeys(dead)]
        for ours, plain in zip(got, want, strict=True):
            for n, off in _apart(ours, plain).items():
                if not off <= self.near(1):
                    wrong[n] = max(off, wrong.get(n, 0.0)) if off == off else float("inf")
        return [_module(n) for n in sorted(wrong, key=lambda n: -wrong[n])]

    def refusal(self, model: Model, wrong: Sequence[str]) -> ModelError:
        """In one sentence."""
        if "Error: " in wrong[0]:
            return ModelError(f"{what(model)} goes wrong in {wrong[0]}; use another space")
        leaves = sorted({w.rsplit(".", 1)[-1] for w in wrong if w in dict(model.net.named_modules())})
        hint = "" if not leaves or isinstance(model.space, Params) else (
            f"; leave {', '.join(leaves)} out of space.targets, or use another space")
        return ModelError(f"{what(model)}: {wrong[0]} does not do what it does in transformers{hint}")

    def saves(self, model: Model) -> None:
        """ModelError where plain PEFT would read a saved adapter as something else."""
        if model.space.to_peft(model.net, model.task, self.trees[0]) is None:
            return
        try:
            reread_at_once(model, self.trees[0])
        except ModelError as error:
            raise ModelError(f"{what(model)}: {error}") from error

    def speaks_otherwise(self, model: Model, words: int = 3) -> str:
        """Why the logits that follow the rows' texts are not the plain network's, or nothing."""
        plain, said = self.plain, ""
        lanes = list(zip(self.trees, self.lanes, strict=True)) if model.stackable else [(self.trees[0], self.lanes[0])]
        rows = [[r.ids for r in part] + [part[0].ids] * (len(LENGTHS[0]) - len(part)) for _, part in lanes]
        if not model.ways.padded:
            rows = [[ids[: len(self.lanes[1][0].ids)] for ids in part[:1]] for part in rows]
        try:
            with torch.no_grad(), model.using([tree for tree, _ in lanes]):
                batch = collate([[Encoded(i, i, 0) for i in part] for part in rows], model.pad, model.device, left=True)
                text = Continuation(model, batch)
                for _ in range(words):
                    got = text.logits()
                    want = torch.cat([_after(plain, tree, list(text.ids[i][text.text[i]] for i in range(
                        k * len(rows[0]), (k + 1) * len(rows[0])))) for k, (tree, _) in enumerate(lanes)])
                    if not near(got, want, 10 * self.near(0)):
                        said = "logits differ from transformers'"
                    text.add(want.argmax(-1))
        except Exception as error:
            return f"{_where(model, error)}{type(error).__name__}: {_line(error)}"
        return said


def _apart(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """How far each gradient is from what it should be, relatively; small ones by the largest."""
    top = max(float(g.norm()) for g in want.values())
    return {n: float((got[n] - g).norm()) / max(float(g.norm()), 1e-2 * top, 1e-30) for n, g in want.items()}


def _after(plain: Model, tree: Tree, texts: Sequence[Tensor]) -> Tensor:
    """The plain network's logits [N, V] after each text, read from its start."""
    out = []
    with plain.using([tree]):
        for ids in texts:
            row = Encoded(ids.cpu().numpy(), ids.cpu().numpy(), 0)
            h = plain.hidden(collate([[row]], plain.pad, plain.device))
            out.append(plain.logits_of(h[:, -1:])[:, 0])
    return torch.cat(out).to(torch.promote_types(out[0].dtype, torch.float32))


def _answer(model: Model, trees: Sequence[Tree], lanes: Sequence[Sequence[Encoded]]
            ) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Losses of all rows, and each lane's gradient of their sum."""
    stacked = {n: t.to(model.device).requires_grad_() for n, t in stack_lanes(trees).items()}
    batch = collate(lanes, model.pad, model.device)
    with model.using(trees, None, stacked):
        total = told(model, batch)
        real = [k * batch.rows + j for k, rows in enumerate(lanes) for j in range(len(rows))]
        losses = total[real]
        losses.sum().backward()
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in stacked.items()}
    return losses.detach(), [{n: g[k] for n, g in grads.items()} for k in range(len(trees))]


def _moved(tree: Tree, rng: torch.Generator) -> Tree:
    """Trainables away from their start, where a gradient may be zero."""
    out = {}
    for n, t in tree.items():
        size = max(0.02, 0.1 * float(t.std())) if t.numel() > 1 else 0.02
        out[n] = (t + size * torch.randn(t.shape, generator=rng).to(t)).cpu()
    return out


def _module(name: str) -> str:
    """The module that a trainable belongs to."""
    path = name.removeprefix(PEFT)
    for end in (".lora_A.weight", ".lora_B.weight", ".sparse_delta", ".ia3_l"):
        if path.endswith(end):
            return path.removesuffix(end).removesuffix(".weight")
    return path.rpartition(".")[0] or path


def _where(model: Model, error: BaseException) -> str:
    """The innermost module of the network that was at work when this went wrong."""
    paths = {id(m): n for n, m in model.net.named_modules() if n}
    trace, found = error.__traceback__, ""
    while trace:
        own = trace.tb_frame.f_locals.get("self")
        if isinstance(own, nn.Module) and id(own) in paths:
            found = f"{paths[id(own)]}: "
        trace = trace.tb_next
    return found


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
