"""Commands of a real federation: `serve`, `join` and `keys`, to be mounted beside the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedllm.core.errors import FedLLMError

app = typer.Typer(no_args_is_help=True, help="Run between organisations on different machines.")
keys = typer.Typer(no_args_is_help=True, help="Keys of a federation: one CA, and a kit for each site.")
app.add_typer(keys, name="keys")
console = Console(stderr=True)

Folder = Annotated[Path, typer.Option("--federation", help="Folder that `fedllm keys new` made.")]
HERE = Path("federation")


def _refuse(error: FedLLMError) -> typer.Exit:
    console.print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False)
    return typer.Exit(1)


@app.command()
def serve(recipe: Annotated[Path, typer.Argument(help="A recipe (YAML), or a run's folder to go on with.")],
          federation: Folder = HERE, root: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
          needed: Annotated[int | None, typer.Option(help="Sites that must join; all of them by default.")] = None,
          wait: Annotated[float, typer.Option(help="Seconds to wait for the sites.")] = 600.0) -> None:
    """Start the coordinator, run the recipe with the sites that have joined, and stop."""
    from fedllm.app import federate

    try:
        if recipe.is_dir():
            result = federate.resume_serving(recipe, federation, needed=needed, wait=wait)
        else:
            result = federate.serve(recipe, federation, root=root, needed=needed, wait=wait)
    except FedLLMError as error:
        raise _refuse(error) from None
    console.print(f"done: {result.folder} (state {result.state_digest[:16]}, report {result.report_path})")


@app.command()
def join(address: Annotated[str, typer.Argument(help="host:port of the coordinator.")],
         data: Annotated[Path, typer.Option("--data", help="File or folder with this site's rows; they never leave.")],
         kit: Annotated[Path, typer.Option("--kit", help="Startup kit that the coordinator sent.")] = Path("kit"),
         allow: Annotated[list[str] | None, typer.Option(help="Method that may run here (repeat); default: all "
                                                              "installed.")] = None,
         models: Annotated[list[str] | None, typer.Option(help="Folder that models may be read from.")] = None,
         rank: Annotated[int | None, typer.Option(help="LoRA rank that this site can afford.")] = None,
         text_leaves: Annotated[bool, typer.Option(help="Whether a reply may hold text.")] = True,
         threads: Annotated[int, typer.Option(help="Threads of the model.")] = 1) -> None:
    """Take part in a federation with this machine's data, until stopped."""
    from fedllm.app.federate_join import join as take_part

    try:
        take_part(address, data, kit=kit, methods=allow, models=models or [], text_leaves=text_leaves, threads=threads,
                  profile={} if rank is None else {"rank": rank})
    except FedLLMError as error:
        raise _refuse(error) from None


@keys.command("new")
def new(sites: Annotated[list[str], typer.Argument(help="Names of the sites.")], federation: Folder = HERE,
        host: Annotated[str, typer.Option(help="Name under which sites reach the coordinator.")] = "localhost",
        port: Annotated[int, typer.Option(help="Its port.")] = 8002) -> None:
    """Make a CA, the coordinator's kit and a kit for each site; send each site its own."""
    from fedllm.app.federate_keys import new_federation

    try:
        made = new_federation(federation, sites, host, port)
    except FedLLMError as error:
        raise _refuse(error) from None
    console.print(f"kits are in {made.folder / 'kits'}; give each site its own, and keep {made.folder / 'ca'} secret")


@keys.command("add")
def add(sites: Annotated[list[str], typer.Argument(help="Names of further sites.")], federation: Folder = HERE) -> None:
    """Kits for further sites, signed by the same CA; the coordinator need not be restarted."""
    from fedllm.app.federate_keys import add_sites

    try:
        made = add_sites(federation, sites)
    except FedLLMError as error:
        raise _refuse(error) from None
    console.print(f"kits are in {made.folder / 'kits'}")


@keys.command("suspend")
def suspend(site: str, federation: Folder = HERE) -> None:
    """The running coordinator refuses this site until `restore`."""
    _change("suspend", site, federation)


@keys.command("restore")
def restore(site: str, federation: Folder = HERE) -> None:
    """A suspended site may join again."""
    _change("restore", site, federation)


def _change(what: str, site: str, federation: Path) -> None:
    from fedllm.app import federate
    from fedllm.app.federate_keys import Federation

    try:
        {"suspend": federate.suspend, "restore": federate.restore}[what](Federation(federation.resolve()), site)
    except FedLLMError as error:
        raise _refuse(error) from None
