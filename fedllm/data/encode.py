"""Turns rows into token arrays, once per client, and deals them into batches whose lengths agree across clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.data.federation import Row, Task

IGNORE = -100
BUCKET = 64
"""Batches that are sorted by length together: enough to pad little, few enough that batches differ between epochs."""
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Encoded:
    """One row as tokens: `ids` int32 [T]; `labels` int64 [T] for generation (-100: not learned), an int for a class."""

    ids: np.ndarray
    labels: np.ndarray | int
    n_target: int
    """Tokens that the loss scores (generation), or 1 (classification): what to weight a mean loss by."""

    @property
    def prompt(self) -> np.ndarray:
        """What `generate` continues: the tokens before the first that is learned, int32."""
        return self.ids if isinstance(self.labels, int) else self.ids[: int(np.argmax(self.labels != IGNORE))]


def encode_row(row: Row, tokenizer: Any, task: Task, max_length: int, completion_only: bool = True) -> Encoded:
    """One row as tokens; see `encode_rows`, which is many times as fast for many."""
    return encode_rows([row], tokenizer, task, max_length, completion_only)[0]


def encode_rows(rows: Sequence[Row], tokenizer: Any, task: Task, max_length: int, completion_only: bool = True
                ) -> list[Encoded]:
    """All rows as tokens, with one call of the tokenizer for the prompts and one for the responses.

    Generation: bos + prompt + response + eos (bos and eos where the tokenizer has them), labels on the response and eos
    alone if `completion_only`. Too long a row loses the start of its prompt; a response too long by itself loses its
    end, eos too. Classification: the tokenizer's own special tokens and truncation. A DataError names a row (from 1)
    in which nothing is left to learn.
    """
    if max_length < 2:
        raise RecipeError(f"max_length = {max_length}: allowed is a whole number from 2 up")
    if not rows:
        return []
    if task == "classification":
        return _classified(rows, tokenizer, max_length)
    bos, eos = _ends(tokenizer.bos_token_id), _ends(tokenizer.eos_token_id)
    texts = [_chat_texts(row, tokenizer) if "messages" in row else (row["prompt"], row["response"]) for row in rows]
    prompts = _tokens(tokenizer, [prompt for prompt, _ in texts])
    responses = _tokens(tokenizer, [response for _, response in texts])
    out = []
    for i, (row, prompt, response) in enumerate(zip(rows, prompts, responses, strict=True), start=1):
        # A chat template writes its own beginning and end.
        ends = ([], []) if "messages" in row else (bos, eos)
        encoded = _joined(ends[0], prompt, response + ends[1], max_length, completion_only)
        if not encoded.n_target:
            raise DataError(f"row {i} has nothing to learn: its response {row['response'][:40]!r} gives no token to "
                            "predict from a token before it")
        out.append(encoded)
    return out


def _ends(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, **options)["input_ids"]


def _joined(bos: list[int], prompt: list[int], response: list[int], max_length: int, completion_only: bool) -> Encoded:
    response = response[: max_length - len(bos)]
    room = max_length - len(bos) - len(response)
    start = bos + prompt[max(0, len(prompt) - room) :]
    ids = np.array(start + response, dtype=np.int32)
    labels = ids.astype(np.int64)
    # Nothing predicts the first token, so it is never a target, prompt or not.
    labels[: max(1, len(start) if completion_only else 1)] = IGNORE
    return Encoded(ids, labels, int((labels != IGNORE).sum()))


def _classified(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Encoded]:
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length, **options)["input_ids"]
    for i, one in enumerate(ids, start=1):
        if not one:
            raise DataError(f"row {i}: the text {rows[i - 1]['text'][:40]!r} gives no token")
    return [Encoded(np.array(one, dtype=np.int32), int(row["label"]), 1) for row, one in zip(rows, ids, strict=True)]


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


def batches(lengths: Sequence[int] | np.ndarray, batch_size: int, rng_client: np.random.Generator,
            rng_shared: np.random.Generator, *, steps: int | None = None, epochs: int | None = None
            ) -> list[np.ndarray]:
    """The row indices of each step's batch: short rows with short, and all clients of a round short at the same time.

    `rng_client` shuffles each epoch. `rng_shared` must start in the same state for every client of the round: it draws
    the length rank wanted at each step, so that clients' batches pad little side by side. Give `steps` (epochs follow
    each other as needed, each visiting every row once) or `epochs`. Pure: equal lengths and generators, equal batches.
    """
    n = len(lengths)
    if n == 0:
        raise DataError("a client with no rows cannot be dealt into batches")
    if batch_size < 1 or (steps is None) == (epochs is None) or (steps or epochs or 0) < 1:
        raise RecipeError(f"batch_size = {batch_size}, steps = {steps}, epochs = {epochs}: allowed is a batch_size "
                          "from 1 up, and either steps or epochs from 1 up")
    per_epoch = -(-n // batch_size)
    total = steps or (epochs or 0) * per_epoch
    # Steps of the golden ratio: any stretch of them is even over [0, 1), so that epochs of any length, which begin and
    # end at other steps in each client, still find short and long batches wanted in proportion.
    wanted = (rng_shared.random() + GOLDEN * np.arange(total + per_epoch)) % 1.0
    out: list[np.ndarray] = []
    while len(out) < total:
        out.extend(_epoch(np.asarray(lengths), batch_size, rng_client, wanted[len(out) : len(out) + per_epoch]))
    return out[:total]


def _epoch(lengths: np.ndarray, batch_size: int, rng: np.random.Generator, wanted: np.ndarray) -> list[np.ndarray]:
    """One visit to every row; `wanted` [batches] is the length rank in [0, 1) that each step should have."""
    order = rng.permutation(len(lengths))
    count = np.full(len(wanted), batch_size)
    # Sorted rows are cut in order, so a short last batch would always be the longest rows: it falls anywhere instead.
    count[rng.integers(len(wanted))] -= batch_size * len(wanted) - len(lengths)
    ends = np.cumsum(count)
    out: list[np.ndarray] = []
    for steps in np.array_split(np.arange(len(wanted)), -(-len(wanted) // BUCKET)):
        rows = order[ends[steps[0]] - count[steps[0]] : ends[steps[-1]]]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        cut = np.split(rows, np.cumsum(count[steps])[:-1])
        # The step that wants the k-th shortest rows of this bucket gets its k-th batch.
        out.extend(cut[k] for k in np.argsort(np.argsort(wanted[steps])))
    return out
