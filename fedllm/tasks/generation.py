"""Generation: a prompt, and the response that a causal language model learns to say after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fedllm.tasks.chat import pieces, spans
from fedllm.tasks.choices import shaped_choices
from fedllm.tasks.row import IGNORE, Encoded, Row, bad_row
from fedllm.tasks.task import How, Losses, Metric, Shape, Task


class Generation(Task):
    """Next tokens of a response; `exact_match` is asked of the generated answer."""

    net, columns, takes, speaks = "causal", ("prompt", "response"), ("template",), True
    metrics: ClassVar = {name: Metric("max") for name in ("exact_match", "last_number", "choice", "choice_likelihood",
                                                          "rouge_l", "judged")}

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        """Prompt and response by the template; `choices`, where there are any, each as the template writes a response.
        """
        return {**how.template(row, where), **shaped_choices(row, where, how.template)}

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """bos + prompt + response + eos (bos and eos where the tokenizer has them), labels on the response and eos
        alone if `completion_only`; one call of the tokenizer for all prompts and one for all responses. Of too long a
        row the response loses its end (eos too) down to half the room, and only then the prompt its start."""
        if any("messages" in row for row in rows):
            out = [answered(row, i, how) if "messages" in row else joined([row], [_pair(row)], how)[0]
                   for i, row in enumerate(rows, start=1)]
        else:
            out = joined(rows, [_pair(row) for row in rows], how)
        for i, (row, encoded) in enumerate(zip(rows, out, strict=True), start=1):
            if not encoded.n_target:
                raise bad_row(row, i, f" has nothing to learn: its response {row['response'][:40]!r} gives no token "
                              "to predict from a token before it", "empty")
        return out

    def row_losses(self, model: Any, batch: Any) -> Losses:
        """Hits are not counted (zeros): a right answer is a generation."""
        return next_words(model, batch)


def next_words(model: Any, batch: Any) -> Losses:
    """Cross-entropy of each labelled token after those before it, summed over the row."""
    h = model.hidden(batch, padded=False)[:, :-1]
    rows, cols = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    ce = model.word_losses(h, rows, cols, batch.labels[:, 1:][rows, cols])
    n = batch.ids.shape[0]
    total = ce.new_zeros(n).index_add(0, rows, ce)
    return total, torch.bincount(rows, minlength=n).to(ce.dtype), ce.new_zeros(n)


def _pair(row: Row) -> tuple[str, str]:
    return row["prompt"], row["response"]


def joined(rows: Sequence[Row], texts: Sequence[tuple[str, str]], how: How) -> list[Encoded]:
    """Prompt and response of each row in one sequence."""
    bos, eos = _ends(how.tokenizer.bos_token_id), _ends(how.tokenizer.eos_token_id)
    prompts, responses = (how.tokens([pair[i] for pair in texts], add_special_tokens=False)["input_ids"]
                          for i in (0, 1))
    out = []
    for prompt, response in zip(prompts, responses, strict=True):
        if bos and prompt[:1] == bos:  # a template that writes the beginning token out
            prompt = prompt[1:]
        out.append(_joined(bos, prompt, response + ([] if response[-1:] == eos else eos), how))
    return out


def _ends(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _joined(bos: list[int], prompt: list[int], response: list[int], how: How) -> Encoded:
    """The response keeps half the room at least; to test, the prompt is whole as far as the model sees."""
    room = how.max_length - len(bos)
    mine = min(len(response), max(room - len(prompt), (room + 1) // 2))
    seen = room - mine if how.whole is None else how.whole - len(bos) - mine
    start = bos + prompt[max(0, len(prompt) - max(0, seen)) :]
    ids = np.array(start + response[:mine], dtype=np.int32)
    labels = ids.astype(np.int64)
    # Nothing predicts the first token, so it is never a target, prompt or not.
    labels[: max(1, len(start) if how.completion_only else 1)] = IGNORE
    cut = "answer" if mine < len(response) else "prompt" if seen < len(prompt) else ""
    return Encoded(ids, labels, int((labels != IGNORE).sum()), cut=cut)


def answered(row: Row, i: int, how: How) -> Encoded:
    """A conversation by the tokenizer's chat template, which writes its own beginning and end."""
    found = spans(how.tokenizer, row, i, how.every_turn)
    parts = pieces(how.tokenizer, [text for text, _ in found], how.tokens)
    learned = [on for _, on in found]
    if sum(learned) == 1:
        prompt = [token for part, on in zip(parts, learned, strict=True) if not on for token in part]
        return _joined([], prompt, parts[learned.index(True)], how)
    ids = np.array([token for part in parts for token in part], np.int32)
    on = np.repeat(learned, [len(part) for part in parts])
    labels = np.where(on | (not how.completion_only), ids.astype(np.int64), IGNORE)
    labels[0] = IGNORE
    keep = slice(None, how.max_length)  # later turns go first: an answer is never learned without what was asked
    count = int((labels[keep] != IGNORE).sum())
    if not count:
        return _joined([], [int(t) for t in ids[: len(ids) - len(parts[-1])]], parts[-1], how)
    return Encoded(ids[keep], labels[keep], count, cut="answer" if len(ids) > how.max_length else "")
