"""Generation: a prompt, and the response that a causal language model learns to say after it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fedllm.core.errors import CompositionError, DataError
from fedllm.tasks.row import IGNORE, Encoded, Row
from fedllm.tasks.task import How, Losses, Metric, Shape, Task


class Generation(Task):
    """Next tokens of a response; `exact_match` is asked of the generated answer."""

    net, columns, takes, speaks = "causal", ("prompt", "response"), ("template",), True
    metrics: ClassVar = {"exact_match": Metric("max")}

    def shape(self, row: Row, where: str, how: Shape) -> dict[str, Any]:
        return how.template(row, where)

    def encode(self, rows: Sequence[Row], how: How) -> list[Encoded]:
        """bos + prompt + response + eos (bos and eos where the tokenizer has them), labels on the response and eos
        alone if `completion_only`; one call of the tokenizer for all prompts and one for all responses. Too long a row
        loses the start of its prompt; a response too long by itself loses its end, eos too."""
        out = joined(rows, [_chat_texts(row, how.tokenizer) if "messages" in row else (row["prompt"], row["response"])
                            for row in rows], how)
        for i, (row, encoded) in enumerate(zip(rows, out, strict=True), start=1):
            if not encoded.n_target:
                raise DataError(f"row {i} has nothing to learn: its response {row['response'][:40]!r} gives no token "
                                "to predict from a token before it")
        return out

    def row_losses(self, model: Any, batch: Any) -> Losses:
        """Hits are not counted (zeros): a right answer is a generation."""
        return next_words(model, batch)


def next_words(model: Any, batch: Any) -> Losses:
    """Cross-entropy of each labelled token after those before it, summed over the row."""
    h = model.hidden(batch)[:, :-1]
    rows, cols = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    ce = model.word_losses(h, rows, cols, batch.labels[:, 1:][rows, cols])
    n = batch.ids.shape[0]
    total = ce.new_zeros(n).index_add(0, rows, ce)
    return total, torch.bincount(rows, minlength=n).to(ce.dtype), ce.new_zeros(n)


def joined(rows: Sequence[Row], texts: Sequence[tuple[str, str]], how: How) -> list[Encoded]:
    """Prompt and response of each row in one sequence."""
    bos, eos = _ends(how.tokenizer.bos_token_id), _ends(how.tokenizer.eos_token_id)
    prompts, responses = (how.tokens([pair[i] for pair in texts], add_special_tokens=False)["input_ids"]
                          for i in (0, 1))
    out = []
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        ends = ([], []) if "messages" in row else (bos, eos)  # a chat template writes its own beginning and end
        out.append(_joined(ends[0], prompt, response + ends[1], how.max_length, how.completion_only))
    return out


def _ends(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _joined(bos: list[int], prompt: list[int], response: list[int], max_length: int, completion_only: bool) -> Encoded:
    response = response[: max_length - len(bos)]
    room = max_length - len(bos) - len(response)
    start = bos + prompt[max(0, len(prompt) - room) :]
    ids = np.array(start + response, dtype=np.int32)
    labels = ids.astype(np.int64)
    # Nothing predicts the first token, so it is never a target, prompt or not.
    labels[: max(1, len(start) if completion_only else 1)] = IGNORE
    return Encoded(ids, labels, int((labels != IGNORE).sum()))


def _chat_texts(row: Row, tokenizer: Any) -> tuple[str, str]:
    """Prompt and response by the tokenizer's chat template: all up to the assistant's final turn, and that turn."""
    if not tokenizer.chat_template:
        raise CompositionError(f"data.template 'chat' and the tokenizer {tokenizer.name_or_path!r}, which has no chat "
                               "template, do not fit together; 'question_answer' or a format string works")
    turns = list(row["messages"])
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    # Some templates rewrite earlier turns once the answer stands (they drop its reasoning): the turn is then plain.
    return prompt, turns[-1]["content"] + (tokenizer.eos_token or "")


def same_answer(said: str, wanted: str) -> bool:
    """Equal up to white space."""
    return re.sub(r"\s+", " ", said).strip() == re.sub(r"\s+", " ", wanted).strip()
