"""One client trained by plain transformers and PEFT: row by row, without padding, by a loop that anyone would write."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from fedllm.core.payload import Tree
from fedllm.data.encode import Encoded
from fedllm.models.model import Model
from fedllm.models.peft_io import inside, save_adapter
from fedllm.models.plain import unpatched
from fedllm.spaces.space import PEFT


class Plain:
    """A network of its own with one client's trainables, started at `theta`; it shares no tensor with `model`."""

    def __init__(self, model: Model, theta: Tree, net: nn.Module, folder: Path) -> None:
        self.net, self.room = net.eval().requires_grad_(False), type(model.space).__module__.rsplit(".", 1)[-1]
        self.prompts = self.room in ("soft_prompt", "prefix")
        self.classifier: Any = None
        self.task, self.path = model.task, inside(model.net)[0]
        self.call: Any = net
        self.tuned: Any = None
        self.leaves: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        rest = {n: t.to(torch.promote_types(t.dtype, torch.float32)).clone() for n, t in theta.items()}
        self.attend: Any = copy.deepcopy(unpatched(model.net).attend) if model.task == "image_text" else None
        if model.task == "classification":
            old = model.net.classifier
            self.classifier = nn.Linear(old.in_features, old.out_features).to(old.weight.dtype).requires_grad_(False)
            self.classifier.load_state_dict(old.state_dict())
            own = {n: rest.pop(n) for n in list(rest) if "classifier." in n}
            for n, t in own.items():
                p = dict(self.classifier.named_parameters())[n.rpartition("classifier.")[2]]
                p.data = t.to(p).clone()
                self.leaves[n] = p.requires_grad_()
        ways = {"mask": self._mask, "adapter": self._adapter}
        if self.room in ("lora", "ia3", "soft_prompt", "prefix"):
            save_adapter(folder, model, theta, model.name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.tuned = PeftModel.from_pretrained(net, str(folder), is_trainable=not self.prompts).eval()
            self.call = self.tuned
            if self.task == "image_text":  # PEFT's face of it hands on words that CLIP does not take
                self.call = self.call.get_base_model()
            if self.prompts:  # PEFT loads prompts frozen
                self.call.prompt_encoder.requires_grad_()
        else:
            ways.get(self.room, self._weights)(rest, model)

    def _weights(self, theta: Tree, model: Model) -> None:
        net: Any = self.net
        if self.room == "head" and self.classifier is None:
            out = net.get_output_embeddings()
            out.weight = nn.Parameter(out.weight.detach().clone())  # a tied head is untied
        own = dict(net.named_parameters(remove_duplicate=False)) | self._attention()
        for n, t in theta.items():
            p = own[n.removeprefix(self.path)]
            p.data = t.to(p).clone()
            self.leaves[n] = p.requires_grad_()

    def _attention(self) -> dict[str, Any]:
        return dict(self.attend.named_parameters("attend")) if self.attend is not None else {}

    def _mask(self, theta: Tree, model: Model) -> None:
        own = dict(self.net.named_parameters(remove_duplicate=False)) | self._attention()
        for name, at in model.space.positions(model.net).items():
            if name.startswith("classifier."):
                raise AssertionError(name)
            p, entry = own[name.removeprefix(self.path)], f"{name}.sparse_delta"
            self.masks[entry] = at
            self.leaves[entry] = p.requires_grad_()
            p.data.view(-1).index_add_(0, at, theta[entry].to(p))

    def _adapter(self, theta: Tree, model: Model) -> None:
        for path in sorted({n.partition(".adapter_")[0] for n in theta}):
            parts = [theta[f"{path}.adapter_{p}"].requires_grad_() for p in (
                "down.weight", "down.bias", "up.weight", "up.bias")]
            self.leaves |= {f"{path}.adapter_{p}": t for p, t in zip((
                "down.weight", "down.bias", "up.weight", "up.bias"), parts, strict=True)}

            def hook(m: Any, args: Any, out: Any, parts: Sequence[Tensor] = parts) -> Any:
                h = out[0] if isinstance(out, tuple) else out
                dw, db, uw, ub = (t.to(h) for t in parts)
                y = h + F.linear(F.relu(F.linear(h, dw, db)), uw, ub)
                return (y, *out[1:]) if isinstance(out, tuple) else y

            self.net.get_submodule(path.removeprefix(self.path)).register_forward_hook(hook)

    def loss(self, rows: Sequence[Encoded]) -> Tensor:
        """The mean over all targets of all rows."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            ids = torch.from_numpy(row.ids).long()[None]
            if self.task == "image_text":
                ask, mask = prompts()
                out = self.call(input_ids=ask, attention_mask=mask,
                                pixel_values=torch.from_numpy(row.parts["pixels"])[None].to(self.net.dtype))
                seen = out.vision_model_output.pooler_output
                f = F.normalize(seen * self.attend(seen), dim=-1)
                z = self.net.logit_scale.exp() * f @ out.text_embeds.T
                total = total + F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)),
                                                torch.tensor([row.labels]))
                count += 1
            elif self.task == "masked_words":
                z = self.logits(ids)[0]
                total = total + F.cross_entropy(z, torch.from_numpy(row.labels), reduction="sum")
                count += row.n_target
            elif self.classifier is None:
                z = self.logits(ids)[0, :-1]
                total = total + F.cross_entropy(z, torch.from_numpy(row.labels)[1:], reduction="sum")
                count += int((row.labels[1:] != -100).sum())
            else:
                out = self.call(input_ids=ids, attention_mask=torch.ones_like(ids))
                h = out["last_hidden_state"][:, -ids.shape[1] :].mean(1)
                total = total + F.cross_entropy(self.classifier(h), torch.tensor([row.labels]))
                count += 1
        return total / count

    def logits(self, ids: Tensor) -> Tensor:
        """[1, T] -> [1, T, V], wide."""
        z = self.call(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=self.room == "prefix")["logits"]
        z = z[:, -ids.shape[1] :]
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def train(self, rows: Sequence[Encoded], steps: int, lr: float) -> tuple[Tree, float]:
        """SGD on all rows; the trainables in our names, and the mean loss."""
        before = {n: self.leaves[n].detach().reshape(-1)[at].clone() for n, at in self.masks.items()}
        learned = [*self.leaves.values(), *(p for p in self.call.parameters() if p.requires_grad and not any(
            p is q for q in self.leaves.values()))]
        optimizer, told = torch.optim.SGD(learned, lr), 0.0
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss(rows)
            loss.backward()
            for n, at in self.masks.items():
                if (grad := self.leaves[n].grad) is not None:
                    kept = torch.zeros_like(grad).view(-1)
                    kept[at] = grad.reshape(-1)[at]
                    grad.copy_(kept.view_as(grad))
            optimizer.step()
            told += float(loss.detach())
        moved = {n: t.detach() for n, t in self.leaves.items()}
        for n, at in self.masks.items():
            moved[n] = moved[n].reshape(-1)[at] - before[n]  # a change, as our tree has it
        if self.tuned is not None:
            state = get_peft_model_state_dict(self.tuned)
            moved |= {n.replace(PEFT, PEFT + self.path, 1): t.detach() for n, t in state.items()}
        return moved, told / steps

    def says(self, ids: Tensor, words: int) -> list[int]:
        """Greedy words after a text, read from its start each time."""
        said: list[int] = []
        with torch.no_grad():
            for _ in range(words):
                z = self.logits(torch.cat([ids, torch.tensor(said, dtype=torch.long)])[None])
                said.append(int(z[0, -1].argmax()))
        return said


def prompts() -> tuple[Tensor, Tensor]:
    """Ids and mask [3, 6] of what three classes are called: the last token is the end."""
    ids = torch.randint(5, 60, (3, 6), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 2
    return ids, torch.ones_like(ids)


def moves(theta: Mapping[str, Tensor], masks: bool, end: Mapping[str, Tensor]) -> Tree:
    """The change of each trainable; of a mask's entries `end` holds the change already."""
    return {n: (end[n] if masks and n.endswith("sparse_delta") else end[n] - t.to(end[n])).double()
            for n, t in theta.items()}
