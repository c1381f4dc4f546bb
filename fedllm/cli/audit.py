"""Commands of an audit, to be mounted beside the others: `fedllm audit RUN` and `fedllm audit verify RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from fedllm.cli.said import Json, put


class RunFirst(TyperGroup):
    """`fedllm audit runs/demo` is short for `fedllm audit run runs/demo`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


audit = typer.Typer(cls=RunFirst, no_args_is_help=True,
                    help="Audit a run (`fedllm audit RUN`): what it gives away; or check that its record is intact.")
console = Console()
Path_ = Annotated[Path, typer.Argument(help="A run's folder, as in runs/demo.")]


@audit.command()
def run(path: Path_,
        only: Annotated[list[str] | None, typer.Option(
            help="membership, canaries, memorization or leak; may be given several times. Default: all that apply.")
        ] = None,
        shadows: Annotated[int, typer.Option(help="Runs of the recipe on random halves of the rows, for LiRA.")] = 0,
        rows: Annotated[int, typer.Option(help="Most rows of each kind that are scored.")] = 1000,
        transcript: Annotated[bool, typer.Option(
            "--transcript", help="Read the replies that the run kept; an error where it kept none.")] = False,
        max_auc: Annotated[float, typer.Option(help="Limit: AUC of the best membership score.")] = 0.7,
        max_exposure: Annotated[float, typer.Option(help="Limit: bits of exposure of planted canaries.")] = 5.0,
        max_memorized: Annotated[float, typer.Option(help="Limit: share of training rows said, over held-out rows.")
                                 ] = 0.1,
        max_leak: Annotated[float, typer.Option(help="Limit: F1 of tokens read from messages, over a guess.")] = 0.2,
        trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the run's recipe "
                                                        "names.")] = False,
        as_json: Json = False) -> None:
    """Measure what a run's model and messages give away. Exit code 1 when a figure is over its limit.

    Writes audit.json into the run's folder, and a section into its report.
    """
    from fedllm.audits.audit_run import audit_run
    from fedllm.audits.privacy_audit import PrivacyAudit
    from fedllm.report.report import write_report

    gates = PrivacyAudit(max_auc, max_exposure, max_memorized, max_leak)
    done = audit_run(path, gates=gates, only=only or (), shadows=shadows, rows=rows, transcript=transcript,
                     trust_remote_code=trust_remote_code)
    write_report(path, trust_remote_code)
    if as_json:
        put(done.as_json())
    else:
        for c in done.checks:
            mark = "[green]pass[/]" if c.holds else "[bold red]FAIL[/]"
            console.print(f"{mark} {c.name:18} {c.figure:8.3f} <= {c.limit:<8g} {c.says}", highlight=False,
                          soft_wrap=True)
        for name, why in done.left_out.items():
            console.print(f"[dim]none[/] {name:18} {escape(str(why))}", highlight=False, soft_wrap=True)
        broken = [c.name for c in done.checks if not c.holds]
        said = f"FAIL: {', '.join(broken)}" if broken else "PASS"
        console.print(f"audit of {escape(str(path))}: {said}", highlight=False, soft_wrap=True)
    if not done.passes:
        raise typer.Exit(1)


@audit.command()
def verify(path: Path_,
           head: Annotated[str | None, typer.Option(help="The hash that you kept of the run's last event.")] = None,
           key: Annotated[Path | None, typer.Option(help="audit.pub of whoever signed the run: then nothing that was "
                                                         "rewritten passes.")] = None, as_json: Json = False) -> None:
    """Find every line of a run's record that was edited, dropped, added or moved. Exit code 1 when there is one."""
    from fedllm.runs.seal import verify as look
    from fedllm.runs.signature import against_signature

    found = look(path)
    findings = list(found.findings)
    if head is not None and head != found.head:
        findings.append(f"the last line's hash is {found.head or 'none'}, and you kept {head}")
    if key is not None:
        findings += against_signature(path, key, found.head)
    if as_json:
        put({"intact": not findings, "findings": [str(f) for f in findings], "events": found.events,
             "finished": found.finished, "head": found.head})
        raise typer.Exit(1 if findings else 0)
    for finding in findings[:50]:
        console.print(f"[bold red]changed[/] {escape(str(finding))}", highlight=False, soft_wrap=True)
    if len(findings) > 50:
        console.print(f"and {len(findings) - 50} more", highlight=False)
    if findings:
        raise typer.Exit(1)
    state = "a finished run" if found.finished else "a run that is not finished"
    console.print(f"intact: {found.events} events of {state}\nhead    {found.head}", highlight=False, soft_wrap=True)


@audit.command()
def seal(path: Path_, key: Annotated[Path, typer.Option(help="audit.key of the coordinator.")],
         as_json: Json = False) -> None:
    """Sign a finished run as it stands (after `fedllm audit run`, or a report written afresh)."""
    from fedllm.runs.seal import verify as look
    from fedllm.runs.signature import sign

    if findings := look(path).findings:
        if as_json:
            put({"sealed": 0, "findings": [str(f) for f in findings]})
        else:
            console.print(f"[bold red]not sealed[/] {findings[0]}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    files = len(sign(path, key)["files"])
    if as_json:
        return put({"sealed": files, "findings": []})
    console.print(f"sealed: {files} files", highlight=False)


@audit.command("key")
def new_key(folder: Annotated[Path, typer.Argument(help="Where audit.key and audit.pub are written.")],
            as_json: Json = False) -> None:
    """Make a key that runs are sealed with."""
    from fedllm.runs.audit_key import make_key

    made = make_key(folder)
    if as_json:
        return put({"key": str(made)})
    console.print(f"{made}: keep it; audit.pub beside it is for whoever verifies", highlight=False,
                  soft_wrap=True)
