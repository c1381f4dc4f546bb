"""Rows that are not text: parts travel through every engine, pictures are read or refused, features are exact."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPConfig, CLIPModel

import fedllm
from fedllm.core.errors import CompositionError, DataError, ModelError
from fedllm.data.federation import Federation, Shard
from fedllm.data.load import load_federation
from fedllm.engines import ENGINES
from fedllm.engines.world import World
from fedllm.local.flops import work_of
from fedllm.local.requests import Losses
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.dual import DualEncoder
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.models.names import Names
from fedllm.spaces import make_space
from fedllm.tasks.row import IGNORE, Encoded, numbers_of, same_form
from tests.conftest import WORDS, word_tokenizer
from tests.methods.conftest import Run, gap

CPU = torch.device("cpu")
END = len(WORDS) + 4
"""The token in which a text tower ends, and which it looks at."""
COLORS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 30, 220)}


def clip(dtype=torch.float64):
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(
        text_config={**tower, "vocab_size": END + 1, "max_position_embeddings": 16, "eos_token_id": END,
                     "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=12)).to(dtype)


def ending():
    """The word tokenizer with an end of its own, put after every text."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 1), ("<end>", END)])
    return tokenizer


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    from transformers import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny_clip")
    clip(torch.float32).save_pretrained(folder)
    ending().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def png(color):
    out = io.BytesIO()
    Image.new("RGB", (20, 18), COLORS[color]).save(out, "png")
    return out.getvalue()


@pytest.fixture
def painted(tmp_path):
    """36 pictures in one color each, and a list of them by relative paths."""
    rows = []
    (tmp_path / "pictures").mkdir()
    for i in range(36):
        color = list(COLORS)[i % 3]
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(color))
        rows.append({"file": f"pictures/{i}.png", "y": color})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


FIELDS = {"image": "file", "label": "y"}


def begin(space="feature_attention", engine="vectorized", dtype=torch.float64, cached=True, sizes=(5, 7, 9), **knobs):
    """A method over random pictures; clients with unequal numbers of rows."""
    rng = np.random.default_rng(0)

    def rows(n):
        return [Encoded(np.zeros(1, np.int32), int(rng.integers(3)), 1,
                        {"pixels": rng.normal(0, 1, (3, 16, 16)).astype(np.float32)}) for _ in range(n)]

    prompts = torch.tensor([[1, 4, 5, 6 + c, END] for c in range(3)])
    names = Names((1,), ((6,), (7,), (8,)), (END,), (), (4, 5))
    model = Model(DualEncoder(clip(dtype), prompts, cached=cached, names=names), None, "image_text",
                  make_space(space, **knobs), labels=tuple(COLORS), fast_kernels=False)
    federation = Federation({f"c{i}": Shard(rows(n), rows(2)) for i, n in enumerate(sizes)}, rows(4), "image_text",
                            tuple(COLORS))
    world = World(model, federation, LocalSpec(optimizer="sgd", lr=0.1, batch_size=4))
    method = make_method("fedclip" if space == "feature_attention" else "fedavg")
    run = Run(method, ENGINES[engine]((method,), world), world)
    run.state = method.init(model)
    return run


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("space, knobs", [("feature_attention", {}), ("lora", {"targets": ("q_proj",), "rank": 2})])
def test_engines_agree_on_pictures(space, knobs, dtype, most):
    one, other = (begin(space, engine, dtype, **knobs).go(2).state["theta"] for engine in ("in_process", "vectorized"))
    assert gap(one, other) <= most
    assert gap(one, begin(space, dtype=dtype, **knobs).state["theta"]) > 1e-4  # it has learned something


