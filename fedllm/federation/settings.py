"""A site's own settings: its data, what may run there, and what may leave. They never leave either."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.core.errors import RecipeError
from fedllm.data.spec import Spec
from fedllm.federation.declared import Declared
from fedllm.runs.device import Device

if TYPE_CHECKING:  # `join` lives as long as a site does and reads settings: it loads no model code
    from fedllm.engines.far.leaving import Words
    from fedllm.engines.far.reasons import Refused

SETTINGS = "fedllm.json"
SCENE = "env:"
"""How `data` begins where a site has an environment in the place of rows."""

class EndpointSetting(BaseModel):
    """A model behind an OpenAI-compatible API that this site's own rows may be sent to."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: str
    """Its address, up to and with the version."""
    model: str = "local"
    """The model's name there."""
    key_env: str | None = None
    """NAME of the environment variable of this site that holds its key."""


class SiteSettings(Spec):
    """A site's own file, `local/fedllm.json` in its kit: what the organisation allows."""

    model_config = ConfigDict(strict=False)

    data: str
    """A file or folder with this site's rows; or env:NAME, an environment in their place."""
    store: str
    """Folder for what the client remembers between rounds and runs."""
    methods: list[str] | None = None
    """Ids of the methods that may run here; None: every installed one that the other settings let pass."""
    models: list[str] = Field(default_factory=list)
    """Folders that models and adapters may be read from; embedded models need none."""
    hosts: list[str] = Field(default_factory=list)
    """Hosts that this site's work may reach beside its coordinator: `huggingface.co` for Hub ids, an endpoint's."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """This site's own environment, where `data` is env:NAME: its parameters, `max_steps`, and the rules of its tools
    (`may`, `mcp`, `seconds`, `calls`, `characters`, `record`, `replay`). A coordinator's are never used."""
    keys: str | None = None
    """This site's own folder of identity keys, for layers that use them (secagg, ring_all_reduce). None: none."""
    endpoint: EndpointSetting | None = None
    """The endpoint that this site's text may be put to: asked in the place of whatever address the recipe names."""
    model: str | None = None
    """Which model this site holds in the place of the run's: a name of the recipe's `models`, embedded, minilm, a
    folder of its own, or a Hub id; None: what the recipe says. Methods that need one model everywhere are refused."""
    public: str | None = None
    """A copy of the run's public rows, which need then not be sent; it is used if its hash is the run's."""
    profile: Declared = Field(default_factory=dict)
    """What this site declares: rank, memory_bytes, bandwidth, speed, latency, availability, dropout, device, link,
    modality, privacy, domain, and in `shares` what its answers to a query hold (snippets, ids, scores, counts)."""
    text_leaves: bool = False
    """Whether a reply may hold text, or the tokens of one. Text leaves through the gate alone: the run must have the
    layer responsible_gate, and what it finds stands in `gate.jsonl` of the store."""
    gate: dict[str, Any] = Field(default_factory=dict)
    """What the gate demands here, by the knobs of responsible_gate (`copies: withhold`, `patterns: [...]`); of this and
    what the run demands the stricter counts, and of patterns these alone."""
    gate_detector: str | None = None
    """A function (`module:function`) of this site's that finds personal data: text -> [(begin, end, TYPE), ...]."""
    metrics: list[str] = Field(default_factory=list)
    """Functions (`module:function`) that a recipe's evaluate.metric may call here on what the model says; none else."""
    tests_leave: bool | None = None
    """Whether test figures on held-out rows may leave; None: yes, but not under a budget of privacy (most_epsilon)."""
    most_bytes: int | None = Field(default=None, ge=1)
    """Bytes of the largest reply that may leave; None: any."""
    spaces: list[str] | None = None
    """Ids of the spaces that may be trained here (`[lora]`: LoRA only); None: any."""
    layers: list[str] = Field(default_factory=list)
    """Ids of layers that a run must have, all of them."""
    most_epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest privacy budget of this site's rows, over all runs, by its own ledger. A run must then have a layer of
    differential privacy; None: no such layer is needed."""
    most_delta: float = Field(default=1e-5, gt=0, lt=1)
    """The delta at which this site's ledger adds up; a layer with a larger one is refused."""
    least_noise: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Smallest noise multiplier of a layer of differential privacy that these settings ask for."""
    noise_by_coordinator: bool = False
    """Whether a layer whose noise the coordinator adds (dp_fedavg, dp_ftrl) is enough: then it is trusted to add it."""
    most_rounds: int | None = Field(default=None, ge=1)
    """Rounds that this site answers in one run, by its own count; None: any."""
    rounds_in_all: int | None = Field(default=None, ge=1)
    """The same over all runs."""
    most_queries: int | None = Field(default=None, ge=1)
    """Queries over its documents that this site answers, over all runs, by its own count; None: any."""
    most_steps: int = Field(default=100_000, ge=1)
    """Training steps of one answer."""
    most_tokens: int = Field(default=200_000_000, ge=1)
    """Tokens that the model reads and says for one answer."""
    most_seconds: float = Field(default=3600.0, gt=0)
    """Seconds of one answer."""
    most_memory_bytes: int | None = Field(default=None, ge=1)
    """Memory that the site's process may hold; looked at before each step."""
    steps_in_all: int | None = Field(default=None, ge=1)
    """Training steps over all runs."""
    tokens_in_all: int | None = Field(default=None, ge=1)
    """Tokens over all runs."""
    seconds_in_all: float | None = Field(default=None, gt=0)
    """Seconds of work over all runs."""
    task: str | None = None
    """What rows are for here (`data.task`)."""
    fields: dict[str, str | list[str]] | None = None
    """fedllm's names of fields and the columns that hold them here."""
    template: str | dict[str, str] | None = None
    """What makes prompt and response here."""
    labels: list[str] | None = None
    """The labels of this site's rows."""
    rows_may_change: bool = False
    """Whether each run may say anew how rows are shaped (task, fields, template, labels) where it is not said here. If
    not, the first run that asks fixes it for good (`shape.json` in the store)."""
    trust_remote_code: bool = False
    """Whether a run may execute Python code that comes with a Hub model."""
    same_packages: list[str] = Field(default_factory=lambda: ["fedllm", "torch", "transformers", "peft"])
    """Packages whose versions must be the coordinator's."""
    device: Device = "auto"
    """What the model computes on here: auto (the first CUDA card, or else the CPU), cpu, cuda, or cuda:N."""
    threads: int = Field(default=1, ge=1)
    """Threads of the model; another number rounds another way."""
    processes: int = Field(default=1, ge=1, le=64)
    """Processes of this machine that train together, each with its shard of the model; nobody else hears of it."""

    @classmethod
    def read(cls, path: Path) -> SiteSettings:
        """The settings in a file; RecipeError when they are missing or wrong."""
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, ValidationError) as error:
            raise RecipeError(f"{path}: {error}") from None

    @classmethod
    def make(cls, values: Mapping[str, Any], policy: str | Path | None = None) -> SiteSettings:
        """Settings from values and from a site's policy file (YAML), which wins; RecipeError names what is wrong."""
        try:
            said = yaml.safe_load(Path(policy).read_text(encoding="utf-8")) if policy is not None else {}
            if not isinstance(said, Mapping):
                raise ValueError(f"allowed is a mapping of these keys: {', '.join(cls.model_fields)}")
            return cls.model_validate({**values, **said})
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"{policy or 'the settings of this site'}: {error}") from None

    @classmethod
    def settle(cls, kit: Path, address: str, target: str, data: str | Path, *, methods: Sequence[str] | None,
               models: Sequence[str], store: str | Path | None, policy: str | Path | None, **settings: Any) -> None:
        """Write what `join` was told into the kit; RecipeError when `address` is not the kit's own, `target`."""
        if address != target:
            raise RecipeError(f"address {address!r}: the kit {kit} was made for {target!r}")
        here = {k: str(Path(v).resolve()) for k in ("model", "public") if (v := settings.get(k)) and Path(v).exists()}
        where = str(data) if str(data).startswith(SCENE) else str(Path(data).resolve())
        mine = cls.make({"data": where, "store": str(Path(store or kit / "memory").resolve()),
                         "methods": None if methods is None else list(methods),
                         "models": [str(Path(m).resolve()) for m in models], **settings, **here}, policy)
        if mine.environment:
            mine.own_environment()
        if mine.gate or mine.gate_detector:
            from fedllm.federation.gated import demanded

            demanded(mine.gate, mine.gate_detector)
        fresh = kit / "local" / f".{SETTINGS}"
        with open(fresh, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(json.dumps(mine.model_dump(), indent=2))
        fresh.replace(kit / "local" / SETTINGS)

    @property
    def acts(self) -> bool:
        """Whether this site has an environment in the place of rows."""
        return self.data.startswith(SCENE)

    def own_environment(self) -> dict[str, Any]:
        """The environment as a recipe has it, of one client; RecipeError names what is not allowed."""
        from fedllm.data.scenes import EnvironmentSpec, scene_rows

        if not self.acts:
            raise RecipeError(f"environment = {self.environment}: data = {self.data!r} are rows; allowed with it is "
                              f"{SCENE}NAME")
        try:
            spec = EnvironmentSpec.model_validate({**self.environment, "clients": 1})
        except ValidationError as error:
            raise RecipeError(f"environment: {error}") from None
        scene_rows(self.data, spec, 0)
        return spec.model_dump(mode="json")

    @property
    def tests(self) -> bool:
        """Whether test figures leave."""
        return self.most_epsilon is None if self.tests_leave is None else self.tests_leave

    def forbids(self, recipe: Any, layers: Sequence[Any], noise: float | None = None) -> Refused | None:
        """Why this site takes no part in a run of this recipe with these layers, or None. `noise` is that of the counts
        that the method answers queries with, where it does."""
        from fedllm.engines.far.reasons import Refused

        odd = [] if self.spaces is None else [s for s in trained(recipe) if s not in self.spaces]
        if odd:
            only = ", ".join(self.spaces or ()) or "nothing"
            return Refused("space", f"space.name = '{odd[0]}': this site trains {only} only")
        if missing := [n for n in self.layers if n not in [layer.name for layer in recipe.layers]]:
            return Refused("layers", f"layers: this site takes part under {', '.join(missing)} only")
        if beside := self._beside(recipe, layers):
            return Refused("layers", beside)
        if self.most_rounds is not None and recipe.rounds > self.most_rounds:
            return Refused("rounds", f"rounds = {recipe.rounds}: this site takes part in {self.most_rounds} at most",
                           allowed=self.most_rounds)
        private = [layer for layer in layers if layer.algebra.kind == "dp"]
        names = [layer.name for layer in recipe.layers]
        for name, layer in zip(names, layers, strict=False):
            if layer in private and (self.most_epsilon is not None or name in self.layers) and (
                    why := self._too_little(name, layer)):
                return Refused("noise", why)
        if noise is not None and self.profile.get("shares") == "counts":
            few = f"method.noise_multiplier = {noise:g}: least_noise = {self.least_noise:g} here"
            return Refused("noise", few) if noise < self.least_noise else None
        return self._no_budget(private)

    def _beside(self, recipe: Any, layers: Sequence[Any]) -> str | None:
        """Why a run has a layer that no site wants, or that lets out figures of rows beside those it asks for."""
        names = [layer.name for layer in recipe.layers]
        protected = self.layers or self.most_epsilon is not None
        for i, layer in enumerate(layers):  # behind the recipe's own stands a selector that hears of clients
            name = names[i] if i < len(names) else recipe.select.name
            if layer.algebra.kind == "attack":
                return f"{name} is an attack, and this site's rows are no simulation"
            if protected and layer.algebra.reads and name not in self.layers:
                return f"{name} lets out figures that it reads from rows beside what the run hides"
        return None

    def _too_little(self, name: str, layer: Any) -> str | None:
        """Why this layer's noise protects nobody."""
        if layer.seed is not None:
            return f"{name}.seed = {layer.seed}: whoever knows the recipe can take the noise off"
        if layer.noise_multiplier is not None and layer.noise_multiplier < self.least_noise:
            return f"{name}.noise_multiplier = {layer.noise_multiplier:g}: least_noise = {self.least_noise:g} here"
        if layer.delta is not None and layer.delta > self.most_delta:
            return f"{name}.delta = {layer.delta:g}: most_delta = {self.most_delta:g} here"
        return None

    def _no_budget(self, private: Sequence[Any]) -> Refused | None:
        """Why these layers of differential privacy do not keep within this site's budget."""
        from fedllm.engines.far.reasons import Refused

        if self.most_epsilon is None:
            return None
        asks = f"this site asks for a layer of differential privacy with an epsilon of {self.most_epsilon:g} at most " \
               "(most_epsilon)"
        if not private:
            return Refused("epsilon", f"{asks}; it has none")
        here = [layer for layer in private
                if layer.algebra.needs != "sum" or layer.algebra.shares or self.noise_by_coordinator]
        if not here:
            return Refused("epsilon", f"{asks}, and its noise would be the coordinator's (noise_by_coordinator)")
        budgets = [layer.epsilon for layer in here]
        if not any(b is not None and b <= self.most_epsilon for b in budgets):
            return Refused("epsilon", f"{asks}; its budgets are {budgets}")
        return None

    def may(self, way: str, payload: Mapping[str, Any], words: Words | None = None, sealed: bool = False,
            tells: Sequence[str] = ()) -> str | None:
        """Why a payload may not pass here, or None; `words` are those of the protocol itself (`far.leaving`)."""
        if way == "down" or self.text_leaves:
            return None
        from fedllm.engines.far.leaving import Words, held_back

        why = held_back(payload, words or Words.of((), ()), sealed, tells)
        return f"{why}, and this site lets no text leave (text_leaves = false)" if why else None

    def too_large(self, payload: Mapping[str, Any]) -> str | None:
        """Why a payload is larger than may leave, or None."""
        from fedllm.wire import codec

        if self.most_bytes is not None and (size := codec.size(payload)) > self.most_bytes:
            return f"the reply has {size} bytes, this site allows {self.most_bytes}"
        return None


def trained(recipe: Any) -> list[str]:
    """Ids of the spaces that a recipe trains: its own, or those of its streams."""
    of = recipe.space.knobs.get("of")
    if not isinstance(of, Mapping):
        return [recipe.space.name]
    return [str(s.get("name")) if isinstance(s, Mapping) else str(s) for s in of.values()]
