"""Pre-train the embedded model from nothing on the office stream: `python -m fedllm.models.pretrain --out DIR`.

One CPU core and 40 minutes are enough. The result is an ordinary transformers folder. Rows and initial weights follow
from the seed; the number of steps follows from the CPU time given, or from `--steps` where it must not depend on the
machine.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.data import office_words as words
from fedllm.data.office import ANSWER_MARK, TASK_MARK, pretraining_rows

log = logging.getLogger(__name__)

VOCABULARY = 2048
SPECIALS = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(3)
TOKENIZER_ROWS = 40_000
CODE_REPEATS = 2000  # how often each code word is shown to the tokenizer, so that it becomes one token
BATCH_ROWS = 32
CHUNK_BATCHES = 256  # batches are bucketed by length within a chunk of this many
MATRIX_RATE, OTHER_RATE = 2e-2, 6e-3
MOMENTUM, DECAY = 0.95, 0.05
NEWTON_SCHULZ = (3, 3.4445, -4.7750, 2.0315)  # iterations, and the coefficients of the published quintic
WARMUP = 0.03
PROMPT_SHARE = 0.25  # rows whose prompt is learned too, not only the answer
PROMPT_WEIGHT = 0.5


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level vocabulary; each digit is a token of its own, so that numbers are easy to copy."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = [AddedToken(mark, normalized=False) for mark in (TASK_MARK, ANSWER_MARK)]
    size = VOCABULARY - len(marks)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_tokenizer_text(seed), trainer)
    tokenizer.add_tokens(marks)
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def _tokenizer_text(seed: int) -> Iterator[str]:
    """Rows without the marks around them, and each code word often enough."""
    for row in pretraining_rows(TOKENIZER_ROWS, seed):
        yield row["prompt"].removeprefix(TASK_MARK).removesuffix(ANSWER_MARK)
        yield row["response"]
    for word in words.CODE:
        yield f" {word}\n{word}" * CODE_REPEATS


def build_model(seed: int) -> LlamaForCausalLM:
    """A small Llama with fresh weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and loss weights without end; a weight belongs to the token that is predicted."""
    rng = Random(f"pretrain-batches-{seed}")
    chunk = 0
    while True:
        chunk += 1
        rows = list(pretraining_rows(BATCH_ROWS * CHUNK_BATCHES, seed * 1_000_000 + chunk))
        prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
        answers = tokenizer([row["response"] for row in rows])["input_ids"]
        coded = []
        for prompt, answer in zip(prompts, answers, strict=True):
            weight = PROMPT_WEIGHT if rng.random() < PROMPT_SHARE else 0.0
            coded.append(([BOS, *prompt, *answer, EOS], [0.0, *[weight] * len(prompt), *[1.0] * (len(answer) + 1)]))
        coded.sort(key=lambda pair: len(pair[0]))
        groups = [coded[start : start + BATCH_ROWS] for start in range(0, len(coded), BATCH_ROWS)]
        rng.shuffle(groups)
        for group in groups:
            yield _padded(group)


def _padded(group: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in group)
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row, _ in group])
    weights = torch.tensor([row + [0.0] * (width - len(row)) for _, row in group])
    return ids, weights


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the tokens that carry weight; the head runs on those positions only, which saves a third."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # right padding needs no mask
    weights = weights[:, 1:]
    chosen = weights > 0
    losses = functional.cross_entropy(model.lm_head(hidden[chosen]), ids[:, 1:][chosen], reduction="none")
    return (losses * weights[chosen]).sum() / weights.sum()


def schedule(progress: float) -> float:
    """The share of the peak rate: linear warm-up, then a cosine down to a hundredth."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made orthogonal (Jordan et al., 2024), in fp32, equal shapes in one product.

    `torch.optim.Muon` orthogonalises in bf16, which a CPU without bf16 units emulates: a step took ten times as long.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__(list(weights), {"lr": MATRIX_RATE})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every weight by its orthogonal update."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for weight in group["params"]:
                shapes.setdefault(tuple(weight.shape), []).append(weight)
            for (rows, columns), weights in shapes.items():
                grads = torch.stack([weight.grad for weight in weights if weight.grad is not None])
                mean = self.state[weights[0]].setdefault("mean", torch.zeros_like(grads))
                mean.lerp_(grads, 1 - MOMENTUM)
                step = orthogonal(grads.lerp(mean, MOMENTUM))
                for weight, change in zip(weights, step, strict=True):
                    weight.mul_(1 - group["lr"] * DECAY).sub_(change, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearest matrices `[N, rows, columns]` with orthogonal rows or columns, roughly, by Newton-Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    rounds, a, b, c = NEWTON_SCHULZ
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def pretrain(out: Path, minutes: float, seed: int, steps: int | None = None, start: Path | None = None) -> None:
    """Train for `minutes` of CPU time, or for `steps`, and save an ordinary model folder in `out`.

    With `start`, an earlier result goes on under a fresh schedule; give it another seed, for new rows.
    """
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start) if start else train_tokenizer(seed)
    model = LlamaForCausalLM.from_pretrained(start) if start else build_model(seed)
    log.info("%d parameters", model.num_parameters())
    model.train()
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [model.model.embed_tokens.weight, *(w for w in model.model.parameters() if w.ndim == 1)]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices), MATRIX_RATE),
        (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True), OTHER_RATE),
    ]
    begin, running = time.process_time(), 0.0
    for step, (ids, weights) in enumerate(batches(tokenizer, seed)):
        spent = (time.process_time() - begin) / 60
        progress = step / steps if steps else spent / minutes
        if progress >= 1:
            break
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * schedule(progress)
        loss = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running += float(loss.detach())
        if step % 100 == 99:
            log.info("step %d, %.1f min, loss %.3f", step + 1, spent, running / 100)
            running = 0.0
    save(model, tokenizer, out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model, its tokenizer and greedy generation defaults."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=32, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=40.0, help="CPU minutes to train for")
    parser.add_argument("--steps", type=int, help="train for exactly so many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="folder of an earlier result to go on from")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pretrain(given.out, given.minutes, given.seed, given.steps, given.start)


if __name__ == "__main__":
    main()
