"""The protocol of a trainable subspace, and the stack that its patched modules read.

One forward serves K clients ("lanes"): rows of lane k are rows [k*B, (k+1)*B) of the batch, and every trainable
tensor carries a leading K. One client at a time is the same code with K = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedllm.core.errors import ModelError
from fedllm.core.knobs import Knobs
from fedllm.core.layer import name_of
from fedllm.core.payload import Tree

CAUSAL = ("generation", "preference")
"""Tasks whose network is a causal language model, which PEFT saves as such."""
PEFT = "base_model.model."
"""The prefix that PEFT gives to the names of an adapted model's tensors in a saved adapter."""


@dataclass
class Stack:
    """What patched modules read during one forward: the lanes' trainables, stacked, and the shared base drift."""

    k: int = 1
    rows: int = 1  # of the batch: K * B
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [K, ...]
    base: Mapping[str, Tensor] = field(default_factory=dict)  # weight name -> dense delta [o, i], shared by all lanes
    extra: dict[str, Any] = field(default_factory=dict)
    quick: bool = True  # whether forms of our own may take the place of a module's forward
    causal: bool = False  # whether a token may see only those before it
    mask: Tensor | None = None  # [K*B, T] bool: which positions of this forward are text, for spaces that mix tokens
    past: dict[str, Tensor] | None = None  # while a model generates: what such spaces keep from token to token
    noise: Any = None  # while a client trains with dropout or NEFTune: what it draws (`local/noise.py`)

    def lanes(self, x: Tensor) -> Tensor:
        """[K*B, ..., d] -> [K, B*..., d], without a copy."""
        return x.reshape(self.k, -1, x.shape[-1])


