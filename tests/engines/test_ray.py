"""A local Ray cluster of two one-core workers: equal results, one model each, and killed workers that cost nothing."""

import importlib.util
import json
import os
import signal
import threading
import time

import pytest
import torch

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed (pip install 'fedlm[ray]')", allow_module_level=True)

from fedllm.api import run
from fedllm.core.errors import DataError, RecipeError, RunError
from fedllm.core.payload import leaves
from fedllm.engines import ray_pool
from fedllm.engines.parcel import unwrap, wrap
from fedllm.engines.ray import Ray, Worker
from fedllm.engines.ray_pool import Lost, Pool
from fedllm.methods.registry import method_class
from fedllm.runs.build import build
from fedllm.runs.course import Course
from fedllm.runs.recipe import load_recipe
from fedllm.runs.spread import over

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "say", "the", "word", "is", "good"]
CASES = {"fedavg": {}, "scaffold": {}, "fedbuff": {}, "fedex_lora": {}, "hetlora": {
    "space": {"name": "lora", "rank": 4, "scaling": "shared"}, "clients": {"ranks": [1, 2, 4, 4, 3]}},
    "streaming_diloco": {"fragments": 2, "delay": 1},
    "sparse_loco": {"k": 400},
    "prime_elastic": {"min_replicas": 2}}
SLOW = ("streaming_diloco", "sparse_loco", "prime_elastic")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests: starting it takes longer than they do. Ray takes our word for the card."""
    import ray

    os.environ.update(ray_pool.SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
                 logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for k, n in enumerate((12, 15, 9, 4, 7)):
        rows = [{"prompt": " ".join(WORDS[(i + j * (k + 2)) % 14] for j in range(3 + i % 4)),
                 "response": WORDS[(i + k) % 14]} for i in range(n)]
        (folder / f"c{k}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def recipe(data, model, method="fedavg", kind="ray", dtype="float64", **more):
    knobs = {k: more.pop(k) for k in list(more) if k in method_class(method).knobs()}
    return {"name": method, "model": {"name": model, "dtype": dtype, "fast_kernels": False},
            "method": {"name": method, **knobs},
            "space": {"name": "lora", "rank": 2}, "rounds": 2, "engine": {"kind": kind},
            "local": {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4},
            "data": {"source": str(data), "partition": {"kind": "per_file"}, "test": 0.0},
            "evaluate": {"exact_match": False, "samples": 0}, **more}


@pytest.fixture(scope="module")
def pool(cluster):
    pool = Pool(Worker, 2)
    yield pool
    pool.close()


@pytest.fixture
def no_pool(pool):
    """The cluster's cores are free: the pool of the tests before lets its workers go (and would have new ones)."""
    pool.close()


def course(spec, pool=None, rounds=2, during=lambda engine: None):
    """The state, the memories and the record after some rounds; `during(engine)` comes before the second."""
    parts = build(load_recipe(spec))
    if pool is not None:
        parts.engine = over(pool, parts)
    mine = Course(parts, parts.method, parts.layers)
    mine.record.sink = None
    for round in range(rounds):
        if round == 1:
            during(mine.engine)
        mine.step(round)
    return mine.state, mine.engine.memory, mine.record


def gap(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    return max((float((a[k].double() - b[k].double()).abs().max()) for k in a if isinstance(a[k], torch.Tensor)
                and a[k].numel()), default=0.0)


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in CASES])
def test_the_result_is_the_in_process_one_in_fp64(pool, data, tiny_llama_folder, method):
    far = course(recipe(data, tiny_llama_folder, method, **CASES[method]), pool)
    here = course(recipe(data, tiny_llama_folder, method, "in_process", **CASES[method]))
    assert gap(far[0], here[0]) < 1e-10 and gap(far[1], here[1]) < 1e-10
    assert far[2].totals() == here[2].totals()


def test_the_result_is_the_in_process_one_in_fp32_with_sgd(pool, data, tiny_llama_folder):
    far, here = (course(recipe(data, tiny_llama_folder, kind=kind, dtype="float32"), mine)
                 for kind, mine in (("ray", pool), ("in_process", None)))
    assert gap(far[0], here[0]) < 1e-5


@pytest.mark.slow
def test_a_killed_worker_s_share_is_done_again(pool, data, tiny_llama_folder):
    """SIGKILL to one worker's process in the middle of round 1: the same bits come out, in state and memories."""
    spec = recipe(data, tiny_llama_folder, "scaffold", local={"optimizer": "sgd", "lr": 0.1, "steps": 200,
                                                             "batch_size": 4})
    calm = course(spec, pool)

    def kill(engine):
        pid = engine.pool.pids[0]
        threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()

    far = course(spec, pool, during=kill)
    lost = [e for e in far[2].events if e["kind"] == "worker_lost"]
    assert len(lost) == 1 and lost[0]["round"] == 1 and "done again" in lost[0]["why"]
    assert gap(far[0], calm[0]) == 0 and gap(far[1], calm[1]) == 0


def test_the_order_of_answers_changes_nothing(pool, data, tiny_llama_folder):
    """The worker with the first share stands still for a while and answers last; the bits are the same."""
    spec = recipe(data, tiny_llama_folder, dtype="float32")
    calm = course(spec, pool)

    def hold(engine):
        pid = engine.pool.pids[0]
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()

    assert gap(course(spec, pool, during=hold)[0], calm[0]) == 0


