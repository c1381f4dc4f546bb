"""A site's own settings: its data, what may run there, and what may leave. They never leave either."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.core.errors import RecipeError
from fedllm.runs.device import Device

SETTINGS = "fedllm.json"


class SiteSettings(BaseModel):
    """A site's own file, `local/fedllm.json` in its kit: what the organisation allows."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data: str
    """A file or folder with this site's rows."""
    store: str
    """Folder for what the client remembers between rounds and runs."""
    methods: list[str] | None = None
    """Ids of the methods that may run here; None: every installed one."""
    models: list[str] = Field(default_factory=list)
    """Folders that models and adapters may be read from; embedded models and Hub ids need none."""
    model: str | None = None
    """Which model this site holds in the place of the run's: a name of the recipe's `models`, embedded, minilm, a
    folder of its own, or a Hub id; None: what the recipe says. Methods that need one model everywhere are refused."""
    endpoints: list[str] = Field(default_factory=list)
    """Addresses (base_url) of text endpoints that this site's text may be put to; a run that asks others is refused."""
    public: str | None = None
    """A copy of the run's public rows, which need then not be sent; it is used if its hash is the run's."""
    profile: dict[str, Any] = Field(default_factory=dict)
    """What this site declares: rank, memory_bytes, bandwidth, modality, privacy."""
    text_leaves: bool = True
    """Whether a reply may hold text."""
    most_bytes: int | None = Field(default=None, ge=1)
    """Tensor bytes of the largest reply that may leave; None: any."""
    spaces: list[str] | None = None
    """Ids of the spaces that may be trained here (`[lora]`: LoRA only); None: any."""
    layers: list[str] = Field(default_factory=list)
    """Ids of layers that a run must have, all of them."""
    most_epsilon: float | None = Field(default=None, gt=0)
    """A run must have a layer of differential privacy that keeps within this budget; None: no such layer is needed."""
    most_rounds: int | None = Field(default=None, ge=1)
    """Rounds of the longest run that this site takes part in; None: any."""
    trust_remote_code: bool = False
    """Whether a run may execute Python code that comes with a Hub model."""
    same_packages: list[str] = Field(default_factory=lambda: ["fedllm", "torch", "transformers", "peft"])
    """Packages whose versions must be the coordinator's."""
    device: Device = "auto"
    """What the model computes on here: auto (the first CUDA card, or else the CPU), cpu, cuda, or cuda:N."""
    threads: int = Field(default=1, ge=1)
    """Threads of the model; another number rounds another way."""

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
                raise ValueError("allowed is a mapping of keys, as in docs/federation.md")
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
        mine = cls.make({"data": str(Path(data).resolve()), "store": str(Path(store or kit / "memory").resolve()),
                         "methods": None if methods is None else list(methods),
                         "models": [str(Path(m).resolve()) for m in models], **settings, **here}, policy)
        (kit / "local" / SETTINGS).write_text(json.dumps(mine.model_dump(), indent=2))

    def forbids(self, recipe: Any, layers: Sequence[Any]) -> str | None:
        """Why this site takes no part in a run of this recipe with these layers, or None."""
        if why := self.closed("method.endpoint", recipe.method.knobs.get("endpoint")):
            return why
        odd = [] if self.spaces is None else [s for s in trained(recipe) if s not in self.spaces]
        if odd:
            return f"space.name = '{odd[0]}': this site trains {', '.join(self.spaces or ()) or 'nothing'} only"
        if missing := [n for n in self.layers if n not in [layer.name for layer in recipe.layers]]:
            return f"layers: this site takes part under {', '.join(missing)} only"
        if self.most_rounds is not None and recipe.rounds > self.most_rounds:
            return f"rounds = {recipe.rounds}: this site takes part in {self.most_rounds} at most"
        budgets = [getattr(layer, "epsilon", None) for layer in layers if layer.algebra.kind == "dp"]
        if self.most_epsilon is not None and not any(b is not None and b <= self.most_epsilon for b in budgets):
            has = f"its budgets are {budgets}" if budgets else "it has none"
            return (f"this site asks for a layer of differential privacy with an epsilon of {self.most_epsilon:g} at "
                    f"most (most_epsilon); {has}")
        return None

    def closed(self, key: str, address: str | None) -> str | None:
        """Why no text of this site may be put to the endpoint at this address, or None."""
        opened = [a.rstrip("/") for a in self.endpoints]
        if address is None or address.rstrip("/") in opened:
            return None
        return (f"{key} = {address!r}: this site's text may not be put to that endpoint (it opened "
                f"{', '.join(opened) or 'none'}; `fedllm join --endpoint ADDRESS` opens one)")

    def may(self, way: str, payload: Mapping[str, Any]) -> str | None:
        """Why a payload may not pass here, or None."""
        if way == "down":
            return None
        text = next((k for k, v in payload.items() if isinstance(v, str) or
                     (isinstance(v, list) and any(isinstance(x, str) for x in v))), None)
        if text is not None and not self.text_leaves:
            return f"'{text}' is text, and this site lets no text leave (text_leaves = false)"
        if self.most_bytes is not None:
            from fedllm.core.payload import tensor_bytes

            if (size := tensor_bytes(payload)) > self.most_bytes:
                return f"the reply has {size} bytes of tensors, this site allows {self.most_bytes}"
        return None


def trained(recipe: Any) -> list[str]:
    """Ids of the spaces that a recipe trains: its own, or those of its streams."""
    of = recipe.space.knobs.get("of")
    if not isinstance(of, Mapping):
        return [recipe.space.name]
    return [str(s.get("name")) if isinstance(s, Mapping) else str(s) for s in of.values()]