class Space(Knobs):
    """A trainable subspace. Trainables are a flat tree in PEFT's naming; lanes may differ in rank where `ragged`."""

    ragged: ClassVar[bool] = False
    """True when clients' tensors may differ in size and are padded with zeros to be stacked."""
    multiplies: ClassVar[bool] = True
    """Whether each token is multiplied by the trainable matrices; prompts are only looked at."""
    takes_base: ClassVar[bool] = False
    """True when the space can add a drift to the frozen base weights (FLoRA, FedEx-LoRA)."""
    stays: ClassVar[str] = "it does not say how"
    """Why trainables cannot be merged into the network's weights; empty where `merge` does it."""
    over_packed: ClassVar[bool] = False
    """Whether it works over a base whose weights are packed in few bits (`model.quantize`)."""
    by_token: ClassVar[bool] = False
    """Whether it does to each token the same, whatever lies beside it."""
    peft: ClassVar[str] = ""
    """PEFT's name for adapters of this kind ("LORA"); empty where PEFT has none."""
    personal: ClassVar[tuple[str, ...]] = ()
    """Names of its streams that never leave a client."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Names of its streams that nobody trains."""

    def start(self, net: nn.Module, rng: torch.Generator, rank: int | None = None) -> Tree:
        """Fresh trainables in fp32; `rank` overrides the knob where the space has one."""
        raise NotImplementedError

    def install(self, net: nn.Module, stack: Stack) -> bool:
        """Patch the modules of `net` to read `stack`; returns whether K > 1 lanes can run in one forward."""
        raise NotImplementedError

    def prepare(self, stack: Stack, trees: Sequence[Mapping[str, Tensor]]) -> None:
        """Note what depends on each lane's own shapes (LoRA: alpha / rank) before a forward."""

    def before(self, net: nn.Module, stack: Stack, rows: int) -> Prompt | None:
        """What is put in front of `rows` sequences, for the prompt spaces."""
        return None

    def classes(self, net: nn.Module, stack: Stack, batch: Any) -> Tensor | None:
        """Class logits [N, C] of an image-text model, for spaces that make its prompts; None: as the model does."""
        return None

    @property
    def virtual(self) -> int:
        """Virtual tokens that pass through the network in front of each row."""
        return 0

    @property
    def places(self) -> int:
        """Places before the text that are taken, by virtual tokens or by keys and values that no token made."""
        return self.virtual

    @property
    def beside_patches(self) -> int:
        """Tokens that it puts among a picture's patches."""
        return 0

    @property
    def draws(self) -> bool:
        """Whether something is drawn while it trains (dropout)."""
        return False

    def trains(self, name: str) -> bool:
        """Whether the parameter `name` of the network itself is replaced by a trainable."""
        return False

    def multiplied(self, name: str) -> bool:
        """Whether each token is multiplied by this trainable."""
        return self.multiplies

    def place(self, name: str) -> str:
        """A trainable's name as the network itself would have it, so that it begins with its module's path."""
        return name.removeprefix(PEFT)

    def composes(self, net: nn.Module) -> Collection[str]:
        """Paths of modules of which it takes the output as it is: there it may lie over another stream, exactly."""
        return ()

    def idle(self, net: nn.Module, theta: Mapping[str, Tensor]) -> bool:
        """Whether the network with these trainables is just the network without them."""
        return False

    def merge(self, net: nn.Module, theta: Mapping[str, Tensor]) -> None:
        """Write the trainables into the weights of `net`, which carries no patches of ours; see `stays`."""
        raise ModelError(f"space '{self.stem}' cannot be merged into the model's weights: {self.stays}; export what it "
                         "trained as it is with --peft")

    def peft_config(self, net: nn.Module, task: str) -> Any:
        """The PEFT config with which a saved adapter loads in plain `peft`, or None where PEFT has no such method."""
        return None

    def to_peft(self, net: nn.Module, task: str, theta: Mapping[str, Tensor]) -> tuple[Any, Tree] | None:
        """Config and tensors of a PEFT adapter that computes what `theta` does, or None where PEFT has no such one."""
        config = self.peft_config(net, task)
        return None if config is None else (config, dict(theta))

    @classmethod
    def peft_knobs(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The knobs with which an adapter of this config (as JSON) was made."""
        raise ModelError(f"space '{name_of(cls)}' says no knobs for a PEFT config")

    def from_peft(self, config: Mapping[str, Any], tree: Tree, fresh: Mapping[str, Tensor]) -> Tree:
        """Trainables that compute what the adapter's tensors do under their own config; `fresh` is a start of ours."""
        return tree

    @property
    def stem(self) -> str:
        """Its name in recipes: the stem of its file."""
        return name_of(self)


@dataclass(frozen=True)
class Prompt:
    """Virtual tokens for every row: embeddings [N, P, d] in front of the text, or a key-value cache of length P."""

    length: int
    embeds: Tensor | None = None
    cache: Sequence[tuple[Tensor, Tensor]] | None = None  # per layer: keys, values [N, heads, P, head_dim]


def patch(module: nn.Module, make: Callable[[Callable], Callable]) -> None:
    """Put `make(forward)` in the place of this module's forward."""
    module.__dict__["forward"] = make(module.forward)


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear map, whichever way its weight lies; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return None


def find_linears(net: nn.Module, targets: str | Sequence[str], needs: str, some: bool = False) -> dict[str, nn.Module]:
    """Linear maps whose path ends in one of `targets` ("all-linear": every one but the output heads and routers).

    Raises ModelError for a target that matches nothing (with `some`: when none does), naming it and the linear maps
    that the model has; and for an output head that shares its weights with the embeddings.
    """
    heads = output_heads(net)
    linears = {p: m for p, m in net.named_modules() if linear_size(m)
               and p.rsplit(".", 1)[-1] not in ("classifier", "score") and not p.startswith("attend.")}
    if targets == "all-linear":
        inner = {p: m for p, m in linears.items() if p not in heads and not _does_more(m)
                 and not isinstance(m, NonDynamicallyQuantizableLinear)}  # whose weights its attention reads itself
        return _some(inner, targets, needs, linears)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    found = {p: m for p, m in linears.items() if any(named(p, t) for t in wanted)}
    missing = [t for t in wanted if not any(named(p, t) for p in found)]
    if missing and found and not some:
        raise ModelError(f"{needs}: the model has no linear modules named {missing[0]!r}; it has {_ends(linears)}")
    for p in found:
        if p in heads and (twin := tied_to(net, f"{p}.weight")):
            raise ModelError(f"{needs}: '{p}' shares its weights with '{twin}', so it has no update of its own; leave "
                             f"it out, or train the space 'head', which unties it")
    return _some(found, targets, needs, linears)


def _some(found: dict[str, nn.Module], targets: Any, needs: str, linears: Collection[str]) -> dict[str, nn.Module]:
    if not found:
        raise ModelError(f"{needs}: the model has no linear modules named {targets!r}; it has {_ends(linears)}")
    return found


def _does_more(module: nn.Module) -> bool:
    """Whether a model has made more of a linear map (a router that also picks experts, for example)."""
    kind: Any = type(module)
    if not kind.__module__.startswith("transformers.models.") or not isinstance(module, nn.Linear):
        return False
    x = torch.linspace(-1, 1, module.in_features, device=module.weight.device, dtype=module.weight.dtype)[None, None]
    with torch.no_grad():
        try:
            y = kind.forward(module, x)
        except (TypeError, ValueError, RuntimeError):  # it wants something else
            return True
        return not (isinstance(y, Tensor) and torch.allclose(y, F.linear(x, module.weight, module.bias), rtol=1e-3,
                                                             atol=1e-3))
def _ends(paths: Collection[str]) -> list[str]:
    return sorted({p.rsplit(".", 1)[-1] for p in paths})


def named(path: str, name: str) -> bool:
    """Whether a path is this name or ends in it."""
    return path == name or path.endswith("." + name)


def tied_to(net: nn.Module, name: str) -> str | None:
    """Another parameter that is the very same tensor, or None."""
    weights = dict(net.named_parameters(remove_duplicate=False))
    return next((n for n, p in weights.items() if p is weights[name] and n != name), None)


def set_params(net: nn.Module, theta: Mapping[str, Tensor]) -> None:
    """Copy these values over the network's parameters of the same names."""
    weights = dict(net.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in theta.items():
            weights[name].copy_(value)


def output_heads(net: nn.Module) -> set[str]:
    """Paths of the language-model head, whatever it is named, and of the classifier."""
    heads = ("lm_head", "classifier", "score", "embed_out")
    own = net.get_output_embeddings() if isinstance(net, PreTrainedModel) else None
    return {p for p, m in net.named_modules() if p.rsplit(".", 1)[-1] in heads or (own is not None and m is own)}


def stack_lanes(trees: Sequence[Mapping[str, Tensor]]) -> Tree:
    """Stack K trees to [K, ...], padding with zeros where shapes differ."""
    out: Tree = {}
    for name in trees[0]:
        parts = [tree[name] for tree in trees]
        shape = tuple(max(sizes) for sizes in zip(*(p.shape for p in parts), strict=True))
        if all(p.shape == parts[0].shape for p in parts):
            out[name] = torch.stack(parts)
            continue
        full = parts[0].new_zeros((len(parts), *shape))
        for k, p in enumerate(parts):
            full[(k, *(slice(s) for s in p.shape))] = p
        out[name] = full
    return out


def take_lane(stacked: Mapping[str, Tensor], k: int, like: Mapping[str, Tensor]) -> Tree:
    """Lane `k` with the padding cut off to the shapes of `like`, as tensors of its own."""
    return {n: stacked[n][(k, *(slice(s) for s in t.shape))].detach().clone() for n, t in like.items()}


def tree_to(tree: Mapping[str, Tensor], device: torch.device | str) -> Tree:
    """The tree on a device; tensors that are there already are not copied.

    Trainables, messages and states rest in host memory. Only the model's own work carries them to its device.
    """
    return {n: t.to(device) for n, t in tree.items()}


def fitted_to(tree: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Tree:
    """A copy of `tree` in the shapes of `fresh`: cut where it is larger (a lower rank), filled up where smaller."""
    out: Tree = {}
    for name, to in fresh.items():
        out[name] = to.clone()
        common = tuple(slice(min(a, b)) for a, b in zip(tree[name].shape, to.shape, strict=True))
        out[name][common] = tree[name][common].to(to)
    return out
