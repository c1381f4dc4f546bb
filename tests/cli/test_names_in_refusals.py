"""No sentence calls a layer, method, space or selector by its class: users write `krum`, and not `Krum`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import fedllm
from fedllm.methods.registry import METHODS
from fedllm.runs.layers import layer_classes
from fedllm.selectors.registry import SELECTORS
from fedllm.spaces.registry import SPACES

ROOT = Path(fedllm.__file__).parent
PARTS = re.compile(r"type\((self\.)?(method|layer|space|selector|x|model\.space|self)\)\.__name__")
OTHERS = {"environments/env.py", "local/objective.py", "attacks/_malicious.py"}
"""Where `self` is none of the four, or what is written is a key of a memory."""


def classes():
    """Names of classes that are no words of English or of the trade."""
    rooms = (layer_classes(), METHODS, SPACES, SELECTORS)
    return {c.__name__ for room in rooms for c in room.values() if re.search("[A-Z].*[A-Z]", c.__name__)} - {"LoRA"}


def said(tree, named):
    """What of this source speaks of a class: its line and the name. `Class.key` and `Class.phase` are keys and phases.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for value, after in zip(node.values, [*node.values[1:], None], strict=True):
                if isinstance(value, ast.FormattedValue) and (m := PARTS.search(ast.unparse(value.value))) and not (
                        isinstance(after, ast.Constant) and str(after.value).startswith(".")):
                    yield node.lineno, m.group()
        if isinstance(node, ast.Raise) and node.exc is not None:
            texts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            yield from ((node.lineno, m.group()) for text in texts for m in named.finditer(text))


def test_refusals_call_parts_as_recipes_do():
    named = re.compile(rf"\b({'|'.join(sorted(classes()))})\b(?!\.(\w|$))")
    found = [f"{path.relative_to(ROOT)}:{line} {name}" for path in sorted(ROOT.rglob("*.py"))
             for line, name in said(ast.parse(path.read_text()), named)
             if str(path.relative_to(ROOT)) not in OTHERS]
    assert not found, found
    bad = ast.parse("raise E(f\"layer '{type(layer).__name__}' and 'DPSGD' and '{type(method).__name__}.{fn}'\")")
    assert [name for _, name in said(bad, named)] == ["DPSGD", "type(layer).__name__"]
