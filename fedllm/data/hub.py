"""Tables of the `datasets` library: saved folders, and names that the hub knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedllm.core.errors import DataError
from fedllm.data.strict import present
from fedllm.data.table import Table
from fedllm.tasks.row import value_of


def of_dataset(name: str, data: Any) -> Table:
    """Class numbers become their names (a name may itself be a number), and pictures stay the files that they are."""
    from datasets import ClassLabel, Image

    def names(kind: Any, value: Any) -> Any:
        known = kind.names if isinstance(kind, ClassLabel) else None
        if known is None:
            return [names(kind.feature, v) for v in value]
        return known[value] if isinstance(value, int) and 0 <= value < len(known) else value

    classes: dict[str, tuple[str, ...]] = {}
    for column, kind in data.features.items():
        if isinstance(kind, Image):
            data = data.cast_column(column, Image(decode=False))
        single = vars(kind).get("feature", kind)  # of a list: what it holds
        if isinstance(single, ClassLabel):
            classes[column] = tuple(single.names)
    rows = [{c: names(data.features[c], v) if c in classes and v is not None else present(v) for c, v in row.items()}
            for row in data.to_list()]
    return Table(name, rows, classes=classes)


def saved_table(path: Path, split: str) -> Table:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library makes of files that are damaged, or of a folder without rows
        raise DataError(f"{path} is not a saved dataset that can be read: {type(error).__name__}: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        data = value_of(data, split, f"{path}, a dataset of several splits,")
    return of_dataset(str(path), data)


def hub_table(name: str, split: str, subset: str | None) -> Table:
    import datasets

    if not name.strip():
        raise DataError("'hub:' names no dataset; one of the Hub is written 'owner/name' or 'hub:name'")
    try:
        return of_dataset(name, datasets.load_dataset(name, subset, split=split))
    except Exception as error:  # whatever the library makes of a name, or of what it was sent
        # Hub errors run over many lines; the first says what happened.
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the dataset {name!r} is no local file and could not be reached on the Hub ({cause}); "
                        "check the id and the connection, or give the path of a local file") from error
