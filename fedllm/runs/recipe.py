"""The recipe: one YAML file that says all of a run, checked key by key before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from fedllm.core.errors import RecipeError
from fedllm.data.section import DataSpec
from fedllm.data.spec import Spec
from fedllm.runs.complaints import check_values, complaints, edit, fill, read_yaml
from fedllm.runs.device import Device
from fedllm.runs.plugins import plugged
from fedllm.tasks.answers import judges_of, listed
from fedllm.trackers.registry import known

OWN = "each site's own"
"""Stands in a federation's recipe where a simulation's names the source of its rows."""
Rule = Literal["persistence", "linear_ar", "popularity", "item_knn", "random", "equal_share", "proportional"]
Count = Annotated[int, Field(ge=1, le=10**9)]
Pair = Annotated[list[Annotated[int, Field(ge=2, le=4096)]], Field(min_length=2, max_length=2)]


def _share(value: Any) -> int | float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (1 <= value <= 10**9 if isinstance(value, int) else 0 < value <= 1):
        raise ValueError("allowed is a count (a whole number from 1) or a share (a decimal above 0, up to 1.0)")
    return value


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e15


def _law(value: Any) -> Any:
    """A number for all, a list that is dealt in order, or a law by which each client draws its own."""
    kinds = {"lognormal": 1, "uniform": 2, "choice": None}
    ok = _positive(value)
    if isinstance(value, list):
        ok = bool(value) and all(map(_positive, value))
    elif isinstance(value, dict) and len(value) == 1 and next(iter(value)) in kinds:
        ((kind, given),) = value.items()
        given = given if isinstance(given, list) else [given]
        ok = (all(map(_positive, given)) and kinds[kind] in (None, len(given))
              and (kind != "uniform" or given[0] <= given[-1]))
    if not ok:
        raise ValueError("allowed is a number above 0, a list of such (dealt in order), {lognormal: sigma}, "
                         "{uniform: [low, high]} or {choice: [...]}, all above 0")
    return value


def _short(key: str) -> Any:
    """`method: fedavg` is short for `method: {name: fedavg}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


Names = Annotated[list[str], Field(min_length=1)]
Share = Annotated[int | float, PlainValidator(_share)]
Law = Annotated[Any, PlainValidator(_law)]


class ModelSpec(Spec):
    """Which model, and how it is held in memory."""

    name: str = "embedded"
    """embedded, minilm, smollm2, a folder saved with save_pretrained, a GGUF file, or a Hub id; policy or decider
    where clients act in environments, series where they forecast, shop where items are ranked, pairs where pictures and
    words are."""
    hidden: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Widths of a policy's hidden layers (name policy); none: one linear map."""
    width: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] = 32
    """Width of a network that is built (name series, shop, pairs or decider); a head of its attention is 8 wide."""
    depth: Annotated[int, Field(ge=1, le=64)] = 2
    """Its blocks."""
    codes: Pair = Field(default=[8, 32])
    """Groups of an item's codes, and how many codes a group has (name shop)."""
    prompts: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Prompts of a client (name shop or pairs)."""
    branch: bool = True
    """Beside its prompts a reader over items of its own (name shop): PFCR's full prompts, else its light ones."""
    picture: Annotated[int, Field(ge=8, le=512)] = 16
    """Side to which pictures are brought, in pixels; of numbers it is theirs (name pairs)."""
    at_clients: str | None = None
    """What the sites of a real federation load instead, where the owner keeps blocks back (`export_for_clients`)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """As the model's folder holds them, or drawn by the recipe's seed from its config alone (with space: full)."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the frozen base; trainables are fp32 at least."""
    quantize: Literal["nf4", "int8"] | None = None
    """Pack the frozen base's linear maps in 4 or 8 bits (bitsandbytes), as QLoRA does; for spaces that leave them as
    they are."""
    device: Device = "auto"
    """auto (a CUDA card where there is one), cpu, cuda, or cuda:N. The sites of a real federation choose theirs."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """How an encoder's states become one vector (classification)."""
    fast_kernels: bool = True
    """Use the quickest CPU kernels that pass a start-up check."""
    trust_remote_code: bool = False
    """Run Python code that comes with a Hub model."""


class Named(BaseModel):
    """A part that is found by its name; every other key is one of its knobs and is checked where it is made."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def knobs(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


class Stage(Named):
    """One part of a run in stages: what it changes of the recipe, and what it begins with."""

    start: str = ""
    """The stage whose product it begins with; empty: the one before. `base`: the recipe's own model."""
    judges: str = ""
    """The stage whose judges of two answers label its pairs, frozen; it then begins, where `start` is empty, with what
    those began with."""

    @property
    def changes(self) -> dict[str, Any]:
        """Keys of the recipe that this stage has otherwise."""
        return dict(self.model_extra or {})


class NamedModel(Spec):
    """A model beside the main one: a folder, an id or an endpoint."""

    name: str | None = None
    """embedded, minilm, smollm2, a folder saved with save_pretrained, a GGUF file, or a Hub id."""
    endpoint: dict[str, Any] | None = None
    """In its place: an OpenAI-compatible API (base_url, model, api, api_key_env, timeout, ...)."""
    space: Annotated[Named, _short("name")] | None = None
    """What of it is trained; None: as the recipe's `space` (of an encoder for its vectors: its head)."""
    sealed: bool = False
    """A black box: it answers, and nothing of it can be read or trained."""
    task: Literal["generation", "classification", "embedding"] | None = None
    """What it is for; None: the data's task, or embedding for an encoder beside language models."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """None: as the main model's."""
    quantize: Literal["nf4", "int8"] | None = None
    """As `model.quantize`; None: not packed."""
    pooling: Literal["mean", "cls", "last"] | None = None
    """None: as the main model's."""
    prices: Annotated[list[Annotated[float, Field(ge=0, le=1e6)]], Field(min_length=2, max_length=2)] | None = None
    """What a million tokens cost that it reads, and a million that it says: the ledger then has what it cost."""

    @model_validator(mode="after")
    def _one_of_both(self) -> NamedModel:
        if (self.name is None) == (self.endpoint is None):
            raise ValueError("give either name or endpoint")
        if self.endpoint is not None and (self.space or self.sealed or self.task or self.dtype or self.pooling
                                          or self.quantize):
            raise ValueError("an endpoint has no space, sealed, task, dtype, quantize or pooling: it continues text")
        return self


class Data(DataSpec):
    """Where rows come from, what they become, who holds which, and which tokens are learned."""

    completion_only: bool = True
    """Learn the response's tokens alone; false: the prompt's too."""
    canaries: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Random rows made for each client, of which coins plant half: what `fedllm audit` then looks for."""
    canary_copies: Annotated[int, Field(ge=1, le=10_000)] = 1
    """How often each planted canary stands among its client's rows."""


class ClientsSpec(Spec):
    """Who takes part in a round, and what clients declare about themselves."""

    per_round: Share = 1.0
    """Clients drawn each round: a share (1.0: all) or a count."""
    quorum: Share = 1
    """Answers that are enough: a share of those asked, or a count."""
    deadline: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which an answer no longer counts."""
    ranks: list[Count] | None = None
    """LoRA ranks, dealt to the clients in order and over again."""
    models: Names | None = None
    """Models that clients hold in the place of the main one, dealt in order and over again: names of `models`, ids or
    folders."""
    profiles: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What single clients declare: rank, model, speed, memory_bytes, bandwidth, latency, availability, dropout, device,
    link, modality, privacy, domain."""
    availability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that a client answers when asked, where its profile does not say."""
    speed: Law = 1.0
    """Relative compute speed: a number for all, a list dealt in order, {lognormal: sigma}, {uniform: [low, high]} or
    {choice: [...]}, drawn once a client."""
    bandwidth: Law | None = None
    """Bytes a second, up and down; as for speed, with a lognormal around 1e6. None: messages take no time."""
    latency: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that each message is under way beside what its bytes take."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a client is lost while it works."""
    step_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds of one local step at speed 1. Given, time in a simulation is virtual (deadlines too): worked out from
    what clients declare. None: time is real."""
    day_seconds: Annotated[float, Field(gt=0)] = 86400.0
    """Length of a client's day in virtual seconds; each begins at an hour of its own."""
    day_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of its day in which a client is there to be asked."""


class EnergySpec(Spec):
    """What joules are worked out from; given, a run tells tokens a joule and where the energy went."""

    device: str | Names | dict[str, Any] = "laptop"
    """What clients compute on: phone, raspberry_pi, jetson_orin, laptop, gpu_server; a list of these, dealt in order;
    or a mapping of flops (peak), active_watts, idle_watts."""
    link: str | Names | dict[str, Any] = "wifi"
    """How they reach the server: wifi, lte, 5g, lan; a list of these, dealt in order; or a mapping of bandwidth
    (bytes/s), latency (s), up, down (joules a bit). clients.bandwidth and latency go before it."""
    server_device: str | dict[str, Any] = "gpu_server"
    """What the server computes on."""
    server_link: str | dict[str, Any] = "lan"
    """The server's own end of the line, of which only joules a bit count."""
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of a device's peak that training reaches, where no clients.step_seconds says how long a step takes."""
    measure: bool = False
    """Read RAPL and NVML around each client's work; for clients on machines of their own, or one at a time."""


class EngineSpec(Spec):
    """How client work is run."""

    kind: Literal["in_process", "vectorized", "ray", "flare", "flower"] = "vectorized"
    """One client at a time, many in one forward and backward, many on each worker of a Ray cluster; for
    `fedllm serve` the engine of a real federation: flare (NVFlare) or flower."""
    workers: Annotated[int, Field(ge=1, le=4096)] = 2
    """Workers of the Ray cluster (kind ray): each holds the model and has `threads` cores."""
    address: str | None = None
    """A running Ray cluster's address, or auto (kind ray); without it one is started on this machine for the run."""
    batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Most tokens in one step over all clients together; auto: what the model's own sizes and the machine's memory
    allow, training, testing and generating each by its own need, and never more than 16384."""
    threads: Annotated[int, Field(ge=1, le=4096)] = 1
    """Threads of one operation on the CPU. The last bits of a result depend on it, so the recipe says it."""
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that train each client together, each with its shard of the model (FSDP2) and its share of a batch's
    rows, beside the run's own (kind in_process; a site of a federation says its own: `fedllm join --processes`)."""
    loopback: bool = False
    """Turn every message into bytes and back, as a network would."""

    @model_validator(mode="after")
    def _one_client_at_a_time(self) -> EngineSpec:
        if self.processes > 1 and self.kind != "in_process":
            raise ValueError(f"processes = {self.processes}: several processes train one client at a time, and kind is "
                             f"'{self.kind}'; allowed is kind in_process (a site of a federation says its own: `fedllm "
                             "join --processes`)")
        return self

    @property
    def step_tokens(self) -> int | None:
        """`batch_tokens` as a number; None for auto."""
        return None if isinstance(self.batch_tokens, str) else self.batch_tokens


