"""A model that a method cannot use is refused when a run is built, and not in its first round."""

from types import SimpleNamespace

import pytest

from fedllm.core.errors import CompositionError
from fedllm.methods.registry import make_method
from fedllm.models.shelf import Shelf
from fedllm.runs.models import check_models


class Speaks:
    """A model that says text, of which nothing else is known."""


def built(name, asked, **knobs):
    recipe = SimpleNamespace(models={n: None for n in asked}, method=SimpleNamespace(name=name))
    world = SimpleNamespace(model=None, models=Shelf(dict.fromkeys(asked, Speaks)), held={})
    check_models(recipe, make_method(name, **knobs), world)


@pytest.mark.parametrize("name, asked, knobs, why", [
    ("crosslm", ["writer"], {}, r"models\.writer cannot be trained, which method\.reinforce wants"),
    ("fedcollm", ["teacher"], {}, r"models\.teacher: method 'fedcollm' trains it and needs its probabilities"),
    ("mllm_fl", ["teacher"], {"stages": "1,2"}, r"models\.teacher: stage 1 needs its pooled states"),
    ("multi_fm_kd", ["first", "second"], {"teachers": ("first", "second")}, r"models\.first: method 'multi_fm_kd'"),
])
def test_what_cannot_be_used_is_refused_before_the_first_round(name, asked, knobs, why):
    with pytest.raises(CompositionError, match=why):
        built(name, asked, **knobs)


def test_what_says_text_is_taken_where_text_is_wanted():
    built("crosslm", ["writer"], reinforce=False)
    built("mllm_fl", ["teacher"], stages="2,3")
    built("multi_fm_kd", ["first"], teachers=("first",), pretrain_steps=0)
