"""Prompts of classes: learned tokens about their names in a frozen tower, exact, and refused where they do not fit."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

import fedllm
from evidence.rigs.shapes import COLORS, PAIRS, SHAPES, UNSEEN, Some, small_clip, tokenizer, trained_clip
from evidence.small_clip import zero_shot
from fedllm.core.errors import DataError, ModelError
from fedllm.core.rng import numpy_stream
from fedllm.data.load import load_federation
from fedllm.models.batch import collate
from fedllm.models.dual import DualEncoder
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.models.names import class_prompts, names_of
from fedllm.spaces import make_space
from fedllm.spaces.class_prompt import CONTEXT
from tests.methods.conftest import gap
from tests.tasks.test_parts import begin, clip_folder, ending, painted, png  # noqa: F401

CPU = torch.device("cpu")
LABELS = ("red circle", "blue ring", "green")


def net_of(labels=LABELS, **options):
    words, towers = tokenizer(), trained_clip()
    return DualEncoder(towers, *class_prompts(words, labels, towers), labels=labels,
                       names=names_of(words, labels, towers), **options)


def model_of(space, labels=LABELS, **knobs):
    return Model(net_of(labels), None, "image_text", make_space(space, **knobs), labels=labels)


def rows_of(labels=LABELS, shots=2, among=None):
    return Some(labels[:2], "faded", shots, among).rows(numpy_stream(0, "rows"), labels)


def said(model, theta, rows):
    with torch.no_grad(), model.using([theta]):
        return model.class_logits(collate([model.read(rows)], 0, CPU))


def test_the_small_clip_knows_some_and_not_all():
    """Between chance and ceiling, in a look that it never saw and for pairs that it never saw."""
    clip = trained_clip()
    assert 0.3 < zero_shot(clip, "photo", PAIRS) < 0.9 and 1 / 48 + 0.05 < zero_shot(clip, "faded", PAIRS) < 0.5
    assert 1 / 8 + 0.1 < zero_shot(clip, "faded", UNSEEN) < 0.9
    assert set(UNSEEN) < set(PAIRS) and len(PAIRS) == len(COLORS) * len(SHAPES)


def test_the_words_of_the_template_as_context_say_what_the_template_says():
    """`a photo of a NAME .` as learned tokens is the very sentence with a full stop, in transformers."""
    net = net_of()
    got = net.spoken(net.get_input_embeddings()(torch.tensor(net.names.before)).expand(1, 3, -1, -1))[0]
    ids = tokenizer()([f"a photo of a {name} ." for name in LABELS], padding=True, return_tensors="pt")
    want = net.clip.get_text_features(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output
    assert torch.allclose(got, F.normalize(want, dim=-1), atol=1e-6)
    bare = tokenizer()(list(LABELS), padding=True, return_tensors="pt")
    want = net.clip.get_text_features(input_ids=bare["input_ids"], attention_mask=bare["attention_mask"]).pooler_output
    assert torch.allclose(net.bare(), F.normalize(want, dim=-1), atol=1e-6)


@pytest.mark.parametrize("place, want", [("end", "v v v v red circle ."), ("middle", "v v red circle v v ."),
                                         ("front", "red circle v v v v .")])
def test_where_the_name_stands(place, want):
    names, words = net_of().names, tokenizer()
    ids, mask, at = names.sentences(4, place, 16)
    shown = ["v" if a >= 0 else words.convert_ids_to_tokens(int(i)) for i, a in zip(ids[0], at[0], strict=True)]
    assert " ".join(shown) == f"<start> {want} <end>" and at[0][at[0] >= 0].tolist() == [0, 1, 2, 3]
    assert mask[2].tolist() == [1] * 8 + [0]  # 'green' is shorter


def test_a_context_of_each_class_begins_as_one_for_all_and_moves_by_itself():
    one, each = (model_of("class_prompt", start_from="template", per_class=p) for p in (False, True))
    rows = rows_of()
    assert each.initial()[CONTEXT].shape == (3, 4, 64)
    assert torch.allclose(said(one, one.initial(), rows), said(each, each.initial(), rows), atol=1e-6)
    moved = {CONTEXT: each.initial()[CONTEXT].index_add(0, torch.tensor([1]), torch.randn(1, 4, 64))}
    off = (said(each, moved, rows) - said(each, each.initial(), rows)).abs().amax(0)
    assert off[1] > 1e-3 and off[[0, 2]].max() < 1e-6


def test_pictures_whose_features_are_kept_learn_the_same_prompt():
    """The cache of features is exact: rounds with it and without end alike, and no weight of the towers moves."""
    ends = []
    for cached in (True, False):
        run = begin("class_prompt", cached=cached, length=2)
        before = {n: t.clone() for n, t in run.world.model.net.state_dict().items()}
        run.go(2)
        after = run.world.model.net.state_dict()
        assert all(torch.equal(t, after[n]) for n, t in before.items())
        assert set(run.world.encoded("c0", "train")[0].parts) == {"features" if cached else "pixels"}
        ends.append(run.state["theta"])
    assert gap(*ends) <= 1e-10 and float(ends[0][CONTEXT].abs().max()) > 0


END = len(ending()) - 1


def test_a_row_is_told_among_its_own_classes():
    model = model_of("class_prompt", length=2)
    free, told = (said(model, model.initial(), rows_of(among=among)) for among in (None, LABELS[:2]))
    assert torch.allclose(free[:, :2], told[:, :2]) and float(told[:, 2].max()) < -1e3


def test_a_column_says_among_which_labels(painted):  # noqa: F811
    lines = [json.loads(line) for line in (painted / "list.jsonl").read_text().splitlines()]
    spec = {"source": str(painted / "list.jsonl"), "task": "image_text", "fields": {"image": "file", "label": "y"}}

    def with_(among):
        text = "\n".join(json.dumps({**row, "among": among}) for row in lines)
        (painted / "list.jsonl").write_text(text)
        return load_federation(spec, 0)

    assert with_(["red", "green", "blue"]).pooled()[0]["among"] == [1.0, 1.0, 1.0]
    with pytest.raises(DataError, match=r"row 2 .*the label 'green' is none of those that 'among' lists"):
        with_(["red", "blue"])
    with pytest.raises(DataError, match=r"'among' is 'purple'; the labels are blue, green, red"):
        with_(["red", "purple"])
    with pytest.raises(DataError, match=r"'among' is 'red'; it must be a list of two labels or more"):
        with_("red")


def test_prompts_and_names_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match=r"space.length = 13: with the name 'red circle' the prompt has 18 tokens, and "
                                         r"the text tower reads 16; allowed are 1 to 11"):
        model_of("class_prompt", length=13).initial()
    with pytest.raises(ModelError, match=r"class name 'red red.*' is too long for the text tower: 'a photo of a ...' "
                                         r"with it has 22 tokens, and allowed are 16"):
        net_of(("red circle", " ".join(["red"] * 16)))
    with pytest.raises(ModelError, match=r"space.length = 3: the template 'a photo of a' has 4 tokens"):
        model_of("class_prompt", length=3, start_from="template").initial()
    with pytest.raises(ModelError, match="no token"):
        names_of(tokenizer(), ("red", " "), small_clip())
    with pytest.raises(ModelError, match="stream 'a' makes class prompts"):
        model_of("streams", of={"a": {"name": "class_prompt", "length": 2}, "b": "feature_attention"})


def test_language_models_have_no_class_prompts(tiny_bert_folder):
    with pytest.raises(ModelError, match=r"'class_prompt' learns prompts of an image-text model.*'lora' works"):
        load_model(tiny_bert_folder, "classification", make_space("class_prompt"), labels=("a", "b"))


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_siglip")
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = ending()
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(
        text_config={**tower, "vocab_size": len(words), "max_position_embeddings": 12, "projection_size": 16,
                     "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END},
        vision_config={**tower, "image_size": 16, "patch_size": 8})).save_pretrained(folder)
    words.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("file", "change", "says"), [
    ("preprocessor_config.json", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
     r"makes pictures of the shape \[3, 32, 32\], and its tower reads \[3, 16, 16\]"),
    ("preprocessor_config.json", {"image_mean": [0.5]},
     r"image processor \(preprocessor_config\.json\) takes no picture"),
    ("tokenizer_config.json", None, "its tokenizer cannot read the classes' names .*give the tokenizer's files")])
def test_a_folder_whose_parts_are_of_different_models_is_refused_as_it_is_loaded(clip_folder, tmp_path, file,  # noqa: F811
                                                                                 change, says):
    """It was refused by the tower at the first picture, or by a tokenizer's bare Exception."""
    shutil.copytree(clip_folder, tmp_path / "clip")
    path = tmp_path / "clip" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=says):
        load_model(str(tmp_path / "clip"), "image_text", make_space("class_prompt", length=2), labels=("red", "blue"))


