"""The command line: `fedllm run`, `resume`, `plan`, `methods`, `replay`, `report`, `export`, `chat`, `ask`, tools."""

from __future__ import annotations

import contextlib
import difflib
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli.advise import advise
from fedllm.cli.ask import ask
from fedllm.cli.audit import audit
from fedllm.cli.compare import compare
from fedllm.cli.compliance import compliance
from fedllm.cli.consoles import stand_open
from fedllm.cli.evaluate import evaluate
from fedllm.cli.federate import app as federation
from fedllm.cli.group import group
from fedllm.cli.guard import guarded, quiet, refuse, stopped
from fedllm.cli.judge import judge
from fedllm.cli.measure import bench, claims
from fedllm.cli.origin import origin
from fedllm.cli.outcome import out, show_done, show_made
from fedllm.cli.said import Json, put, schema
from fedllm.cli.typed import lines as _lines
from fedllm.core.errors import RecipeError
from fedllm.core.version import VERSION

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.add_typer(federation)  # serve, join, keys
app.add_typer(audit, name="audit")
app.command()(advise)
app.command()(ask)
app.command()(compare)
app.command()(compliance)
app.command()(evaluate)
app.command()(group)
app.command()(judge)
app.command()(origin)
app.command()(schema)
for tool in (bench, claims):
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(tool)

RunPath = Annotated[Path, typer.Argument(help="A run's folder, as in runs/demo.", show_default=False)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the run's recipe names: of its "
                                            "model, of plugin files, of a metric.")]
RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False,
                                                       help="Keys of the recipe to change.")]


Plugins = Annotated[list[Path] | None, typer.Option("--plugin", metavar="FILE", show_default=False, help=(
    "Python file with a method, layer, space or selector of your own (repeat)."))]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedllm {VERSION}")
        raise typer.Exit


@app.callback()
def about(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                help="Print the version and end.")] = False) -> None:
    """Train, tune, prompt and test large language models across clients whose data must not move."""


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, plugin: Plugins = None,
        root: Annotated[Path, typer.Option(help="Folder in which the run's folder is made.")] = Path("runs"),
        live: Annotated[bool, typer.Option("--live", help="Draw clients, bytes, the loss and trouble while it runs.")
                        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line: progress, then the "
                                                             "result (`fedllm schema run`).")] = False) -> None:
    """Run a recipe: [bold]fedllm run recipe.yaml method=fedprox local.lr=1e-3[/bold]."""
    from fedllm.report.report import publish
    from fedllm.runs.progress import JsonLines
    from fedllm.runs.stages import begin
    from fedllm.runs.terminal import live_view

    with stopped("nothing was kept yet"):
        if live and as_json:
            raise RecipeError("--live and --json are two ways to tell the same; take one")
        with live_view() if live else contextlib.nullcontext(JsonLines(sys.stdout) if as_json else None) as shown:
            result = begin(recipe, root, _parsed(overrides, plugin), publish, shown)
        show_done(result, as_json)


