"""Whether a network is what its task takes it for: its own forward in transformers against what ours is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fedllm.core.errors import ModelError
from fedllm.models.batch import Batch, collate
from fedllm.models.exam import Exam, what
from fedllm.models.exam_rows import near
from fedllm.models.model import Model
from fedllm.tasks.registry import task_of


def check(exam: Exam) -> None:
    """ModelError for a network that is not what its task takes it for, however it is run."""
    if looked := KINDS.get(exam.plain.rules.net):
        with torch.no_grad():
            looked(exam)


def _batch(exam: Exam, keep: int | None = None) -> Batch:
    row, plain = exam.lanes[0][0], exam.plain
    if keep is not None:
        row = replace(row, ids=row.ids[:keep], labels=row.labels[:keep])
    return collate([[row]], plain.pad, plain.device)


def _continues(exam: Exam) -> None:
    """No word sees those after it; logits are made of the last hidden states; the loss is the next word's."""
    plain, net = exam.plain, exam.plain.net
    if plain.head is None:
        return
    long, short, name = _batch(exam), _batch(exam, 5), type(net).__name__
    with plain.using([{}]):
        h, part = plain.hidden(long), plain.hidden(short)
        if not near(part, h[:, :5], exam.near(0)):
            raise ModelError(f"{what(plain)}: in {name} words see those that come after them, so it cannot learn to "
                             "continue texts; an encoder works with data.task = 'classification'")
        whole = net(input_ids=long.ids, labels=long.labels, use_cache=False)
        if not near(plain.logits_of(h), whole.logits, exam.near(0)):
            raise ModelError(f"{what(plain)}: the logits of {name} are not made of its last hidden states alone")
        _same_loss(exam, long, whole, "the next word's", "; where its config has output_router_logits, set that to "
                   "false")


def _fills_in(exam: Exam) -> None:
    """The loss is that of the hidden words, each predicted at its own place."""
    plain, batch = exam.plain, _batch(exam)
    with plain.using([{}]):
        whole = plain.net(input_ids=batch.ids, attention_mask=batch.mask.long(), labels=batch.labels)
        _same_loss(exam, batch, whole, "the hidden words'", "")


def _same_loss(exam: Exam, batch: Batch, whole: Any, ours: str, hint: str) -> None:
    plain = exam.plain
    task = task_of("generation") if plain.rules.net == "causal" else plain.rules
    total, count, _ = task.row_losses(plain, batch)
    if whole.loss is not None and not near(total / count, whole.loss[None].to(total), exam.near(0)):
        raise ModelError(f"{what(plain)}: {type(plain.net).__name__} learns by another loss than {ours} "
                         f"({float(whole.loss):.4g}, not {float(total / count):.4g}){hint}")


def _matches(exam: Exam) -> None:
    """Untrained, it scores pictures against texts as transformers does; what is added to all changes nothing."""
    plain: Model = exam.plain
    net, batch = plain.net, collate([plain.read(exam.lanes[0])], plain.pad, plain.device)
    with plain.using([{}]):
        plain.stack.rows = len(batch.ids)
        ours = net.logits(plain.stack, batch)
        theirs = net.clip(input_ids=net.prompts, attention_mask=net.prompt_mask,
                          pixel_values=batch.parts["pixels"].to(net.dtype)).logits_per_image
    if not near(ours - ours[:, :1], (theirs - theirs[:, :1]).to(ours), 10 * exam.near(0)):
        raise ModelError(f"{what(plain)}: {type(net.clip).__name__} does not score pictures by the angle between its "
                         "two features alone, so it cannot be taken as a CLIP or SigLIP; those work")


KINDS: Mapping[str, Callable[[Exam], None]] = {"causal": _continues, "masked": _fills_in, "dual": _matches}
