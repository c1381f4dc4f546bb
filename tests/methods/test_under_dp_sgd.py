"""dp_sgd over every method of the registry: what would read rows beside `client.fit` is refused before any work."""

import pytest

from fedllm.core.errors import CompositionError
from fedllm.methods.registry import METHODS, method_class
from fedllm.privacy.dp_sgd import DPSGD
from fedllm.runs.fits import compose
from tests.methods.conftest import begin, tried

METHODS = [name for name in METHODS if not method_class(name).trial.apart]
REFUSED = "through client.fit only, and this one reads the rows"


def refusal(work):
    """The sentence with which this is refused, or none."""
    try:
        work()
    except CompositionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_refused_when_the_run_is_built_or_never(name):
    options = tried(name) | {"ranks": ()}
    options["local"] = {"steps": 1, "batch_size": 2, **options["local"]}
    run = begin(name, engine="in_process", sizes=(2, 2, 2), layers=(DPSGD(noise_multiplier=1.0),), **options)
    built = refusal(lambda: compose(run.method, [*run.engine.stack[1:]]))
    if built and REFUSED not in built:
        return  # for another reason, before any work too
    assert bool(built) is bool(refusal(lambda: run.go(1))) is not run.method.only_fits