class EvaluateSpec(Spec):
    """When and how the model is tested."""

    every: Count | None = None
    """Also after every so many rounds; always before the first and after the last."""
    keep_best: bool = False
    """End with the tested round of the lowest loss on the clients' own test rows (on the global test where they keep
    none), in place of the last round."""
    patience: Count | None = None
    """End the run after so many tests in a row in which that loss was no better than before; None: never."""
    exact_match: bool = True
    """Generate answers and compare them (generation tasks)."""
    metric: str | list[str] = "exact"
    """When a generated answer is right, or a list of such: exact (all of it, up to white space), last_number (the one
    after `####`, or the last), choice (a letter; of rows with `choices` the likeliest option too), rouge (ROUGE-L), or
    call:module:function, a function of (said, wanted) that gives True, False or a number from 0 to 1."""
    max_new_tokens: Count = 32
    """Longest answer, in tokens."""

    @field_validator("metric")
    @classmethod
    def _metric_is_known(cls, value: str | list[str]) -> str | list[str]:
        listed(value)
        return value

    baselines: list[Literal["local_only", "centralized"] | Rule] = Field(default_factory=list)
    """Methods to run beside this one on the same work, and rules without a model of the data's task: persistence,
    linear_ar (forecast), popularity, item_knn (next_item). A rule learns from all clients' rows for the
    global test, and from a client's own for its. In environments: random, and the environment's own habits
    (equal_share, proportional of env:edge_vr)."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Test prompts whose answers are kept, before and after; of an image run its pictures."""
    pictures: Literal["open", "private", "none"] = "open"
    """Whose pictures the record and the report of an image run show: those of public rows and of rows that a source
    makes (`sim:NAME`); with `private` those of the global test, or of clients' own tests, in their place."""
    clients: bool = True
    """Test on each client's own held-out rows too."""