@pytest.mark.parametrize("family", ["clip_folder", "siglip_folder"])
def test_a_run_from_pictures_in_parquet_with_a_folder_of_transformers(family, painted, request, tmp_path):  # noqa: F811
    """Both families, from the bytes in a Parquet file to a prompt that is saved and read back."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"image": {"bytes": png(c), "path": None}, "label": c} for c in ("red", "green", "blue") * 8]
    parquet.write_table(pa.Table.from_pylist(rows), painted / "rows.parquet")
    recipe = {"model": request.getfixturevalue(family), "method": "promptfl", "rounds": 2,
              "space": {"name": "class_prompt", "length": 2}, "local": {"optimizer": "sgd", "lr": 0.1},
              "data": {"source": str(painted / "rows.parquet"), "task": "image_text", "test": 0.25,
                       "client_test": 0.0, "partition": {"kind": "iid", "clients": 2}}}
    result = fedllm.run(recipe, root=tmp_path / "runs")
    assert result.evaluation["global"]["loss"] < result.evaluation["before"]["global"]["loss"]
    recipe |= {"rounds": 0, "space": {"name": "class_prompt", "start_from": str(result.adapter_path)}}
    again = fedllm.run(recipe, root=tmp_path / "again")
    assert again.evaluation["global"]["loss"] == pytest.approx(result.evaluation["global"]["loss"], abs=1e-6)
