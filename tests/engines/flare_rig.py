"""A real federation on loopback for tests: NVFlare's server and three sites, all processes, over mutual TLS."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil

from fedllm.app import federate
from fedllm.app.federate_keys import new_federation
from fedllm.app.federate_process import end_tree
from fedllm.app.federate_site import versions
from fedllm.app.folder import RunFolder, fresh_path
from fedllm.app.recipe import load_recipe
from fedllm.engines.flare_sites import Patience

SITES = ("site-a", "site-b", "site-c")
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "say", "the", "word", "is", "good"]
QUICK = Patience(opening=200.0, probe=4.0, every=2.0, grace=300.0, revive=20.0)


def sentence(k, i, least=2):
    return " ".join(WORDS[(7 * i + 3 * k + j * (i + 1)) % len(WORDS)] for j in range(least + (5 * i + k) % 9))


def write_data(folder):
    """One file a site, and a test file of the coordinator's."""
    (folder / "data").mkdir(parents=True)
    for k, (site, n) in enumerate(zip(SITES, (12, 15, 9), strict=True)):
        rows = [{"prompt": sentence(k, i), "response": sentence(k + 1, i)} for i in range(n)]
        (folder / "data" / f"{site}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [{"prompt": sentence(9, i), "response": sentence(8, i)} for i in range(6)]
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def recipe(rig, method, knobs=None, **more):
    """A run over the rig's data; in a simulation each file is a client of the same name."""
    base = {"name": method, "model": rig.model, "method": {"name": method, **(knobs or {})},
            "space": {"name": "lora", "rank": 4}, "local": {"lr": 1e-2, "steps": 2, "batch_size": 4}, "rounds": 2,
            "data": {"source": str(rig.folder / "data"), "partition": {"kind": "per_file"},
                     "test": str(rig.folder / "test.jsonl")},
            "evaluate": {"exact_match": False, "samples": 0}, "engine": "in_process"}
    return {**base, **more}


class Rig:
    """The running federation."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        write_data(folder)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.keys = new_federation(folder / "keys", SITES, port=self.port)
        self.joins = {}

    def join(self, site, **settings):
        words = {"kit": str(self.keys.kit(site)), "models": [self.model], **settings}
        code = ("import sys, json; from fedllm.app.federate_join import join; a = json.loads(sys.argv[1]); "
                "join(a.pop('address'), a.pop('data'), **a)")
        data = str(self.folder / "data" / f"{site}.jsonl")
        told = json.dumps({"address": f"localhost:{self.port}", "data": data, **words})
        self.joins[site] = subprocess.Popen([sys.executable, "-c", code, told])

    @contextlib.contextmanager
    def settings(self, site, **changed):
        """The organisation edits its settings; they hold for the next run."""
        path = self.keys.kit(site) / "local" / "fedllm.json"
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), **changed}))
        try:
            yield
        finally:
            path.write_text(before)

    def leave(self, site):
        join = self.joins.pop(site)
        join.terminate()
        try:
            join.wait(40)
        except subprocess.TimeoutExpired:
            end_tree(join.pid)

    def job_process(self, site):
        """The pid of the site's own job process, or None."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for p in psutil.Process(self.joins[site].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "nvflare.private.fed.app.client.worker_process" in p.cmdline():
                        return p.pid
        return None

    def coordinator_process(self):
        """The pid of the server's job process, or None."""
        for p in psutil.process_iter(["cmdline"]):
            line = p.info["cmdline"] or []
            if any("server.runner_process" in w for w in line) and str(self.keys.kit("server")) in line:
                return p.pid
        return None

    def folder_of(self, spec):
        checked = load_recipe(spec)
        path = fresh_path(self.folder / "far", checked.name)
        return RunFolder.create(path, {**checked.model_dump(mode="json"), "versions": versions()}).path

    def run(self, spec, needed=3, patience=QUICK, during=None):
        """The run's result; `during(run folder)` happens beside it, on a thread."""
        path = self.folder_of(spec)
        trouble = []

        def beside():
            try:
                during(path)
            except BaseException as error:
                trouble.append(error)

        thread = threading.Thread(target=beside, daemon=True) if during else None
        if thread:
            thread.start()
        result = federate.carry_out(self.session, path, needed, 120.0, patience)
        if thread:
            thread.join(60)
            assert not trouble, trouble
        return result


def events(path, kind=None):
    lines = (path / "events.jsonl").read_text().splitlines() if (path / "events.jsonl").exists() else []
    out = []
    for line in lines:
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return [e for e in out if kind in (None, e["kind"])]


def until(condition, seconds=150.0):
    """Wait until the condition holds; its value."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


@contextlib.contextmanager
def running_rig(folder, model):
    rig = Rig(folder, model)
    try:
        with federate.server(rig.keys):
            for site in SITES:
                rig.join(site)
            with federate.admin(rig.keys, 120.0) as rig.session:
                yield rig
    finally:
        for site in list(rig.joins):
            rig.leave(site)


def stop(pid):
    psutil.Process(pid).send_signal(signal.SIGSTOP)


def go_on(pid):
    psutil.Process(pid).send_signal(signal.SIGCONT)
