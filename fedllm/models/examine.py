"""What a pre-trained folder can do on rows it has not seen: `python -m fedllm.models.examine FOLDER`."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedllm.data.office import pretraining_rows
from fedllm.data.office_tasks import ASK

HELD_OUT_SEED = 987_654  # pre-training with seed s draws from s * 1_000_000 + 1 on, and never gets so far
EMBEDDED = Path(__file__).parent / "embedded"


@torch.no_grad()
def examine(folder: Path, rows: int, seed: int = HELD_OUT_SEED) -> dict[str, Any]:
    """Perplexity over all tokens, and the share of whole answers that are the greedy ones, by task and by field.

    An answer counts when each of its tokens, end of text included, is the likeliest after those before it, which is
    the verdict that greedy decoding gives.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    hits: dict[str, list[bool]] = defaultdict(list)
    loss, count = 0.0, 0
    for row in pretraining_rows(rows, seed):
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"])["input_ids"]]
        answer = [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor(prompt + answer)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss += float(functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
        hit = logits[len(prompt) - 1 :].argmax(-1).tolist() == answer
        for name in _names(row):
            hits[name].append(hit)
    scores = {name: {"exact_match": round(sum(h) / len(h), 3), "rows": len(h)} for name, h in sorted(hits.items())}
    return {"parameters": model.num_parameters(), "perplexity": round(math.exp(loss / count), 3), "tasks": scores}


def _names(row: Mapping[str, str]) -> Iterable[str]:
    """The row's task; where one field is asked for, the field too."""
    yield row["category"]
    if row["category"] == "read_one":
        asked = row["prompt"].split("\n")[0].lower()
        fields = [name for name, phrases in ASK.items() if any(re.search(rf"\b{p}\b", asked) for p in phrases)]
        yield from (f"read_one: {name}" for name in fields if len(fields) == 1)


def main() -> None:
    """Read the command line, examine, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument("--rows", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(examine(given.folder, given.rows), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