@app.command()
def resume(path: RunPath, overrides: Annotated[list[str] | None, typer.Argument(
        metavar="[rounds=N]", show_default=False, help="More rounds than the run was begun with.")] = None,
           plugin: Plugins = None, trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Go on with a run that was stopped (it ends as if it had not been), or give it more rounds."""
    from fedllm.report.report import publish
    from fedllm.runs.progress import JsonLines
    from fedllm.runs.stages import go_on

    with stopped(f"`fedllm resume {path}` goes on where the run stood"):
        show_done(go_on(path, publish, plugins=plugin or (), trust_remote_code=trust_remote_code,
                     overrides=_parsed(overrides), shown=JsonLines(sys.stdout) if as_json else None), as_json)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, plugin: Plugins = None,
         proposed: Annotated[bool, typer.Option("--propose", help=(
             "For the epsilon of its dp_sgd: rounds, rate, clip and batch, from rehearsals on data.public."))] = False,
         as_json: Json = False) -> None:
    """Foresee bytes, seconds and memory of a recipe by running a small slice of it."""
    from fedllm.cli.tables import show_plan, show_proposal
    from fedllm.runs.plan import plan as foresee
    from fedllm.runs.rehearse import propose

    with stopped("a plan writes nothing"):
        found = (propose if proposed else foresee)(recipe, **_parsed(overrides, plugin))
    if as_json:
        put(found.as_json())
    else:
        (show_proposal if proposed else show_plan)(out, found)


@app.command()
def methods(method: Annotated[str | None, typer.Argument(help="A method's id.", show_default=False)] = None,
            carrier: Annotated[str | None, typer.Option(help=(
                "Of transfer with an owner's model, those whose clients send adapters, logits, text, grades or seeds.")
                )] = None,
            direction: Annotated[str | None, typer.Option(help="Those that teach: to clients, to owner, both.")] = None,
            improves: Annotated[str | None, typer.Option(help="Whose model: owner, clients, both, answers.")] = None,
            spares: Annotated[str | None, typer.Option(help="What for: rows, model, compute, designs.")] = None,
            plugin: Plugins = None,
            as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a method.")] = False) -> None:
    """List all methods, those through which knowledge moves in some way, or show one: card, knobs, claim and file."""
    from fedllm.cli.tables import method_facts, show_method, show_methods
    from fedllm.methods.registry import moving
    from fedllm.runs.plugins import plugged

    plugged([(str(file), None) for file in plugin or ()])
    names = [method] if method else moving(carrier=carrier, direction=direction, improves=improves, spares=spares)
    if as_json:
        for name in names:
            put(method_facts(name))
        return
    show_methods(out, names) if method is None else show_method(out, method)


@app.command()
def replay(path: RunPath, reducer: Annotated[str | None, typer.Option(help="mean, uniform or median; without it, the "
                                                                      "method's own.")] = None,
           without: Annotated[str | None, typer.Option(metavar="CLIENT", help=(
               "Take this client out of the run: what could not hang on it comes from the record, the rest of the "
               "clients is asked anew."))] = None,
           trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Run the server again from recorded replies, with another reducer, without clients or data; or without a client
    that leaves."""
    from fedllm.cli.without import take_out
    from fedllm.runs.replay import replay as again

    if without is not None:
        return take_out(out, path, without, reducer, trust_remote_code, as_json)
    got = again(path, reducer, trust_remote_code)
    if as_json:
        return put(asdict(got))
    away = f"{got.distance:.1%} of the run's way from the recorded state"
    same = "the recorded state, bit for bit" if got.same else away
    out.print(f"{got.rounds} rounds folded again ({got.reducer}): {same}\nstate  {got.state_digest}\n"
              f"model  {got.folder}", highlight=False, markup=False)


@app.command()
def recipe(keys: Annotated[bool, typer.Option("--keys", help="Every key: type, default, meaning.")] = False,
           as_json: Json = False) -> None:
    """What a recipe may hold: [bold]fedllm recipe --keys[/bold]."""
    from fedllm.runs.keys import listed, page

    if not keys:
        raise RecipeError("`fedllm recipe --keys` shows every key that a recipe may have, with its type, default and "
                          "meaning")
    if as_json:
        return put({"keys": listed()})
    typer.echo(page(), nl=False)


@app.command()
def report(path: RunPath, plugin: Plugins = None, trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Write report.html and model_card.md afresh from a run's record."""
    from fedllm.report.report import write_report

    show_made("report", write_report(path, trust_remote_code, plugin or ()), as_json)


@app.command()
def dashboard(folders: Annotated[list[Path] | None, typer.Argument(metavar="[RUNS]...", show_default=False, help=(
                  "Folders of runs, or a run's. Default: runs/ and comparisons/."))] = None,
              port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8321,
              host: Annotated[str, typer.Option(help="Address to listen on; on another than loopback the page asks for "
                                                     "a token, which is printed.")] = "127.0.0.1",
              as_json: Json = False) -> None:
    """Show runs on a live page: curves, clients, bytes, privacy spent, trouble; stop them and go on with them."""
    from fedllm.dashboard.serve import dashboard as serve

    def say(address: str) -> None:
        if as_json:
            return put({"address": address})
        out.print(f"the dashboard is at {address} (Ctrl-C ends it)", highlight=False, markup=False, soft_wrap=True)

    serve(folders or (), host=host, port=port, say=say)


@app.command()
def track(path: RunPath, to: Annotated[list[str], typer.Option("--to", show_default=False, help=(
        "tensorboard, mlflow, wandb or trackio (repeat)."))], as_json: Json = False) -> None:
    """Tell trackers what a run's record holds and they do not know yet."""
    from fedllm.runs.tracked import track as tell

    told = list(tell(path, to))
    if as_json:
        return put({"told": told})
    for where in told:
        out.print(where, highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(path: RunPath, merge: Annotated[bool, typer.Option("--merge/--peft", help="A merged model, or the PEFT "
                                                              "adapter.")] = False,
           gguf: Annotated[bool, typer.Option("--gguf", help="The merged model as a GGUF file.")] = False,
           kind: Annotated[str, typer.Option("--type", help="Of a GGUF file's matrices: f32, f16, q8_0.")] = "f16",
           to: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None,
           round: Annotated[int | None, typer.Option(min=0, help="The model after so many rounds, of a run with "
                                                                 "record.keep_rounds.")] = None,
           trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Export a run's model for transformers, vLLM or llama.cpp."""
    from fedllm.runs.export import export as go

    made = go(path, to, merge=merge, gguf=kind if gguf else None, round=round, trust_remote_code=trust_remote_code)
    show_made("model", made, as_json)


@app.command()
def chat(path: RunPath, temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
         max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: the recipe's "
                                                                        "evaluate.max_new_tokens.")] = None,
         raw: Annotated[bool, typer.Option(help="Send lines without the recipe's frame.")] = False,
         trust_remote_code: Trust = False, as_json: Annotated[bool, typer.Option("--json", help=(
             "Print one JSON object for each line that was typed."))] = False) -> None:
    """Talk to a run's model."""
    from fedllm.cli.chat import chat as talk

    if not math.isfinite(temperature):  # NaN passes every bound
        raise RecipeError(f"--temperature = {temperature}: allowed is a number from 0 up; 0 is greedy")
    talk(path, out, _lines, temperature=temperature, raw=raw, max_new_tokens=max_new_tokens,
         trust_remote_code=trust_remote_code, put=put if as_json else None)


@app.command()
def demo(root: Annotated[Path, typer.Option(help="Folder in which the run's folder is made.")] = Path("runs"),
         llm: Annotated[bool, typer.Option("--llm", help="On SmolLM2-135M-Instruct, in some six minutes.")] = False,
         as_json: Json = False) -> None:
    """Eight institutions tune the embedded model together; offline, in a few minutes."""
    from fedllm.cli.demo import LLM, RECIPE
    from fedllm.cli.demo import demo as show

    with stopped("nothing was kept yet"):
        if as_json:
            return run(LLM if llm else RECIPE, root=root, as_json=True)
        show(out, root, LLM if llm else RECIPE)


def _parsed(overrides: list[str] | None, plugins: list[Path] | None = None) -> dict[str, Any]:
    from fedllm.runs.complaints import parse_override

    more = {"plugins": [str(file) for file in plugins]} if plugins else {}
    return {**dict(parse_override(text) for text in overrides or ()), **more}


def main(args: list[str] | None = None) -> None:
    """Run the command line; what goes wrong on purpose is one red panel; exit code 2 for bad input, 1 for a run that
    failed."""
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    quiet(debug)
    stand_open()
    known = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    word = next((a for a in given if not a.startswith("-")), None)
    if word and given[0] == word and word not in known:
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        return refuse(RecipeError(f"'{word}' is no command{hint} Commands: {', '.join(known)}"))
    guarded(lambda: app(given, standalone_mode=True), debug, "--json" in given)


if __name__ == "__main__":
    main()