@pytest.mark.slow
def test_a_share_that_is_late_is_missing_and_its_worker_replaced(pool, data, tiny_llama_folder):
    held = []

    def hold(engine):
        held.append(engine.pool.pids[0])
        os.kill(held[0], signal.SIGSTOP)

    started = time.monotonic()
    spec = recipe(data, tiny_llama_folder, clients={"quorum": 1, "deadline": 45.0})
    missing = [e for e in course(spec, pool, during=hold)[2].events if e["kind"] == "missing"]
    assert {e["round"] for e in missing} == {1} and 2 <= len(missing) <= 3
    assert all("deadline of 45.0 s passed before it answered" in e["why"] for e in missing)
    assert time.monotonic() - started < 240 and held[0] not in pool.pids


def test_an_error_of_a_client_ends_the_run_and_names_it(pool, data, tiny_llama_folder):
    parts = build(load_recipe(recipe(data, tiny_llama_folder)))
    parts.world.federation.clients["c3"].train.clear()
    parts.engine = over(pool, parts)
    with pytest.raises(DataError, match="client 'c3' has no training rows"):
        Course(parts, parts.method, parts.layers).step(0)


@pytest.mark.slow
def test_a_run_says_what_the_in_process_one_says(no_pool, data, tiny_llama_folder, tmp_path, monkeypatch):
    """`fedllm run` with a pool of its own: same record, one model load a worker, no process left."""
    import psutil

    pids, loads, close, taken = [], [], Pool.close, Ray._taken

    def closed(pool):
        pids.extend(pool.pids)
        close(pool)

    def took(engine, jobs, got):
        loads.append(got.loads)
        return taken(engine, jobs, got)

    monkeypatch.setattr(Pool, "close", closed)
    monkeypatch.setattr(Ray, "_taken", took)
    far = run(recipe(data, tiny_llama_folder), root=tmp_path)
    here = run(recipe(data, tiny_llama_folder, kind="in_process"), root=tmp_path)
    assert far.engine == "ray" and far.bytes == here.bytes and len(pids) == 2 and set(loads) == {1}
    assert far.evaluation["clients"]["c1"]["loss"] == pytest.approx(here.evaluation["clients"]["c1"]["loss"], abs=1e-10)
    assert not psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], 20)[1]


def light(work):
    """A worker that needs no model, to try the pool itself."""

    class Light:
        def pid(self):
            import os

            return os.getpid()

        def work(self, told, share):
            return work(told, share)

    return Light


def test_a_share_that_kills_every_worker_ends_the_run(no_pool, monkeypatch):
    def die(told, share):
        import os

        os._exit(1)

    pool = Pool(light(die), 1)
    monkeypatch.setattr(ray_pool, "LOSSES", 1)
    try:
        with pytest.raises(RunError, match=r"was lost 2 times; the last: worker \d+ was lost"):
            list(pool.work(pool.keep(None), ["share"], [float("inf")]))
    finally:
        pool.close()


def test_workers_share_the_clusters_cards(no_pool):
    def seen(told, share):
        import os

        import ray

        return os.environ.get("CUDA_VISIBLE_DEVICES"), ray.get_runtime_context().get_assigned_resources()["GPU"]

    pool = Pool(light(seen), 2)
    try:
        assert dict(pool.work(pool.keep(None), [0, 1], [float("inf")] * 2)) == {0: ("0", 0.5), 1: ("0", 0.5)}
    finally:
        pool.close()


def test_a_deadline_ends_the_wait_for_what_is_under_way_and_what_is_not(no_pool):
    def sleep(told, share):
        import time

        time.sleep(share)
        return share

    pool = Pool(light(sleep), 1)
    try:
        assert dict(pool.work(pool.keep(None), [0.0], [float("inf")])) == {0: 0.0}
        soon = time.monotonic() + 3.0
        got = dict(pool.work(pool.keep(None), [200.0, 200.0, 0.0], [soon, soon, float("inf")]))
        assert got == {0: Lost("before it answered"), 1: Lost("before its turn came"), 2: 0.0}
        assert time.monotonic() - soon < 150
    finally:
        pool.close()


def test_a_parcel_keeps_every_bit_and_takes_no_stack_along():
    stack = torch.arange(4000, dtype=torch.bfloat16).view(4, 1000)
    value = {"a": stack[1], "b": [stack[1], (7, "x")], "c": torch.tensor(3.5), "d": torch.zeros(0, 3), "e": b"raw"}
    parcel = wrap(value)
    again = unwrap(parcel)
    assert [raw.nbytes for _, _, raw in parcel.tensors] == [2000, 2000, 4, 0]
    assert torch.equal(again["a"], stack[1]) and again["a"].dtype == torch.bfloat16
    assert again["b"][1] == (7, "x") and again["c"] == 3.5 and again["d"].shape == (0, 3) and again["e"] == b"raw"
    again["a"].zero_()


def test_engines_of_other_organisations_are_refused_in_a_simulation(data, tiny_llama_folder):
    with pytest.raises(RecipeError, match=r"engine.kind = 'flower' runs between organisations.*`fedllm serve`"):
        build(load_recipe(recipe(data, tiny_llama_folder, kind="flower")))