def test_features_that_are_kept_equal_those_made_anew():
    """Where nothing trained lies inside a tower its features are made once; inside it they are not."""
    kept, anew = begin().go(2), begin(cached=False).go(2)
    assert gap(kept.state["theta"], anew.state["theta"]) <= 1e-10
    assert set(kept.world.encoded("c0", "train")[0].parts) == {"features"}
    assert set(anew.world.encoded("c0", "train")[0].parts) == {"pixels"}
    vision = begin("lora", targets=("vision_model.encoder.layers.0.self_attn.q_proj",), rank=2)
    assert not vision.world.model.seen_once and set(vision.world.encoded("c0", "train")[0].parts) == {"pixels"}
    text = begin("lora", targets=("text_model.encoder.layers.0.self_attn.q_proj",), rank=2)
    assert text.world.model.seen_once
    plain = begin("lora", targets=("text_model.encoder.layers.0.self_attn.q_proj",), rank=2, cached=False)
    assert gap(text.go(2).state["theta"], plain.go(2).state["theta"]) <= 1e-10


def test_pictures_cost_the_tokens_that_they_pass_through_a_tower():
    def work(run):
        rows = run.world.encoded("c0", "train")
        return work_of(Losses("c0", run.world.model, run.state["theta"], None, rows))

    kept, anew = work(begin()), work(begin(cached=False))
    assert kept.tokens == 5 and anew.tokens == 5 * 5  # 2 x 2 patches and the token in front
    assert anew.flops > 20 * kept.flops > 0


