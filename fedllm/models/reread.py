"""A saved adapter read back by plain PEFT must be what was trained; so must one that PEFT made and we read."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from fedllm.core.errors import ModelError
from fedllm.core.rng import torch_own, torch_stream
from fedllm.data.encode import Encoded
from fedllm.models.batch import Batch, collate
from fedllm.models.dual import DualEncoder, tensor_of
from fedllm.models.model import Model
from fedllm.models.peft_io import CONFIG, base_of, inside, load_adapter, save_adapter
from fedllm.models.plain import unpatched

NEAR = {torch.float64: 1e-5, torch.float32: 2e-3}
ROUGH = 0.1


def begin_with(folder: str | Path, model: Model) -> None:
    """The model starts from what lies in `folder`: an adapter, which must be one function here and in PEFT, or
    trainables of `save_trainables`."""
    model.start = load_adapter(folder, model)
    if (Path(folder) / CONFIG).exists():
        base = base_of(Path(folder))
        if base and Path(base).name != Path(model.name).name:
            model.tell([f"{folder} was made for the base model {base!r}, and this one is {model.name!r}; if these are "
                        "not the same weights, it begins with what was meant for others"])
        reread(Path(folder), model, model.initial())


def reread(folder: Path, model: Model, theta: Mapping[str, Tensor]) -> None:
    """ModelError naming the modules where plain PEFT makes another function of the adapter in `folder` than `theta`."""
    theirs = _theirs(folder, model)
    rng = torch_stream(model.seed, "reread")
    words = model.net.get_input_embeddings().weight.shape[0]
    for length in (7, 4):
        ids = torch.randint(words, (length,), generator=rng)
        batch = collate([[Encoded(ids.numpy(), ids.numpy(), 0)]], model.pad, model.device)
        with torch.no_grad(), torch_own():
            with model.using([theta]):
                ours = _made(model, batch)
            want = _made_by_peft(theirs, model, batch)
        if not (ours.isfinite().all() and want.isfinite().all()):
            raise ModelError(f"with what {folder} holds the model's logits are no longer finite: its numbers are too "
                             "large; take a copy from before the training broke")
        near = NEAR.get(model.net.dtype, ROUGH) * float(ours.abs().max())
        if not torch.allclose(want.to(ours.dtype), ours, rtol=0, atol=near):
            raise ModelError(f"what {folder} holds is not one function here and in PEFT: {_apart(theirs, model)}")


def _made(model: Model, batch: Batch) -> Tensor:
    """[1, ...]: what the network makes of a text, and of a picture of noise where it sees."""
    if isinstance(model.net, DualEncoder):
        model.stack.rows = 1
        with torch.no_grad():
            both = [model.net.images(_noise(model)), tensor_of(model.net.clip.get_text_features(**_text(model)))]
        return torch.cat(both, 1)
    if model.rules.net == "masked":
        return model.word_logits(batch)
    h = model.hidden(batch)
    return h if model.head is None else model.logits_of(h)


def _made_by_peft(theirs: Any, model: Model, batch: Batch) -> Tensor:
    if isinstance(model.net, DualEncoder):
        base = theirs.get_base_model()
        both = [base.get_image_features(pixel_values=_noise(model)), base.get_text_features(**_text(model))]
        return torch.cat([tensor_of(x) for x in both], 1)
    got = theirs(input_ids=batch.ids, attention_mask=batch.mask.long())
    said = got["logits"] if "logits" in got else got["last_hidden_state"]
    return said[:, -batch.ids.shape[1] :]


def _noise(model: Model) -> Tensor:
    side = model.net.config.vision_config.image_size
    return torch.randn(1, 3, side, side, generator=torch_stream(model.seed, "reread", "noise")).to(
        model.device, model.net.dtype)


def _text(model: Model) -> dict[str, Tensor]:
    return {"input_ids": model.net.prompts[:1], "attention_mask": model.net.prompt_mask[:1]}


def reread_at_once(model: Model, theta: Mapping[str, Tensor]) -> None:
    """Save these trainables and read them back, so that no run finds at its end that it cannot be saved."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        try:
            save_adapter(folder, model, theta, model.name)
            reread(folder, model, theta)
        except ModelError as error:
            raise ModelError(str(error).replace(str(folder), "a saved adapter")) from None


def _theirs(folder: Path, model: Model) -> Any:
    bare = unpatched(model.net)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(inside(bare)[1], str(folder)).eval()
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"PEFT does not take what {folder} holds: {first}; choose other space.targets or another "
                         "space") from error


def _apart(theirs: Any, model: Model) -> str:
    """Which modules PEFT adapts and we do not, or we and not PEFT."""
    layers = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if isinstance(m, BaseTunerLayer)}
    config = model.space.peft_config(model.net, model.task)
    path = inside(model.net)[0]
    mine = set(vars(config).get("target_modules") or ())
    odd = sorted(layers ^ {n.removeprefix(path) for n in mine})
    if not odd:
        return f"its {type(config).__name__} is read otherwise"
    leaves = sorted({n.rpartition(".")[2] for n in ({n.removeprefix(path) for n in mine} - layers) or odd})
    return f"PEFT adapts other modules ({', '.join(odd[:4])}); leave {', '.join(leaves)} out of space.targets"
