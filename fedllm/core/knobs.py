"""Knobs: fields of a frozen dataclass with a sentence and limits, checked when one is made; hints for wrong keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any

from fedllm.core.errors import RecipeError


def knob(default: Any, doc: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None,
         lt: float | None = None, options: Sequence[Any] | None = None) -> Any:
    """A dataclass field with a sentence on what it does and the values that it takes."""
    meta = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "options": options}
    return field(default=default, metadata=meta)


class Knobs:
    """Checks every knob of a frozen dataclass when it is made; a value out of range is a RecipeError, never clamped."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            check_knob(type(self).__name__, f.name, getattr(self, f.name), f.metadata, f.type)

    @classmethod
    def knobs(cls) -> dict[str, dict[str, Any]]:
        """Name -> default, doc and limits, in the order of declaration."""
        return {f.name: {"default": None if f.default is MISSING else f.default, "type": str(f.type), **f.metadata}
                for f in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def make(cls, values: Mapping[str, Any], path: str) -> Any:
        """Build from a recipe's mapping; an unknown key is refused with the nearest name."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                raise RecipeError(f"{path}.{key}: unknown key{hint_of(str(key), names, path)} Allowed here: "
                                  f"{', '.join(names) or 'nothing'}")
        try:
            return cls(**{key: _cased(value, cls.knobs()[key]["options"]) for key, value in values.items()})
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None


LARGEST, LONGEST = 1e15, 100_000
"""No knob is a larger decimal number, or a longer text."""

ELSEWHERE: Mapping[str, str] = {
    "learning_rate": "local.lr", "per_device_train_batch_size": "local.batch_size", "train_batch_size":
    "local.batch_size", "micro_batch_size": "local.batch_size", "num_train_epochs": "local.epochs (of a round)",
    "num_epochs": "local.epochs (of a round)", "max_steps": "local.steps (of a round)",
    "max_seq_length": "local.max_length", "max_seq_len": "local.max_length", "cutoff_len": "local.max_length",
    "sequence_len": "local.max_length", "model_max_length": "local.max_length", "optim": "local.optimizer",
    "lr_scheduler_type": "local.over_rounds", "lr_scheduler": "local.over_rounds", "warmup_steps": "local.warmup",
    "warmup_ratio": "local.warmup (in steps)", "max_grad_norm": "local.clip_norm", "adam_beta1": "local.beta1",
    "adam_beta2": "local.beta2", "lora_r": "space.rank", "r": "space.rank", "lora_rank": "space.rank",
    "lora_alpha": "space.alpha", "target_modules": "space.targets", "lora_target_modules": "space.targets",
    "model_name_or_path": "model.name", "model_name": "model.name", "dataset_name": "data.source", "dataset":
    "data.source", "dataset_path": "data.source", "train_file": "data.source", "validation_file": "data.test",
    "chat_template": "data.template: chat", "completion_only_loss": "data.completion_only", "assistant_only_loss":
    "data.completion_only", "bf16": "model.dtype: bfloat16", "torch_dtype": "model.dtype", "num_rounds": "rounds",
    "num_clients": "data.partition.clients", "fraction_fit": "clients.per_round", "output_dir":
    "the option --root of `fedllm run`", "eval_steps": "evaluate.every (in rounds)", "save_steps":
    "record.checkpoint_every (in rounds)", "gradient_accumulation_steps": "local.accumulate",
    "gradient_checkpointing": "local.checkpointing", "neftune_noise_alpha": "local.neftune", "sample_packing":
    "local.packing", "loraplus_lr_ratio": "local.lora_plus", "lora_dropout": "space.dropout", "use_dora": "space.dora",
    "use_rslora": "space.scaling: rslora", "init_lora_weights": "space.init", "lora_modules_to_save":
    "space.modules_to_save", "adapter_name_or_path": "space.start_from", "load_best_model_at_end":
    "evaluate.keep_best", "early_stopping_patience": "evaluate.patience", "save_total_limit": "record.keep_rounds",
    "val_set_size": "data.test", "train_on_inputs": "data.completion_only", "weights_dtype": "model.dtype",
    "learning_rate_scheduler": "local.over_rounds", "lr_scheduler_kwargs": "local.over_rounds",
    "generation_max_length": "evaluate.max_new_tokens",
}
"""Keys that people know from TRL, transformers, PEFT, Axolotl and Flower, and what they are called here."""


def hint_of(key: str, names: Sequence[str], path: str = "") -> str:
    """What ends `unknown key`: where the key is known from elsewhere its name here, else the nearest one."""
    if key in ELSEWHERE:
        here = ELSEWHERE[key]
        inside = here.removeprefix(f"{path}.") if path else here
        return f"; here it is '{inside if inside.split()[0].rstrip(':') in names else here}'."
    near = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else "."


def _cased(value: Any, options: Sequence[Any] | None) -> Any:
    """An option written in another case (AdamW) as it is called here, and YAML's `off`, which it takes for a no."""
    if value is False and "off" in (options or ()):
        return "off"
    if not options or not isinstance(value, str) or value in options:
        return value
    return next((o for o in options if isinstance(o, str) and o.lower() == value.lower()), value)


def check_knob(owner: str, name: str, value: Any, meta: Mapping[str, Any], kind: Any = "") -> None:
    """Raise RecipeError naming the knob, the value and what is allowed."""
    limits = [f"{sign} {meta[op]}" for op, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
              if meta.get(op) is not None]
    unbounded = meta.get("le") is meta.get("lt") is None
    if unbounded and isinstance(value, int | float) and abs(value) > LARGEST:  # the type's own bound is what it breaks
        limits.append(f"<= {LARGEST:g}")
    allowed = f"one of {list(meta['options'])}" if meta.get("options") else " and ".join(limits)
    kind = kind.__name__ if isinstance(kind, type) else str(kind)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None and "None" in kind:
        return
    bad = (
        (meta.get("options") and not any(type(value) is type(o) and value == o for o in meta["options"]))
        or (limits and not numeric)
        or not any(_is_of(one.strip(), value) for one in re.split(r"\|(?![^\[]*\])", kind))
        or (numeric and (
            (meta.get("ge") is not None and not value >= meta["ge"])
            or (meta.get("gt") is not None and not value > meta["gt"])
            or (meta.get("le") is not None and not value <= meta["le"])
            or (meta.get("lt") is not None and not value < meta["lt"])))
    )
    if bad:
        raise RecipeError(f"{owner}.{name} = {value!r:.200} is not allowed; it must be {allowed or kind}"
                          + (f" ({kind})" if limits and not meta.get("options") else ""))


def _is_of(kind: str, value: Any) -> bool:
    """Whether a value is of one of the types that knobs are annotated with; of others nothing is known here."""
    if kind == "None":
        return value is None
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("int", "float"):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return whole or (kind == "float" and isinstance(value, float) and abs(value) <= LARGEST)
    if kind == "str":
        whole = isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)  # no half characters
        return whole and len(value) <= LONGEST and "\0" not in value
    if kind.startswith("tuple"):
        of = kind[len("tuple["):].partition(",")[0] if "[" in kind else ""
        return isinstance(value, tuple | list) and all(not of or _is_of(of, v) for v in value)
    return not kind.startswith("Mapping") or isinstance(value, Mapping)
