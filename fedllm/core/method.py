"""What a method is: a frozen dataclass whose fields are its knobs, with a card, and programs over clients."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from fedllm.core.ask import Ask, Program, Replies, on_client
from fedllm.core.client import Client, ClientInfo
from fedllm.core.errors import RecipeError
from fedllm.core.payload import Payload, Tree, pack, part

State = Mapping[str, Any]


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
    """An option written in another case (AdamW) as it is called here."""
    if not options or not isinstance(value, str) or value in options:
        return value
    return next((o for o in options if isinstance(o, str) and o.lower() == value.lower()), value)


def check_knob(owner: str, name: str, value: Any, meta: Mapping[str, Any], kind: Any = "") -> None:
    """Raise RecipeError naming the knob, the value and what is allowed."""
    limits = [f"{sign} {meta[op]}" for op, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
              if meta.get(op) is not None]
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


@dataclass(frozen=True)
class Claim:
    """A sentence that can fail: on `rig`, `metric` of the method against the same metric of `baseline`, over seeds.

    `holds` is one of "<=", ">=", "<", ">" between `figure` and `threshold`; with `relative="ratio"` the figure is
    method / baseline, with "difference" method - baseline, with "own" the method's metric alone. What is said of it
    is not up to the author: `evidence/verdict.py` judges the figures of seeds that nobody looked at while building.
    """

    says: str
    rig: str
    metric: str
    holds: Literal["<=", ">=", "<", ">"]
    threshold: float
    baseline: str | None = None
    relative: Literal["own", "ratio", "difference"] = "own"
    seeds: int | None = None
    """Measured seeds; at least 10 where the figure can vary, and where it cannot (`exact`) 3 unless more are said."""
    wins: int | None = None
    """Of the rules before there were verdicts; nothing depends on it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Passed on to the rig (for example other knobs, ranks or learning rates); `knobs` to the method's arm alone."""
    against: Mapping[str, Any] = field(default_factory=dict)
    """Options of the baseline's arm alone, over `options`."""
    kind: Literal["", "order", "level", "exact"] = ""
    """order: against a baseline. level: against a number. exact: an identity, or bytes that are counted, which no seed
    moves. "": order with a baseline, level without."""
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Option of the rig (`local.lr`, `knobs.server_lr`) -> values from which each arm gets its best, on seeds apart."""
    better: Literal["", "min", "max"] = ""
    """Which way the metric is better, for the grid. "": the way that `holds` points."""
    unequal: str = ""
    """Why the two arms may do unequal work; "": the run is refused when the rig reports that they did."""
    unseen: int = 4000
    """The first measured seed. All below were, or may have been, looked at while building."""

    def __post_init__(self) -> None:
        if self.kind == "order" and self.baseline is None:
            raise RecipeError(f"claim {self.says!r}: kind 'order' is not allowed without a baseline")
        if self.unseen < 4000:
            raise RecipeError(f"claim {self.says!r}: unseen = {self.unseen} is not allowed; it must be >= 4000, since "
                              "seeds below were looked at while building, or are those that rates are tuned on")

    @property
    def sort(self) -> Literal["order", "level", "exact"]:
        """Its kind, also where it is not said."""
        return self.kind or ("order" if self.baseline else "level")


KINDS = ("text", "tokens")
"""Words that were made of rows, and the ids of such words."""


@dataclass(frozen=True)
class Card:
    """What a method says about itself; docs and tables are generated from it."""

    title: str
    paper: str
    topic: str
    sends: str
    needs: str
    claim: Claim
    evidence: str = ""
    """What of the paper was read where, and choices of our own."""
    kinds: tuple[str, ...] = ()
    """What leaves a client beside tensors and numbers, of `KINDS`: a site whose settings forbid it takes no part. It is
    no permission: what is not declared here is held back at the site all the same."""
    also: Mapping[str, Claim] = field(default_factory=dict)
    """Further claims, each by a word of its own; `<id>:<word>` is its name in `fedllm claims`."""
    only_exact: str = ""
    """Why there is no claim whose figure could vary, where there is none."""


@dataclass(frozen=True)
class Trial:
    """Small settings under which the tests that hold for all methods run this one, on every engine.

    What is not said is the tests' own. A method that cannot run under the tests' own says here what it needs.
    """

    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Its own knobs, small."""
    space: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora", "rank": 4})
    """The recipe's section `space`."""
    local: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the recipe's section `local`."""
    ranks: tuple[int, ...] = ()
    """LoRA ranks that clients declare."""
    task: str = "generation"
    models: Mapping[str, str] = field(default_factory=dict)
    """Of models that it asks for by name the task, where it is not generation."""
    far: Mapping[str, Any] = field(default_factory=dict)
    """Keys of a recipe that differ in a real federation, for example so that answers come in the simulation's order."""
    rounding: str = ""
    """Why it magnifies fp32 rounding, so that engines are held to one another in fp64 alone."""
    silent: str = ""
    """Why a round in which a client is silent is not a round without that client."""
    apart: str = ""
    """Why no common test of rounds can hold for it, so that only tests of its own do."""


