"""Commands of a real federation, mounted beside the others: `serve`, `join`, `keys`, `status`, `logs`, `stop`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedllm.cli.said import Json, printable, put
from fedllm.core.errors import DataError, RecipeError

app = typer.Typer(no_args_is_help=True, help="Run between organisations on different machines.")
keys = typer.Typer(no_args_is_help=True, help="Keys of a federation: one CA, and a kit for each site.")
app.add_typer(keys, name="keys")
console, out = Console(stderr=True), Console()

Folder = Annotated[Path, typer.Option("--federation", help="Folder that `fedllm keys new` made.")]
HERE = Path("federation")


@app.command()
def serve(recipe: Annotated[Path, typer.Argument(help="A recipe (YAML), or a run's folder to go on with.")],
          overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False,
                                                                help="Keys of the recipe to change.")] = None,
          federation: Folder = HERE, root: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
          needed: Annotated[int | None, typer.Option(help="Sites that must join; all of them by default.")] = None,
          wait: Annotated[float, typer.Option(help="Seconds to wait for the sites.")] = 600.0,
          metrics: Annotated[int | None, typer.Option(help="Port on this machine for /metrics and /healthz.")] = None,
          ask: Annotated[str | None, typer.Option(metavar="[HOST:]PORT", help="After the rounds, answer questions "
                                                  "here: a browser's, an OpenAI client's, `fedllm ask URL`.")] = None,
          ask_key_env: Annotated[str | None, typer.Option(help="Environment variable with the key that questions must "
                                                          "carry.")] = None,
          plugin: Annotated[list[Path] | None, typer.Option(
              "--plugin", metavar="FILE", show_default=False, help="Python file with the coordinator's half of a part "
              "of your own (repeat); sites must have it installed.")] = None,
          trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Go on with a folder whose "
                                                          "recipe names code to run.")] = False,
          as_json: Json = False) -> None:
    """Start the coordinator, run the recipe with the sites that have joined, and stop."""
    from fedllm.federation import serve as federate
    from fedllm.federation.answering import Desk
    from fedllm.federation.process import stoppable
    from fedllm.runs.complaints import parse_override

    try:
        if ask_key_env and ask is None:
            raise RecipeError("--ask-key-env: without --ask nobody asks questions; leave it out")
        desk = None if ask is None else Desk.at(ask, ask_key_env)
        with stoppable():
            if recipe.is_dir():
                if plugin:
                    raise RecipeError("--plugin: a run goes on with the plugins that it began with; give "
                                      "--trust-remote-code in its place, if you trust them")
                result = federate.resume_serving(recipe, federation, needed=needed, wait=wait, metrics=metrics,
                                                 desk=desk, trust_remote_code=trust_remote_code)
            else:
                more = {"plugins": [str(file) for file in plugin]} if plugin else {}
                result = federate.serve(recipe, federation, root=root, needed=needed, wait=wait, metrics=metrics,
                                        desk=desk, **dict(parse_override(text) for text in overrides or ()), **more)
    except KeyboardInterrupt:
        console.print("stopped; `fedllm serve runs/NAME` goes on where the run stood")
        raise typer.Exit(130) from None
    if as_json:
        return put({"event": "result", "folder": str(result.folder), **result.as_json()})
    console.print(f"done: {result.folder} (state {result.state_digest[:16]}, report {result.report_path})",
                  markup=False, highlight=False)


@app.command()
def join(address: Annotated[str, typer.Argument(help="host:port of the coordinator.")],
         data: Annotated[Path, typer.Option("--data", help="File or folder with this site's rows, which never leave; "
                                                            "or env:NAME.")],
         kit: Annotated[Path, typer.Option("--kit", help="Startup kit that the coordinator sent.")] = Path("kit"),
         allow: Annotated[list[str] | None, typer.Option(help="Method that may run here (repeat); default: all "
                                                              "installed.")] = None,
         models: Annotated[list[str] | None, typer.Option(help="Folder that models may be read from.")] = None,
         model: Annotated[str | None, typer.Option(help="Model that this site holds: a name of the recipe's models, a "
                                                        "folder, or an id; default: the recipe's.")] = None,
         endpoint: Annotated[str | None, typer.Option(help="Address of the text endpoint that this site's text may be "
                                                           "put to, whatever the recipe names.")] = None,
         public: Annotated[Path | None, typer.Option(help="A copy of the run's public rows.")] = None,
         rank: Annotated[int | None, typer.Option(help="LoRA rank that this site can afford.")] = None,
         shares: Annotated[str | None, typer.Option(help="What answers to queries hold: snippets, ids, or (no "
                                                         "text) scores, or counts.")] = None,
         policy: Annotated[Path | None, typer.Option(help="YAML file with what this site allows: keys of "
                                                          "its settings, which win over options.")] = None,
         text_leaves: Annotated[bool, typer.Option(help="Whether a reply may hold text.")] = False,
         threads: Annotated[int, typer.Option(help="Threads of the model.")] = 1,
         processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that train together here, each with its "
                                                                    "shard of the model.")] = 1,
         as_json: Json = False) -> None:
    """Take part in a federation with this machine's data, until stopped."""
    from fedllm.federation.academy.join import is_academy_kit, join_academy
    from fedllm.federation.flower.join import is_flower_kit, join_flower
    from fedllm.federation.nvflare.join import join as take_part
    from fedllm.federation.settings import SCENE
    from fedllm.methods.registry import METHODS
    from fedllm.tasks.row import nearest

    take_part = join_flower if is_flower_kit(kit) else join_academy if is_academy_kit(kit) else take_part
    if not data.exists() and not str(data).startswith(SCENE):
        raise DataError(f"--data {str(data)!r}: no such file or folder (looked in {Path.cwd()})", file=str(data))
    if unknown := [m for m in allow or () if m not in METHODS]:
        raise RecipeError(f"--allow {unknown[0]!r} is no method{nearest(unknown[0], METHODS) or '.'} `fedllm "
                          "methods` lists them")
    if as_json:
        put({"joining": address, "data": str(data)})
    console.print(f"joining {address} with the rows of {data}; Ctrl-C ends it", markup=False, highlight=False)
    take_part(address, data, kit=kit, methods=allow, models=models or [], policy=policy, text_leaves=text_leaves,
              threads=threads, processes=processes, model=model, endpoint={"url": endpoint} if endpoint else None,
              public=str(public) if public else None,
              profile={k: v for k, v in (("rank", rank), ("shares", shares)) if v is not None})


