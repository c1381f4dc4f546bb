"""`python -m fedllm.environments.serving`: the desk's tools as an MCP server over stdio, as a site's own would be."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm.environments.reading import calculator, database, files
from fedllm.environments.toolbox import PATIENCE, Tool, answer


def server(seconds: float = PATIENCE) -> Any:
    """The server: `sql`, `files`, `read`, `note` and `calc`. Where the database and the files lie, whoever calls says
    (`db`, `files`): one process serves all environments of a client."""
    from mcp.server.mcpserver import MCPServer
    from mcp_types import ToolAnnotations

    made, own = MCPServer("fedllm", log_level="WARNING"), ToolAnnotations(read_only_hint=True, open_world_hint=False)

    def sql(query: str, db: str) -> str:
        return said(database(Path(db), seconds), query)

    def listed(files: str) -> str:
        return said(of(files, "files"), "")

    def read(name: str, files: str) -> str:
        return said(of(files, "read"), name)

    def note(name: str, text: str, files: str) -> str:
        return said(of(files, "note"), f"{name} {text}")

    def calc(expression: str) -> str:
        return said(calculator(), expression)

    def of(folder: str, name: str) -> Tool:
        return next(t for t in files(Path(folder)) if t.name == name)

    about: dict[str, tuple[Callable[..., str], str]] = {
        "sql": (sql, "rows of the local database, by one SELECT"), "files": (listed, "the names of the local files"),
        "read": (read, "the text of a local file"), "note": (note, "write a local file"),
        "calc": (calc, "the value of numbers joined by + - * / // % and brackets")}
    for name, (run, says) in about.items():
        hints = ToolAnnotations(read_only_hint=False, open_world_hint=False) if name == "note" else own
        made.add_tool(run, name=name, description=says, annotations=hints, structured_output=False)
    return made


def said(tool: Tool, argument: str) -> str:
    """What the tool answers; where it fails, MCP's own error with the same words."""
    from mcp.server.mcpserver.exceptions import ToolError

    text, ok = answer(tool.run, argument)
    if not ok:
        raise ToolError(text)
    return text


def main() -> None:
    """Serve until stdin ends."""
    told = argparse.ArgumentParser()
    told.add_argument("--seconds", type=float, default=PATIENCE)
    server(told.parse_args().seconds).run("stdio")


if __name__ == "__main__":
    main()
