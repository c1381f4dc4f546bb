"""Whether a model and a method can be trained as `local` and the space say, before anything is."""

from __future__ import annotations

from typing import Any

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.layer import name_of
from fedllm.core.method import Method
from fedllm.local.groupable import check_group
from fedllm.local.packing import check_packing
from fedllm.local.spec import LocalSpec
from fedllm.models.checkpointing import layers_of
from fedllm.models.model import Model
from fedllm.runs.recipe import Recipe

FASTEST = 0.1
"""A learning rate of adam above this is hardly meant: it moves every weight by as much in each step."""
STEEPEST = 1000.0
"""And one of sgd above this, also where gradients are clipped short for privacy."""


def check_training(model: Any, local: LocalSpec, method: Method, layers: Any = ()) -> None:
    """RecipeError or CompositionError naming the key that this model, method or layer cannot follow."""
    if not isinstance(model, Model):
        return
    name = f"model {model.name or type(model.net).__name__!r}"
    if local.lora_plus is not None:
        if not any(".lora_B." in n for n in model.initial()):
            raise RecipeError(f"local.lora_plus = {local.lora_plus} is the ratio of the rates of LoRA's two factors, "
                              f"and space '{model.space.stem}' has none; leave it out")
        if method.reads_rates:
            raise CompositionError(f"local.lora_plus = {local.lora_plus} and method '{name_of(method)}' do not "
                                   "fit together: it divides by the one rate of all trainables; leave it out")
    if local.checkpointing and not layers_of(model):
        raise CompositionError(f"local.checkpointing = true: {name} has no layers of which transformers says that they "
                               "may run again; leave it out")
    if local.checkpointing and _keeps_keys(model):
        raise CompositionError(f"local.checkpointing = true: space '{model.space.stem}' puts keys and values before "
                               "each layer, and a layer that ran again would put them twice; leave it out")
    if draws := "local.neftune" if local.neftune is not None else "space.dropout" if model.space.draws else "":
        if private := next((x for x in layers if x.by_example), None):
            raise CompositionError(f"{draws} and layer '{name_of(private)}' do not fit together: nothing is "
                                   "drawn where single examples' gradients are clipped; leave one out")
        whole = model.space.draws and not model.ways.sites  # trainables are put into the weights: no input to drop of
        if model.rules.net in ("policy", "dual") or not model.ways.uneven or whole:
            raise CompositionError(f"{draws}: {name} shows no rows of tokens to draw for; leave it out")
    if local.order == "stream" and (private := next((x for x in layers if x.by_example), None)):
        raise CompositionError(f"local.order = 'stream' and layer '{name_of(private)}' do not fit together: it "
                               "draws each batch at random, for the privacy of rows; leave one out")
    if local.packing:
        check_packing(model)


def check_processes(recipe: Recipe, model: Any, local: LocalSpec, layers: Any) -> None:
    """CompositionError for what several processes cannot train together (`engine.processes`)."""
    size = recipe.engine.processes
    if size == 1:
        return
    check_group(model, size, local)
    if private := next((x for x in layers if x.by_example), None):
        raise CompositionError(f"engine.processes = {size} and layer '{name_of(private)}' do not fit together: "
                               "single examples' gradients are clipped, and the processes see sums alone; leave one "
                               "out")
    if recipe.clients.models:
        raise CompositionError(f"engine.processes = {size} and clients.models do not fit together: the processes hold "
                               "the main model alone; leave one out")


def _keeps_keys(model: Model) -> bool:
    """Whether the space puts keys and values in front of every layer."""
    with model.using([model.initial()]):
        prompt = model.space.before(model.net, model.stack, 1)
    return prompt is not None and prompt.cache is not None


def cautions(local: LocalSpec) -> list[str]:
    """What of `local` may not be meant."""
    if local.optimizer == "adamw" and local.lr * local.weight_decay >= 1:
        return [f"local.lr * local.weight_decay = {local.lr * local.weight_decay:g}: each step takes away all that a "
                "weight is; usual are 0 to 0.1 for the decay"]
    if local.optimizer == "sgd" and local.lr > STEEPEST:
        return [f"local.lr = {local.lr:g} is the rate of sgd, by which each step is as many gradients long: usual are "
                "1e-3 to 10"]
    if local.optimizer == "sgd" or local.lr <= FASTEST:
        return []
    return [f"local.lr = {local.lr:g} is the rate of {local.optimizer}, which moves every weight by about as much in "
            "each step: usual are 1e-5 to 1e-2"]


def unmoved(method: Method, state: Any, model: Any) -> str:
    """What is to be said of rounds after which the served model is to the bit the one that they began with."""
    theta, base = method.served(state) if method.serves else ({}, None)
    fresh = model.initial() if theta and not base else {}
    if not theta or theta.keys() != fresh.keys() or any(not t.equal(fresh[n].to(t)) for n, t in theta.items()):
        return ""
    return (f"none of the {sum(t.numel() for t in theta.values()):,} numbers that are trained moved: the model is the "
            "one that the run began with. Steps are too small for their type (local.lr, local.clip_norm, space.alpha, "
            "server_lr), or no token is learned (local.max_length)")