RunPath = Annotated[Path, typer.Argument(help="A run's folder.", show_default=False)]


@app.command()
def status(run: RunPath, as_json: Json = False) -> None:
    """How a federation's run stands: rounds, bytes, and each site."""
    from fedllm.federation.operate import Tally

    now = Tally(run).look().as_json()
    if as_json:
        return put(now)
    out.print(f"{now['run']}: {printable(now['state'])}\n{now['method']}, {now['rounds']} of {now['of']} rounds "
              f"({now['skipped']} skipped), {now['down']:,} bytes down, {now['up']:,} bytes up", highlight=False,
              markup=False)
    for site, said in now["sites"].items():
        out.print(f"  {printable(site)}: {said['state']}, {said['missing']} answers missing, "
                  f"{said['refused']} refused {said['why']}".rstrip(),
                  highlight=False, markup=False)


@app.command()
def logs(path: Annotated[Path, typer.Argument(help="A run's folder (its events) or a kit (its process's log).")],
         last: Annotated[int, typer.Option(min=1, help="How many lines.")] = 20, as_json: Json = False) -> None:
    """The last lines of a run's record, one JSON object each, or of a kit's log."""
    from fedllm.federation.operate import log_lines

    for line in log_lines(path, last):
        if as_json:
            put({"line": line})
            continue
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def stop(run: RunPath, wait: Annotated[float, typer.Option(help="Seconds to wait for its end.")] = 60.0,
         as_json: Json = False) -> None:
    """End the `fedllm serve` of this run, in order; `fedllm serve RUN` goes on with it."""
    from fedllm.federation.operate import stop as end

    process = end(run, wait)
    if as_json:
        return put({"ended": process, "run": str(run)})
    out.print(f"process {process} ended; `fedllm serve {run}` goes on with the run", highlight=False, markup=False)


