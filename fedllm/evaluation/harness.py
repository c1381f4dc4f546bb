"""lm-eval on a run's model, with its trainables in it as the run trained them, whatever their space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from fedllm.core.errors import FedLLMError, RecipeError
from fedllm.evaluation.trained import Arm
from fedllm.local.text import continued

MOST_NEW = 256
"""Tokens of an answer where the task does not say (as lm-eval's own models)."""


class ArmLM(TemplateLM):
    """An arm as lm-eval asks it. Contexts begin with the beginning token where the tokenizer has one, as every row did
    that the run trained on; lm-eval's own model for transformers does as the tokenizer likes (`add_bos_token`)."""

    def __init__(self, arm: Arm) -> None:
        super().__init__()
        self.arm = arm
        self.tokenizer: Any = arm.model.tokenizer
        if not arm.model.rules.speaks:
            raise RecipeError(f"--tasks: the run's task is {arm.model.task!r}, and lm-eval asks language models; use "
                              "--data")
        self.positions = min(32_768, arm.model.room)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return int(self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation by the tokenizer's own template."""
        return str(self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with the beginning token gets no second one."""
        ids, bos = list(self.tokenizer.encode(string, add_special_tokens=False)), self.tokenizer.bos_token_id
        return ids if bos is None or add_special_tokens is False or ids[:1] == [bos] else [bos, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and continuation in tokens, divided where the whole text has a boundary: as they are, or with the
        context's last spaces moved over (as lm-eval does). Where a token holds some of both it is scored."""
        whole, bare = self.tok_encode(context + continuation), context.rstrip()
        for text in dict.fromkeys((context, bare)):
            ahead = self.tok_encode(text)
            if text and len(ahead) < len(whole) and whole[: len(ahead)] == ahead:
                return ahead, whole[len(ahead) :]
        # lm-eval counts tokens here, whatever they are: a continuation may come out empty, and likely as anything.
        ahead = self.tok_encode(bare)
        same = next((k for k, (a, b) in enumerate(zip(ahead, whole, strict=False)) if a != b), len(whole) - 1)
        return whole[: max(1, same)], whole[max(1, same) :]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of each (_, context, continuation) in tokens: log p of the continuation, and whether it is what greedy
        decoding says."""
        rows = []
        for _, context, text in requests:
            ahead = max(1, self.positions - len(text))  # as much of the context as the model has places for
            kept = text[-(self.positions - 1):]
            rows.append(continued(np.array(context[-ahead:], np.int64), kept))
        if not rows:
            return []
        got = self.arm.measure(rows, _told)
        return [(float(logp), bool(greedy > 0.5)) for logp, greedy in got]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the model's length."""
        windows, whose = [], []
        for i, request in enumerate(requests):
            for pair in get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                  self.positions, 1):
                windows.append((None, *make_disjoint_window(pair)))
                whose.append(i)
        out = [0.0] * len(requests)
        for i, (logp, _) in zip(whose, self._loglikelihood_tokens(windows), strict=True):
            out[i] += logp
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of its stop texts."""
        out, alike = [""] * len(requests), defaultdict(list)
        for i, request in enumerate(requests):
            how = request.args[1]
            new = int(how.get("max_gen_toks") or how.get("max_new_tokens") or MOST_NEW)
            heat = float(how.get("temperature") or 0.0) if how.get("do_sample") else 0.0
            alike[min(new, self.positions - 1), heat].append(i)
        for (new, heat), which in alike.items():
            prompts = [np.array(self.tok_encode(requests[i].args[0]) or [self.prefix_token_id], np.int32)
                       for i in which]
            for i, text in zip(which, self.arm.say(prompts, new, heat), strict=True):
                until = requests[i].args[1].get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.split(stop)[0] if stop else text
                out[i] = text
        return out


def _told(model: Any, batch: Any) -> Tensor:
    """[N, 2]: summed log p of each row's targets, and 1 where each of them is the likeliest."""
    rows, z, y = model.target_logits(batch)
    n = len(batch.ids)
    logp = z.log_softmax(-1).gather(1, y[:, None])[:, 0].double()
    wrong = (z.argmax(-1) != y).double()
    total, misses = (torch.zeros(n, dtype=torch.float64, device=z.device).index_add(0, rows, v) for v in (logp, wrong))
    return torch.stack([total, (misses == 0).double()], 1)


def run_tasks(arm: Arm, tasks: Sequence[str], *, shots: int | None = None, limit: int | None = None,
              chat: bool = False, seed: int = 0) -> dict[str, Any]:
    """lm-eval's results on tasks by name, or by the path of a YAML file of one's own.

    Paths of data files in such a file are relative to it. RecipeError for a task that is not known or cannot be read.
    """
    manager = TaskManager(include_defaults=any(not _is_file(t) for t in tasks))
    specs = [_own(Path(t)) if _is_file(t) else _known(manager, t) for t in tasks]
    try:
        found = simple_evaluate(ArmLM(arm), tasks=specs, num_fewshot=shots, limit=limit, apply_chat_template=chat,
                                task_manager=manager, log_samples=True, bootstrap_iters=1000, random_seed=seed,
                                numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed)
    except FedLLMError:
        raise
    except Exception as error:  # a task is code and data of others: whatever goes wrong there is told as its fault
        raise RecipeError(f"--tasks {' '.join(tasks)}: lm-eval cannot run this ({type(error).__name__}: "
                          f"{str(error)[:500] or 'no message'})") from error
    if found is None:
        raise RecipeError(f"--tasks {' '.join(tasks)}: lm-eval gave no result")
    return {"results": found["results"], "versions": found["versions"], "n-shot": found["n-shot"],
            "n-samples": found["n-samples"], "higher_is_better": found.get("higher_is_better", {})}


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) or "/" in task


def _known(manager: TaskManager, name: str) -> str:
    import difflib

    if name in manager.all_tasks:
        return name
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    raise RecipeError(f"--tasks {name!r} is no task of lm-eval" + (f"; did you mean {', '.join(near)}?" if near else "")
                      + " A file of your own ends in .yaml")


def _own(path: Path) -> dict[str, Any]:
    """A task file, with the paths of its data as they are from here."""
    if not path.is_file():
        raise RecipeError(f"--tasks {str(path)!r}: there is no such file")
    try:
        spec = dict(load_yaml(path, resolve_func=True))
    except Exception as error:
        raise RecipeError(f"--tasks {str(path)!r} cannot be read: {type(error).__name__}: {str(error)[:300]}") from None
    if not isinstance(spec.get("task"), str):
        raise RecipeError(f"--tasks {str(path)!r}: it has no key 'task' with the task's name")
    more = dict(spec.get("dataset_kwargs") or {})
    if "data_files" in more:
        spec["dataset_kwargs"] = {**more, "data_files": _from(path.parent, more["data_files"])}
    return spec


def _from(folder: Path, files: Any) -> Any:
    if isinstance(files, Mapping):
        return {k: _from(folder, v) for k, v in files.items()}
    if isinstance(files, list | tuple):
        return [_from(folder, v) for v in files]
    beside = folder / str(files)
    if "://" in str(files) or (beside.is_absolute() and str(files) == str(beside)):
        return files
    if not beside.exists():
        raise RecipeError(f"--tasks: its data file {str(beside)!r} is not there")
    return str(beside.resolve())