class Method(Knobs):
    """A federated method. Training methods have `init` and `round`; inference-time methods have `answer`."""

    card: ClassVar[Card]
    trial: ClassVar[Trial] = Trial()

    simulation_only: ClassVar[str] = ""
    """Why no real federation runs it: it sees what no deployment may (pooled data)."""

    by_arrival: ClassVar[bool] = False
    """Whether the result depends on who answers first: virtual time repeats that by the seed, real time does not."""

    only_fits: ClassVar[bool] = True
    """Whether its client functions learn from rows by `client.fit` alone. Where they read rows or losses beside it, no
    layer can make each row's part in the answer private (`dp_sgd`)."""

    only_text: ClassVar[bool] = False
    """Whether all that its clients say of their rows is text (and how many rows there are), so that a layer over text
    (`dp_text`) covers everything."""

    reads_ranks: ClassVar[bool] = False
    """Whether clients train the rank that their profiles declare; others train the space's own everywhere."""

    reads_rates: ClassVar[bool] = False
    """Whether it divides by the sum of the learning rates (`Fitted.lr_sum`), which must then be one for all."""

    mixes: ClassVar[Literal["", "models", "text"]] = ""
    """Whether clients may hold models of other designs than the server's, since no trainables cross: any `models` of
    ours, or whatever continues `text` (an endpoint). "": all hold the one model."""

    serves: ClassVar[bool] = True
    """False when the server ends with no model of its own: every client keeps and uses its own."""

    shares: ClassVar[bool] = False
    """Whether its clients answer with what their profiles' `shares` say: with `scores`, nothing that they send is text.
    """

    rows_change: ClassVar[bool] = False
    """Whether a site may go on with a run on other rows than it began with: what it made of them is brought up to date.
    """

    learns_from: ClassVar[Literal["rows", "environments", "words"]] = "rows"
    """What its clients must hold: rows, environments that a small policy acts in, or such in words, which a language
    model reads."""

    metrics: ClassVar[Mapping[str, Literal["max", "min"]]] = {}
    """The method's own metrics, by name, with the direction that is better: what `score` and `examine` return beside,
    or in place of, loss, accuracy and exact match."""

    @property
    def ends_with_judges(self) -> int:
        """How many judges of two answers it ends with, which a later stage may ask (`judges: STAGE`); 0: none."""
        return 0

    @property
    def noise_of_counts(self) -> float | None:
        """The noise multiplier of what clients answer that share counts alone; None: it has no such answers."""
        return None

    @property
    def repeats(self) -> int:
        """How often a round asks one client for the same function, at the most; a site counts its answers by it."""
        return 1

    def check(self, model: Any) -> None:
        """Raise CompositionError or ModelError when this method cannot work with the model's space or task."""

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        """Raise RecipeError or CompositionError when the method cannot work with these clients, or so many a round."""

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        """Raise DataError when the method cannot learn from the clients' training rows; asked in a simulation alone,
        since nobody sees those of a real federation."""

    def check_profiles(self, model: Any, clients: Sequence[ClientInfo]) -> None:
        """Raise RecipeError or CompositionError when the method cannot work with what clients declare of themselves;
        asked in a simulation before the first round, and by methods themselves where sites come as they like."""

    def check_work(self, local: Any, rounds: int) -> None:
        """Raise RecipeError when the method cannot work with so many rounds of what `local` has clients do."""

    def cautions(self, clients: int) -> Sequence[str]:
        """What may not be meant, with so many clients a round; shown as the run begins, and nothing is refused."""
        return ()

    def check_layers(self, layers: Sequence[Any]) -> None:
        """Raise CompositionError when the method is not what it says without other layers."""

    def at_client(self, model: Any) -> Any:
        """What a client sees of the model that it holds, where it is not all of it (`SERVER` always sees its own)."""
        return model

    def asks_for(self) -> Sequence[str]:
        """Names of the recipe's `models` that it uses; a run whose recipe lacks one is refused when it is built."""
        return ()

    def server_asks_for(self) -> Sequence[str]:
        """Names of the recipe's `models` that the server alone uses: no site loads them, or needs them."""
        return ()

    def public_at(self) -> Sequence[Literal["clients", "server"]]:
        """Who needs public rows (`data.public`): a run without is refused. Sites get them where `clients` need them."""
        return ()

    def init(self, model: Any) -> State:
        """The server's state before the first round; `model.initial()` gives the starting trainables."""
        return {"theta": model.initial()}

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        """One round: yields Asks, returns the next state."""
        raise NotImplementedError

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        """The model that would be deployed: trainables, and what was merged into the frozen base (or None)."""
        return state["theta"], None

    def modules(self, state: State) -> Mapping[str, Tree]:
        """Trainables that are deployed side by side on one backbone, by name, where no single ones are the model."""
        return {}

    def trained(self, state: State) -> Mapping[str, Tree]:
        """Trainables of the recipe's `models` that the server trained, by the model's name."""
        return {}

    def statement(self, state: State) -> Mapping[str, Any] | None:
        """What it can say of the run's privacy where it makes something private by itself, as a layer's statement."""
        return None

    def report(self, state: State) -> Mapping[str, Any] | None:
        """What the method adds to the run's result, under `reports`. None: nothing."""
        return None

    def evaluate(self, state: State, clients: Sequence[ClientInfo], on: str) -> Program:
        """Each client scores the model that it would use; `on` names the rows ("local" or "global"). Asked of `SERVER`
        with "global", it is the served model's own figure, by the same function."""
        theta, base = self.served(state)
        return (yield Ask(self.score, {c.id: pack(theta=theta, base=base, on=on) for c in clients}))

    def examine(self, state: State, clients: Sequence[ClientInfo], rows: Sequence[Any]) -> Program:
        """The server's figures on these rows (the global test), under the names of `metrics`; for methods whose figure
        is no score of one model. Where a method has none, the server is tested by the very `score` that clients are."""
        raise NotImplementedError

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        return client.score(part(msg, "theta"), base=part(msg, "base") or None, on=msg["on"])


class Star(Method):
    """The usual round: tell each client, let it work, merge the answers."""

    local: Callable[..., Any]

    def down(self, state: State, client: ClientInfo) -> Payload:
        """What this client is told."""
        return pack(theta=state["theta"])

    def merge(self, state: State, out: Replies) -> State:
        """The next state from the folded (or single) replies. The server may train here."""
        raise NotImplementedError

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        out = yield Ask(self.local, {c.id: self.down(state, c) for c in clients})
        return self.merge(state, out)