class RecordSpec(Spec):
    """What the run folder keeps."""

    replies: bool = False
    """Keep every reply, so that `fedllm replay` can fold them another way."""
    checkpoint_every: Count = 1
    """Rounds from one checkpoint to the next."""
    keep_rounds: bool = False
    """Keep every checkpoint, so that `fedllm export --round N` hands out the model of any of them; else the last few
    alone are kept."""


class Plugin(Spec):
    """A Python file that holds a method, layer, space or selector of one's own; its stem is the name."""

    file: str
    """Path of the file; it is run when the recipe is read."""
    sha256: str | None = None
    """Written into a run's own recipe: what the file was. A run goes on with no other."""


class Recipe(Spec):
    """All that a run depends on."""

    name: str = "run"
    """Name of the run, and of its folder."""
    model: Annotated[ModelSpec, _short("name")] = Field(default_factory=ModelSpec)
    models: dict[str, Annotated[NamedModel, _short("name")]] = Field(default_factory=dict)
    """Further models by name, for client functions (`client.models["teacher"]`) and for clients to hold."""
    data: Annotated[Data, _short("source")] = Field(default_factory=Data)
    method: Annotated[Named, _short("name")] = Field(default_factory=lambda: Named(name="fedavg"))
    """The method and its knobs (`fedllm methods` lists them)."""
    space: Annotated[Named, _short("name")] = Field(default_factory=lambda: Named(name="lora"))
    """What of the model is trained: lora, full, ia3, prefix, soft_prompt, head, ... and its knobs."""
    local: dict[str, Any] = Field(default_factory=dict)
    """Knobs of a client's training: optimizer, lr, steps or epochs, batch_size, ..."""
    layers: list[Annotated[Named, _short("name")]] = Field(default_factory=list)
    """Privacy, compression, attacks and defenses, from the method down to the wire."""
    clients: ClientsSpec = Field(default_factory=ClientsSpec)
    select: Annotated[Named, _short("name")] = Field(default_factory=lambda: Named(name="uniform"))
    """Who of the clients is asked in a round, for any method."""
    energy: EnergySpec | None = None
    """Meter the run: devices, links, and whether to read the machine's own counters."""
    rounds: Annotated[int, Field(ge=0, le=10**6)] = 10
    """Rounds of the run; 0 tests the model as it is."""
    stages: Annotated[list[Stage], Field(min_length=1)] | None = None
    """Runs one after another in one folder: each has a `name`, the recipe's keys that it changes, and begins with what
    the one before ended with (`start: NAME` of an earlier one, or `base`); with `judges: NAME` the judges of two
    answers that an earlier one trained label its pairs. None: one run."""
    engine: Annotated[EngineSpec, _short("kind")] = Field(default_factory=EngineSpec)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of every draw: equal recipe and seed give an equal state."""
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    record: RecordSpec = Field(default_factory=RecordSpec)
    track: Annotated[list[str], AfterValidator(known)] = Field(default_factory=list)
    """Trackers that are told the run's figures: tensorboard, mlflow, wandb, trackio (each an extra of its name)."""
    plugins: list[Annotated[Plugin, _short("file")]] = Field(default_factory=list)
    """Files with parts of one's own. The sites of a real federation load none: there a part is installed."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Written into a run's own recipe: what it ran with. Not read."""


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe from a YAML path, a mapping or a recipe; `overrides` maps key paths to values.

    Its plugin files are loaded; those in `overrides` come beside the recipe's own. Raises RecipeError with one line for
    each thing that is wrong.
    """
    return armed(read_recipe(source, overrides))


def read_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The same, of which nothing is loaded or run: whoever's it is, reading it does no harm."""
    if isinstance(source, Recipe):
        raw = source.model_dump()
    elif isinstance(source, Mapping):
        raw = dict(source)
    else:
        raw = {"name": Path(source).stem, **read_yaml(Path(source))}
    for key, value in (overrides or {}).items():
        beside = key == "plugins" and isinstance(value, list | tuple) and isinstance(raw.get(key, []), list)
        edit(raw, key, [*raw.get(key, []), *value] if beside else value)
    check_values(raw)
    fill(raw)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(complaints(Recipe, error.errors())) from None
    if recipe.name in ("", ".", "..") or not all(c.isalnum() or c in "-_.+ " for c in recipe.name):
        raise RecipeError(f"name = {recipe.name!r}: allowed are letters, digits, spaces and - _ . +")
    return recipe


def armed(recipe: Recipe) -> Recipe:
    """The recipe with what it names loaded: plugin files, and the functions of one's own that judge."""
    files = plugged([(p.file, p.sha256) for p in recipe.plugins])
    judges_of(recipe.evaluate.metric)
    return recipe.model_copy(update={"plugins": [Plugin(**f) for f in files]})
