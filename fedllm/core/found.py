"""Things that recipes name: a file in a room of ours, an entry point of an installed package, or a plugin file.

A room is a mapping of names to classes. A file's stem is the name of what it holds, and there is no list to edit. A
package adds to a room by an entry point of the group `fedllm.<room>` (`fedllm.methods`), whose value is a module that
holds one such class, or the class itself. A plugin file is a module that a recipe or a command names by its path.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fedllm.core.errors import RecipeError

T = TypeVar("T")
_plugins: dict[str, ModuleType] = {}


@functools.cache
def installed(group: str) -> dict[str, list[EntryPoint]]:
    """Name -> who brings it, of the installed packages."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=f"fedllm.{group}"):
        found.setdefault(point.name, []).append(point)
    return found


def digest_of(file: str | Path, path: str) -> str:
    """The sha256 of a plugin file; `path` is the recipe's key of it."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise RecipeError(f"{path} = {str(file)!r} cannot be read: {error.strerror}; allowed is the path of a Python "
                          "file") from None


def load_plugin(file: str | Path, path: str) -> ModuleType:
    """The module in a file; loaded once for the same content. RecipeError says what is wrong with it."""
    where = Path(file).resolve()
    if where.suffix != ".py" or not where.stem.isidentifier():
        raise RecipeError(f"{path} = {str(file)!r}: allowed is a Python file whose name is the name of what it holds, "
                          "like fedhalf.py")
    name = f"fedllm_plugin_{digest_of(where, path)[:16]}_{where.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(where):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, where)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"{path} = {str(file)!r} cannot be loaded: {type(error).__name__}: {error}") from None
    return module


def plug(files: Mapping[str, str | Path], rooms: Sequence[Room[Any]]) -> None:
    """Make these plugin files (key of the recipe -> file) the plugins of this process, in the place of earlier ones.

    RecipeError when a file holds nothing for any of the rooms, or a name that is taken.
    """
    fresh: dict[str, ModuleType] = {}
    for path, file in files.items():
        module, stem = load_plugin(file, path), Path(file).stem
        if stem in fresh:
            raise RecipeError(f"{path} = {str(file)!r}: the name '{stem}' is taken by {fresh[stem].__file__}")
        kinds = [room for room in rooms if room.own(module)]
        if not kinds:
            raise RecipeError(f"{path} = {str(file)!r} holds nothing that a recipe can name; allowed are "
                              f"{', '.join(room.group for room in rooms)}: a class with its card, in this very file")
        for room in kinds:
            if len(room.own(module)) > 1:
                raise RecipeError(f"{path} = {str(file)!r} holds {[c.__name__ for c in room.own(module)]}; allowed is "
                                  f"one of the kind '{room.group}' in a file")
            if stem in room.ours or stem in installed(room.group):
                raise RecipeError(f"{path} = {str(file)!r}: the name '{stem}' is taken among the {room.group} by "
                                  f"{room.whose(stem)}; give the file another name")
        fresh[stem] = module
    _plugins.clear()
    _plugins.update(fresh)


class Room(Mapping[str, type[T]]):
    """Name -> class of one kind of things, wherever they come from; nothing is imported before it is asked for."""

    def __init__(self, group: str, holds: Callable[[type], bool], *packages: str, chapters: bool = False) -> None:
        """`holds` says whether a class is of this kind; with `chapters` each folder of the package is one, and every
        file in it that begins with no underscore holds one thing."""
        self.group, self.holds, self.packages, self.chapters = group, holds, packages, chapters

    def own(self, module: ModuleType) -> list[Any]:
        """The classes of this kind that a module itself defines."""
        return [c for _, c in inspect.getmembers(module, inspect.isclass)
                if c.__module__ == module.__name__ and self.holds(c)]

    @functools.cached_property
    def ours(self) -> dict[str, str]:
        """Name -> dotted module, of what comes with fedllm."""
        found = {}
        for package in self.packages:
            folder = Path(_imported(package).__file__ or "").parent
            for file in sorted(folder.glob("*/*.py" if self.chapters else "*.py")):
                module = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
                if not file.stem.startswith("_") and (self.chapters or len(self.own(_imported(module))) == 1):
                    found[file.stem] = module
        return dict(sorted(found.items())) if self.chapters else found

    def plugins(self) -> dict[str, ModuleType]:
        """Name -> module, of the plugin files that hold a thing of this kind."""
        return {stem: module for stem, module in _plugins.items() if self.own(module)}

    def whose(self, name: str) -> str:
        """Who brings this name, in words."""
        if name in self.ours:
            return "fedllm itself"
        if name in installed(self.group):
            return _packages(installed(self.group)[name])
        return str(self.plugins()[name].__file__)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.ours, *installed(self.group), *self.plugins()]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self.ours or name in installed(self.group) or name in self.plugins()

    def __getitem__(self, name: str) -> type[T]:
        if name not in self:
            raise KeyError(name)
        points = installed(self.group).get(name, [])
        if len(points) + (name in self.ours) > 1:
            both = "fedllm itself and " * (name in self.ours)
            raise RecipeError(f"'{name}' among the {self.group} is brought by {both}{_packages(points)}; "
                              "uninstall one of them")
        if points:
            return self._of_package(points[0])
        return self._one(_imported(self.ours[name]) if name in self.ours else self.plugins()[name])

    def find(self, name: str, path: str) -> type[T]:
        """The class of this name; one that is unknown is refused with the nearest. `path` is the recipe's key of it."""
        if name not in self:
            near = difflib.get_close_matches(name, list(self), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise RecipeError(f"{path} = {name!r} is unknown{hint or '.'} Allowed: {', '.join(self)}")
        return self[name]

    def _one(self, module: ModuleType) -> type[T]:
        own = self.own(module)
        if len(own) != 1:
            raise RecipeError(f"{module.__name__} must hold just one of the kind '{self.group}'; it holds "
                              f"{[c.__name__ for c in own]}")
        return own[0]

    def _of_package(self, point: EntryPoint) -> Any:
        what = f"the entry point '{point.name} = {point.value}' of {_packages([point])}"
        try:
            got: Any = point.load()
        except Exception as error:
            raise RecipeError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from None
        if isinstance(got, ModuleType):
            return self._one(got)
        if not inspect.isclass(got) or not self.holds(got):
            raise RecipeError(f"{what} is {got!r}; allowed is a module with one of the kind '{self.group}', or the "
                              "class itself")
        return got


def _imported(module: str) -> ModuleType:
    return importlib.import_module(module)


def _packages(points: Sequence[EntryPoint]) -> str:
    return " and ".join(f"the installed package '{p.dist.name if p.dist else p.value}'" for p in points)
