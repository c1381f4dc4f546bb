"""A real Flower federation on loopback for tests: a SuperLink and three SuperNodes, all processes, with TLS and keys."""

import contextlib
import json
import socket
import subprocess
import sys
import threading

import psutil
from flare_rig import SITES, write_data

from fedllm.app import flower_serve
from fedllm.app.federate_process import end_tree
from fedllm.app.federate_site import versions
from fedllm.app.flower_keys import new_flower_federation
from fedllm.app.folder import RunFolder, fresh_path
from fedllm.app.recipe import load_recipe


class Rig:
    """The running federation."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        write_data(folder)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.keys = new_flower_federation(folder / "keys", SITES, port=self.port)
        self.joins, self.nodes = {}, {}

    def join(self, site, kit=None, **settings):
        words = {"kit": str(kit or self.keys.kit(site)), "models": [self.model], **settings}
        code = ("import sys, json; from fedllm.app.flower_join import join_flower; a = json.loads(sys.argv[1]); "
                "join_flower(a.pop('address'), a.pop('data'), **a)")
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

    def process(self, site, module):
        """The pid of the site's `flower_supernode` or `flower_desk`, or None."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for p in psutil.Process(self.joins[site].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if f"fedllm.app.{module}" in p.cmdline():
                        return p.pid
        return None

    def folder_of(self, spec):
        checked = load_recipe({**spec, "engine": "flower"})
        path = fresh_path(self.folder / "far", checked.name)
        return RunFolder.create(path, {**checked.model_dump(mode="json"), "versions": versions()}).path

    def run(self, spec, needed=3, patience=None, during=None):
        """The run's result; `during(run folder)` happens beside it, on a thread."""
        path, trouble = self.folder_of(spec), []

        def beside():
            try:
                during(path)
            except BaseException as error:
                trouble.append(error)

        thread = threading.Thread(target=beside, daemon=True) if during else None
        if thread:
            thread.start()
        result = flower_serve.carry_out_flower(self.keys, self.nodes, path, needed, 120.0, patience)
        if thread:
            thread.join(60)
            assert not trouble, trouble
        return result


@contextlib.contextmanager
def running_flower(folder, model):
    rig = Rig(folder, model)
    try:
        with flower_serve.superlink(rig.keys) as rig.nodes:
            for site in SITES:
                rig.join(site)
            yield rig
    finally:
        for site in list(rig.joins):
            rig.leave(site)