@keys.command("new")
def new(sites: Annotated[list[str], typer.Argument(help="Names of the sites.")], federation: Folder = HERE,
        host: Annotated[str, typer.Option(help="Name under which sites reach the coordinator.")] = "localhost",
        port: Annotated[int, typer.Option(help="Its port.")] = 8002,
        engine: Annotated[str, typer.Option(help="flare (NVFlare), flower, or academy.")] = "flare",
        as_json: Json = False) -> None:
    """Make a CA, the coordinator's kit and a kit for each site; send each site its own."""
    from fedllm.federation.academy.keys import new_academy_federation
    from fedllm.federation.flower.keys import new_flower_federation
    from fedllm.federation.nvflare.keys import new_federation

    makers = {"flare": new_federation, "flower": new_flower_federation, "academy": new_academy_federation}
    if engine not in makers:
        raise RecipeError(f"--engine {engine!r}: allowed are {', '.join(makers)}")
    made: Any = makers[engine](federation, sites, host, port)
    secret = made.folder / ("ca" if engine == "flare" else "server")
    if as_json:
        return put({"kits": str(made.folder / "kits"), "secret": str(secret)})
    console.print(f"kits are in {made.folder / 'kits'}; give each site its own, and keep {secret} secret")


@keys.command("add")
def add(sites: Annotated[list[str], typer.Argument(help="Names of further sites.")], federation: Folder = HERE,
        as_json: Json = False) -> None:
    """Kits for further sites, signed by the same CA; the coordinator need not be restarted."""
    from fedllm.federation.academy.keys import add_academy_sites
    from fedllm.federation.flower.keys import add_flower_sites
    from fedllm.federation.keyring import made_for
    from fedllm.federation.nvflare.keys import add_sites

    adders = {"flower": add_flower_sites, "academy": add_academy_sites}
    made: Any = adders.get(made_for(federation), add_sites)(federation, sites)
    if as_json:
        return put({"kits": str(made.folder / "kits")})
    console.print(f"kits are in {made.folder / 'kits'}")


@keys.command("suspend")
def suspend(site: str, federation: Folder = HERE, as_json: Json = False) -> None:
    """The running coordinator refuses this site until `restore`."""
    _change("suspend", site, federation)
    _told(site, "suspended", as_json)


@keys.command("restore")
def restore(site: str, federation: Folder = HERE, as_json: Json = False) -> None:
    """A suspended site may join again."""
    _change("restore", site, federation)
    _told(site, "restored", as_json)


@keys.command("revoke")
def revoke(site: str, federation: Folder = HERE, as_json: Json = False) -> None:
    """This site never joins again: it is refused from now on, its kit is deleted, its name is not given again."""
    from fedllm.federation.nvflare import serve as federate
    from fedllm.federation.nvflare.keys import revoke_site

    if (own := _keyring(federation)) is not None:
        own.revoke(site)
    elif not federate.suspend_if_running(revoke_site(federation, site), site):
        console.print("the coordinator is not running; it will refuse the site from its next start on")
    _told(site, "revoked", as_json)


def _told(site: str, state: str, as_json: bool) -> None:
    if as_json:
        put({"site": site, "state": state})


def _keyring(federation: Path) -> Any:
    """The keys of a federation whose file says at once who is barred; None where NVFlare's server is told."""
    from fedllm.federation.academy.keys import AcademyFederation
    from fedllm.federation.flower.keys import FlowerFederation
    from fedllm.federation.keyring import made_for

    made = {"flower": FlowerFederation, "academy": AcademyFederation}.get(made_for(federation))
    return made and made(federation.resolve())


def _change(what: str, site: str, federation: Path) -> None:
    from fedllm.federation.nvflare import serve as federate
    from fedllm.federation.nvflare.keys import Federation

    if (own := _keyring(federation)) is not None:
        {"suspend": own.suspend, "restore": own.restore}[what](site)
    else:
        {"suspend": federate.suspend, "restore": federate.restore}[what](Federation(federation.resolve()), site)
