"""The adapter along time: exact against torch's convolution, blind to padding and the future."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fedllm.core.errors import DataError, ModelError, RecipeError
from fedllm.data.encode import Encoded
from fedllm.local.generate import run_generates
from fedllm.local.requests import Generate, Limits
from fedllm.models.batch import collate
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space
from fedllm.spaces.st_adapter import depthwise


def bert(folder, **knobs):
    body = AutoModel.from_pretrained(folder, dtype=torch.float64)
    body.pooler = None
    return Model(HeadedEncoder(body, 3, "mean").double(), AutoTokenizer.from_pretrained(folder), "classification",
                 make_space("st_adapter", **knobs), labels=("x", "y", "z"), fast_kernels=False)


def llama(folder, **knobs):
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return Model(net, AutoTokenizer.from_pretrained(folder), "generation", make_space("st_adapter", **knobs),
                 fast_kernels=False)


def shaken(model, seed=1, by=0.3):
    g = torch.Generator().manual_seed(seed)
    return {n: (t + by * torch.randn(t.shape, generator=g)).double() for n, t in model.initial().items()}


def rows(*lengths, classes=True):
    ids = [np.arange(5, 5 + n, dtype=np.int32) for n in lengths]
    return [Encoded(i, 0 if classes else i.astype(np.int64), 1) for i in ids]


def hidden(model, theta, batch):
    with torch.no_grad(), model.using([theta]):
        return model.hidden(batch)


def test_the_taps_are_torchs_depthwise_convolution():
    g = torch.Generator().manual_seed(0)
    k, b, m, grid, kernel = 3, 2, 4, (5, 3, 2), (3, 3, 1)
    z = torch.randn(k, b, *grid, m, generator=g, dtype=torch.float64)
    w = torch.randn(k, m, *kernel, generator=g, dtype=torch.float64)
    got = depthwise(F.pad(z, (0, 0, 0, 0, 1, 1, 1, 1)), w, grid)
    for lane in range(k):
        want = F.conv3d(z[lane].permute(0, 4, 1, 2, 3), w[lane][:, None], padding=(1, 1, 0), groups=m)
        assert torch.allclose(got[lane], want.permute(0, 2, 3, 4, 1), atol=1e-12)


def test_size_is_that_of_a_plain_adapter_and_the_kernels(tiny_bert_folder):
    model, d, m, sites = bert(tiny_bert_folder, size=5), 32, 5, 2
    got = sum(t.numel() for n, t in model.initial().items() if "adapter" in n)
    assert got == sites * (2 * d * m + d + m + 3 * m + m)


def test_padding_does_not_matter(tiny_bert_folder):
    model = bert(tiny_bert_folder, kernel=(5, 1, 1))
    theta, short = shaken(model), rows(4)
    alone = hidden(model, theta, collate([short], 0, model.device))
    beside = hidden(model, theta, collate([short + rows(11)], 0, model.device))
    assert torch.allclose(alone[0], beside[0, :4], atol=1e-10)


def test_a_language_model_does_not_see_the_future(tiny_llama_folder):
    model = llama(tiny_llama_folder, kernel=(3, 1, 1))
    theta, one = shaken(model), rows(9, classes=False)
    other = [Encoded(np.where(np.arange(9) < 6, one[0].ids, 3).astype(np.int32), one[0].labels, 1)]
    a, b = (hidden(model, theta, collate([r], 0, model.device))[0] for r in (one, other))
    assert torch.allclose(a[:6], b[:6], atol=1e-12) and not torch.allclose(a[6:], b[6:], atol=1e-3)
    flat = {n: torch.zeros_like(t) if n.endswith("conv.weight") else t for n, t in theta.items()}
    assert not torch.allclose(a, hidden(model, flat, collate([one], 0, model.device))[0], atol=1e-3)


def test_word_by_word_is_as_all_at_once(tiny_llama_folder):
    model = llama(tiny_llama_folder, kernel=(5, 1, 1))
    model.tokenizer.eos_token_id = 2
    thetas = [shaken(model, s, 0.5) for s in (1, 2)]
    prompts = [np.arange(5, 5 + n, dtype=np.int32) for n in (2, 7, 1)]  # one is padded on the left beside another
    asks = [Generate(f"c{i}", model, t, None, prompts, 6) for i, t in enumerate(thetas)]
    for theta, said in zip(thetas, run_generates(asks, Limits()), strict=True):
        for prompt, got in zip(prompts, said, strict=True):
            ids, want = prompt.tolist(), []
            for _ in range(6):
                row = Encoded(np.array(ids, np.int32), np.array(ids, np.int64), 1)
                h = hidden(model, theta, collate([[row]], 0, model.device))
                word = int(model.logits_of(h[:, -1:]).argmax())
                if word == 2:
                    break
                ids, want = [*ids, word], [*want, word]
            assert got == want
    assert model.stack.past is None and model.stack.mask is None


def test_a_grid_looks_along_its_own_axes_and_leaves_the_class_token_alone(tiny_bert_folder):
    """With all weights of attention frozen and the same, only the site itself is looked at: its input is made up."""
    model = bert(tiny_bert_folder, kernel=(1, 3, 3), grid=(2, 3, 2), skip=1, size=4)
    space, stack = model.space, model.stack
    path = next(n for n in model.initial() if "adapter_conv" in n).rsplit(".adapter_conv", 1)[0]
    theta = shaken(model)
    z = torch.randn(1, 2 * 13, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with model.using([theta]):
        got = space.inner(z, path, stack, 2).view(2, 13, 4)
        moved = z.clone()
        moved[0, 1 + 4] += 1.0  # frame 0, row 2, column 0 of the first sample
        change = (space.inner(moved, path, stack, 2).view(2, 13, 4) - got).abs().sum(-1) > 0
    assert torch.equal(got[:, 0], F.relu(z.view(2, 13, 4)[:, 0]))
    assert set(change[0].nonzero()[:, 0].tolist()) <= {3, 4, 5, 6} and not change[1].any() and change[0, 5]


@pytest.mark.parametrize(("knobs", "says"), [
    ({"kernel": (2, 1, 1)}, "three odd whole numbers"), ({"kernel": (3, 1)}, "three odd whole numbers"),
    ({"grid": (4, 0, 2)}, "three whole numbers from 1"), ({"kernel": (3, 3, 1)}, "give the grid too"),
    ({"skip": -1}, "skip"), ({"size": 0}, "size")])
def test_bad_knobs_are_named(knobs, says):
    with pytest.raises(RecipeError, match=says):
        make_space("st_adapter", **knobs)


def test_rows_that_do_not_fill_the_grid_are_refused(tiny_bert_folder, tiny_llama_folder):
    model = bert(tiny_bert_folder, grid=(2, 2, 1), skip=1)
    hidden(model, model.initial(), collate([rows(5, 5)], 0, model.device))
    with pytest.raises(DataError, match=r"\(2, 2, 1\) has 4 places after space.skip = 1; .* have 6 tokens"):
        hidden(model, model.initial(), collate([rows(6)], 0, model.device))
    with pytest.raises(ModelError, match="in a language model leave the grid out"):
        llama(tiny_llama_folder, grid=(2, 2, 1))