class Line(nn.Module):
    """A number of a series: what a part's user may bring along."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 1, dtype=torch.float64)


def series_loss(model, batch):
    good = (batch.labels != IGNORE).double()
    off = (model.net.out(batch.parts["series"])[:, 0] - batch.parts["series"].sum(1)) * good
    return off**2, good, torch.zeros_like(off)


def series(sizes, lengths):
    rng = np.random.default_rng(0)
    return {f"c{i}": Shard([Encoded(np.zeros(1, np.int32), 0, 1, {"series": rng.normal(0, 1, lengths[i])})
                            for _ in range(n)]) for i, n in enumerate(sizes)}


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
def test_a_series_travels_and_is_learned(engine):
    torch.manual_seed(0)
    model = Model(Line(), None, "regression", make_space("full"), loss=series_loss)
    world = World(model, Federation(series((5, 9), (4, 4)), (), "regression"), LocalSpec("sgd", 0.1, epochs=5))
    method = make_method("fedavg")
    run = Run(method, ENGINES[engine]((method,), world), world)
    run.state = method.init(model)
    run.go(8)
    assert model.measured(np.ones((2, 3))) == {}  # its loss gives no error's size, which mae sums up
    assert (run.state["theta"]["out.weight"] - 1).abs().max() < 0.05


def test_rows_of_unequal_shape_are_refused_with_both_shapes():
    rows = [Encoded(np.zeros(1, np.int32), 0, 1, {"series": np.zeros(n)}) for n in (4, 4, 5)]
    with pytest.raises(DataError, match=r"row 3 has the parts series \[5\], and row 1 has series \[4\]"):
        same_form(rows)
    with pytest.raises(DataError, match=r"unlike parts.*'series'.*\(5,\).*\(4,\)"):
        collate([rows], 0, CPU)
    ragged = [replace(row, pads={"series": -1.0}) for row in rows]
    batch = collate([ragged[:1], ragged[1:]], 0, CPU)
    assert batch.parts["series"].shape == (4, 5) and batch.parts["series"][0, 4] == -1


@pytest.mark.parametrize("value", [[1, 2, None], [[1, 2], [3]], "tall", [float("nan")], []])
def test_a_series_must_be_numbers(value):
    with pytest.raises(DataError, match=r"notes, row 3: 'series' must"):
        numbers_of({"series": value}, "series", "notes, row 3")


def test_pictures_from_a_list_a_folder_parquet_and_datasets(painted):
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    listed = load_federation({"source": str(painted / "list.jsonl"), "task": "image_text", "fields": FIELDS}, 0)
    for color in COLORS:
        (painted / "sorted" / color).mkdir(parents=True)
        for i in range(12):
            (painted / "sorted" / color / f"{i}.png").write_bytes(png(color))
    rows = [{"image": {"bytes": png(c), "path": None}, "label": c} for c in list(COLORS) * 12]
    parquet.write_table(pa.Table.from_pylist(rows), painted / "rows.parquet")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLORS))})
    datasets.Dataset.from_list(rows, features=kinds).save_to_disk(str(painted / "saved"))
    for source in ("sorted", "rows.parquet", "saved"):
        got = load_federation({"source": str(painted / source), "task": "image_text"}, 0)
        assert set(got.labels) == set(listed.labels) == set(COLORS)
        assert len(got.pooled()) + len(got.test) + sum(len(s.test) for s in got.clients.values()) == 36


def test_a_run_on_pictures_by_fields(painted, clip_folder, tmp_path):
    result = fedllm.run({"model": clip_folder, "method": "fedclip", "space": "feature_attention", "rounds": 4,
                         "local": {"lr": 0.02, "epochs": 4},
                         "data": {"source": str(painted / "list.jsonl"), "task": "image_text", "fields": FIELDS,
                                  "test": 0.25, "client_test": 0.0, "partition": {"kind": "iid", "clients": 3}}},
                        root=tmp_path / "runs")
    before, after = result.evaluation["before"]["global"], result.evaluation["global"]
    assert after["loss"] < before["loss"] and {"accuracy", "loss", "n"} == set(after)
    assert (result.adapter_path / "attend.safetensors").is_file()


def test_an_image_that_cannot_be_read_names_file_and_row(painted):
    spec = {"source": str(painted / "list.jsonl"), "task": "image_text", "fields": FIELDS}
    whole = (painted / "pictures" / "4.png").read_bytes()
    for bad, said in ((whole[:60], "cannot be read"), (b"hello", "cannot identify")):
        (painted / "pictures" / "4.png").write_bytes(bad)
        with pytest.raises(DataError, match=rf"list\.jsonl, row 5 \(line 5\): the image '.*4\.png' .*{said}"):
            load_federation(spec, 0)
    (painted / "pictures" / "4.png").unlink()
    with pytest.raises(DataError, match=r"row 5 \(line 5\): the image '.*4\.png' cannot be read: there is no"):
        load_federation(spec, 0)
    with pytest.raises(DataError, match=r"row 1 .* has no field 'image'; it has file, y"):
        load_federation({**spec, "fields": {"label": "y"}}, 0)


def test_models_that_do_not_see_are_refused(painted, tiny_bert_folder, clip_folder):
    data = {"source": str(painted / "list.jsonl"), "task": "image_text", "fields": FIELDS}
    with pytest.raises(ModelError, match=r"cannot be loaded|needs an image-text model"):
        fedllm.run({"model": tiny_bert_folder, "data": data}, root=painted / "runs")
    with pytest.raises(CompositionError, match="space = 'feature_attention' works"):
        fedllm.run({"model": clip_folder, "method": "fedclip", "data": data, "space": "full"}, root=painted / "runs")
    with pytest.raises(ModelError, match="same text features to the classes 'red' and 'green'"):
        DualEncoder(clip(), torch.tensor([[1, 4, 5, END]] * 3), labels=tuple(COLORS))
    with pytest.raises(ModelError, match="weighs the image features of an image-text model"):
        load_model(tiny_bert_folder, "classification", make_space("feature_attention"), labels=("a", "b")).initial()
    model = load_model(clip_folder, "image_text", make_space("feature_attention"), labels=tuple(COLORS))
    row = Encoded(np.zeros(1, np.int32), 0, 1, {"features": np.zeros(5, np.float32)})
    with pytest.raises(DataError, match=r"features have the shape \[5\]; this model's have \[12\]"), model.using(
            [model.initial()]):
        model.row_losses(collate([[row]], 0, CPU))
