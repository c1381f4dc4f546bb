"""The sections of a recipe, each with its keys, their ranges and what they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from fedllm.data.section import DataSpec
from fedllm.data.spec import Spec
from fedllm.runs.device import Device
from fedllm.runs.laws import Law, Names, Share, short
from fedllm.tasks.answers import listed

OWN = "each site's own"
"""Stands in a federation's recipe where a simulation's names the source of its rows."""
Rule = Literal["persistence", "linear_ar", "popularity", "item_knn", "random", "equal_share", "proportional"]
Count = Annotated[int, Field(ge=1, le=10**9)]
LONG = 1e9
"""Seconds: some thirty years."""
Pair = Annotated[list[Annotated[int, Field(ge=2, le=4096)]], Field(min_length=2, max_length=2)]


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
    shape: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Keys of the model's config that are to be otherwise (hidden_size, num_hidden_layers, tie_word_embeddings, ...),
    as its config calls them; with weights: random."""
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
    space: Annotated[Named, short("name")] | None = None
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
    deadline: Annotated[float, Field(gt=0, le=LONG)] | None = None
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
    latency: Annotated[float, Field(ge=0, le=LONG)] = 0.0
    """Seconds that each message is under way beside what its bytes take."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a client is lost while it works."""
    step_seconds: Annotated[float, Field(gt=0, le=LONG)] | None = None
    """Seconds of one local step at speed 1. Given, time in a simulation is virtual (deadlines too): worked out from
    what clients declare. None: time is real."""
    day_seconds: Annotated[float, Field(gt=0, le=LONG)] = 86400.0
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
    utilization: Annotated[float, Field(ge=1e-6, le=1)] = 0.3
    """Share of a device's peak that training reaches, where no clients.step_seconds says how long a step takes."""
    measure: bool = False
    """Read RAPL and NVML around each client's work; for clients on machines of their own, or one at a time."""


class EngineSpec(Spec):
    """How client work is run."""

    kind: Literal["in_process", "vectorized", "ray", "flare", "flower", "academy"] = "vectorized"
    """One client at a time, many in one forward and backward, many on each worker of a Ray cluster; for
    `fedllm serve` the engine of a real federation: flare (NVFlare), flower or academy (Academy's agents)."""
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
