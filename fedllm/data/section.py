"""The `data` section of a recipe, checked: where rows come from, what they become, and who holds which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.partition import partitioner
from fedllm.data.scenes import SCENE, EnvironmentSpec
from fedllm.data.sequences import SequenceSpec
from fedllm.data.simulated.registry import PREFIX as MADE
from fedllm.data.sources import nearest
from fedllm.data.spec import Spec
from fedllm.data.windows import WindowSpec
from fedllm.tasks.labels import told_apart
from fedllm.tasks.registry import task_of, tasks
from fedllm.tasks.row import is_blank
from fedllm.tasks.templates import template

TEXTS = ("prompt", "response", "text", "system", "chosen", "rejected")
"""Fields that may be joined of several columns."""

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*%?")

Fraction = Annotated[float, Field(ge=0, lt=1)]

DOCUMENTS_TASK = "documents"
PASSAGE = 150
"""Words: about as many as MiniLM reads of a text (256 tokens)."""


class OfficeSpec(Spec):
    """The knobs of the synthetic office; what is left out takes the office's own default."""

    clients: Annotated[int, Field(ge=1, le=10**6)] = 8
    """Number of institutions."""
    rows: Annotated[int, Field(ge=1, le=10**7)] = 200
    """Training rows of each institution, on average."""
    label_skew: Annotated[float, Field(gt=0)] | None = None
    """Dirichlet concentration over kinds of record: 0.1 is harsh, 100 nearly even; none is even."""
    quantity_skew: Annotated[float, Field(gt=0)] | None = None
    """Dirichlet concentration over the institutions' sizes; none is even."""
    style_skew: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of an institution's rows that are written in its own house style."""
    test_rows: Annotated[int, Field(ge=0)] = 200
    """Rows of the global test."""
    client_test_rows: Annotated[int, Field(ge=0)] = 40
    """Test rows of each institution."""
    categories: Annotated[int, Field(ge=1, le=10**4)] = 12
    """Number of kinds of record."""
    public_rows: Annotated[int, Field(ge=0)] = 0
    """Rows that belong to nobody, for methods that train at the server."""


class DataSpec(Spec):
    """The `data` section of a recipe: where rows come from, what they become, and who holds which."""

    source: str | list[str] = "office"
    """A file or folder (`shared:x` looks in FEDLLM_DATA), a list of them, a Hub id `owner/name`, `office`,
    `grouped:FOLDER` (written by `fedllm group`), `package:NAME/FILE` (which an installed package brings), `sim:NAME`,
    which makes its rows, or `env:NAME`, an environment."""
    split: str = "train"
    """Split of a Hub or saved dataset."""
    subset: str | None = None
    """Configuration of a Hub dataset, where it has several."""
    test: float | str = 0.1
    """The global test: a file, or the fraction of rows held out at random before clients are made."""
    public: float | str = 0.0
    """Rows that belong to nobody, for methods that train at the server: a file, or a fraction set aside like `test`."""
    task: str = "generation"
    """What rows are for: generation (prompt, response), classification (text, label), tokens (tokens, tags),
    masked_words (text), regression (text, target), preference (prompt, chosen, rejected), image_text (image, label; may
    be the labels that it is told among, and a text where a method reads both), documents (text, id): what is searched,
    forecast (windows of series), next_item (history, item), pairs (image, text or both, label)."""
    fields: dict[str, str | Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)
    """fedllm's field names and the columns that hold them, as in {prompt: question, response: answer}; of a text also
    several columns, as in {prompt: [instruction, input]}, with a blank line between those that are not empty."""
    template: str | dict[str, str] | None = None
    """Makes prompt and response: plain, question_answer, alpaca, text, chat, or format strings over columns."""
    empty: Literal["refuse", "leave_out"] = "refuse"
    """Rows with an empty response: refuse the data, naming the first, or leave them out (and say how many)."""
    labels: list[str] | None = None
    """Label names by index; by default the labels found, sorted."""
    partition: dict[str, Any] = Field(default_factory=lambda: {"kind": "iid", "clients": 10})
    """How rows are shared out: `kind` (iid, dirichlet, shards, quantity, by_key, per_file, by_cluster) and knobs."""
    client_test: Fraction = 0.1
    """Fraction that a client with 10 rows or more keeps back for its own test."""
    entity: str | None = None
    """The column that names the thing of which a row is a part, where clients hold different parts of the same things
    (rows keep it as `id`). `client_test` is then a share of things, whose parts every client keeps back."""
    passages: Annotated[int, Field(ge=10)] = PASSAGE
    """Most words of a document that is indexed as one; a longer one is cut. Only with `task: documents`, where text and
    Markdown files are read whole, and PDF files page by page."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Most rows of the source to use, drawn at random; the global test counts among them if it is a fraction."""
    test_limit: Annotated[int, Field(ge=1)] | None = None
    """Most rows of the global test, drawn at random."""
    office: OfficeSpec | None = None
    """Knobs of the office; only with `source: office`."""
    windows: WindowSpec | None = None
    """How tables of readings become windows; only with `task: forecast`. Tests are then the last windows of each
    series, and none is learned from that shows what they ask for."""
    sequences: SequenceSpec | None = None
    """How tables of interactions become rows; only with `task: next_item`. Of each user the last item is the global
    test (where `test` is above 0), and the last of the others the client's own (where `client_test` is)."""
    simulated: dict[str, Any] | None = None
    """Knobs of a source that makes its rows; only with `source: sim:NAME`."""
    environment: EnvironmentSpec | None = None
    """Who acts where; only with `source: env:NAME`, an environment in the place of rows."""

    @property
    def acts(self) -> bool:
        """Whether clients act in an environment, and hold no rows of text."""
        return isinstance(self.source, str) and self.source.startswith(SCENE)

    @model_validator(mode="before")
    @classmethod
    def _documents_are_searched_in_full(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("task") != DOCUMENTS_TASK:
            return values
        return {"test": 0.0, "client_test": 0.0, **values}

    @model_validator(mode="before")
    @classmethod
    def _parts_are_kept_back_where_they_are(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("entity"), str):
            return values
        fields = values.get("fields", {})
        return {"test": 0.0, **values, "fields": {"id": values["entity"], **fields} if isinstance(fields, Mapping)
                else fields}

    @property
    def made(self) -> bool:
        """Whether the source makes its rows."""
        return isinstance(self.source, str) and self.source.startswith(MADE)

    @field_validator("source", "test", "public")
    @classmethod
    def _a_path_is_one(cls, value: Any, info: ValidationInfo) -> Any:
        if any(isinstance(path, str) and not path.strip() for path in (value if isinstance(value, list) else [value])):
            raise ValueError(f"data.{info.field_name} = {value!r}: a path is not empty; `.` is the folder that this is "
                             "started in")
        if info.field_name != "source" and isinstance(value, str) and NUMBER.fullmatch(value.strip()):
            raise ValueError(f"data.{info.field_name} = {value!r}: a fraction is a number without quotes and without "
                             "a %, as in 0.1; a file that is called so is written ./...")
        return value

    @field_validator("labels")
    @classmethod
    def _labels_are_told_apart(cls, value: list[str] | None) -> list[str] | None:
        if value is None:
            return value
        if not value or any(is_blank(name) for name in value) or len(set(value)) < len(value):
            raise ValueError(f"data.labels = {value!r:.200}: allowed are names, each once and none of them empty; "
                             "without the key they are the labels found")
        try:
            told_apart(value)
        except DataError as error:
            raise ValueError(f"data.labels = {value!r:.200}: {error}") from None
        return value

    @field_validator("test", "public")
    @classmethod
    def _test_is_a_file_or_a_fraction(cls, value: float | str, info: ValidationInfo) -> float | str:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(f"data.{info.field_name} = {value}: allowed is a file, or a fraction from 0 to below 1")
        return value

    @field_validator("fields")
    @classmethod
    def _several_columns_make_a_text(cls, value: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        if odd := next((n for n, columns in value.items() if isinstance(columns, list) and n not in TEXTS), None):
            raise ValueError(f"data.fields.{odd} = {value[odd]!r}: several columns can be joined for a text alone "
                             f"({', '.join(TEXTS)})")
        return value

    @field_validator("task")
    @classmethod
    def _task_is_known(cls, value: str) -> str:
        if value not in tasks():
            raise ValueError(f"data.task = {value!r} is unknown{nearest(value, tasks()) or '.'} Allowed: "
                             f"{', '.join(tasks())}")
        return value

    @field_validator("partition")
    @classmethod
    def _partition_can_be_made(cls, value: dict[str, Any]) -> dict[str, Any]:
        partitioner(value)
        return value

    @field_validator("template")
    @classmethod
    def _template_can_be_made(cls, value: str | dict[str, str] | None) -> str | dict[str, str] | None:
        template(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> DataSpec:
        if self.acts:
            return self._alone("environment", "the environment is all that its clients have; its parameters")
        if self.environment is not None or self.task == "environment":
            raise ValueError(f"data.environment, data.task = {self.task!r}: data.source is {self.source!r}; an "
                             "environment is asked for by data.source = 'env:NAME' alone")
        searched = self.task == DOCUMENTS_TASK
        if not searched and self.passages != PASSAGE:
            raise ValueError(f"data.passages = {self.passages} is of no use to data.task = {self.task!r}; it cuts what "
                             f"is searched ({DOCUMENTS_TASK})")
        if searched and (self.client_test or (isinstance(self.test, float) and self.test)):
            raise ValueError(f"data.test = {self.test!r}, data.client_test = {self.client_test}: documents are no "
                             "queries, and none is held out of the index; allowed is a file of queries as data.test, "
                             "or 0.0")
        if self.windows is not None and self.task != "forecast":
            raise ValueError(f"data.windows: data.task is {self.task!r}; allowed with windows is 'forecast'")
        if self.sequences is not None and self.task != "next_item":
            raise ValueError(f"data.sequences: data.task is {self.task!r}; allowed with sequences is 'next_item'")
        if self.entity is not None:
            self._of_parts(self.entity)
        if self.simulated is not None and not self.made:
            raise ValueError(f"data.simulated: data.source is {self.source!r}; allowed with these knobs is 'sim:NAME'")
        for other in {"template", "labels"} - set(task_of(self.task).takes):
            if getattr(self, other) is not None:
                raise ValueError(f"data.{other} = {getattr(self, other)!r} is of no use to data.task = {self.task!r}")
        if self.source != "office":
            if self.office is not None:
                raise ValueError(f"data.office: data.source is {self.source!r}; allowed with these knobs is 'office'")
            return self
        return self._alone("office", "the office makes its own rows, clients and tests; its knobs")

    def _of_parts(self, entity: str) -> None:
        """ValueError where rows that are parts of things cannot be shared out so."""
        if self.fields["id"] != entity:
            raise ValueError(f"data.fields.id = {self.fields['id']!r}: data.entity = {entity!r} is the id; allowed is "
                             "one of the two")
        if isinstance(self.test, float) and self.test:
            raise ValueError(f"data.test = {self.test}: with data.entity a thing's parts stay with their owners, and "
                             "no row is everybody's; allowed is 0.0 (data.client_test is a share of things)")
        if self.windows is not None or self.sequences is not None or str(self.source).startswith("grouped:"):
            raise ValueError("data.entity: allowed with rows as they are, and not with windows, sequences or a grouped "
                             "source")

    def _alone(self, section: str, why: str) -> DataSpec:
        """This spec, if all but its source and this section is left as it is."""
        # Compared by value, not by what was set: a resolved recipe writes every default out.
        plain = DataSpec.model_construct(**{"source": self.source, section: getattr(self, section)})
        unused = [name for name in DataSpec.model_fields if getattr(self, name) != getattr(plain, name)]
        if unused:
            raise ValueError(f"data.{', data.'.join(unused)}: {why} are in data.{section}")
        return self


def checked(spec: Mapping[str, Any]) -> DataSpec:
    try:
        return DataSpec.model_validate(dict(spec))
    except ValidationError as error:
        raise RecipeError("\n".join(_complaint(one) for one in error.errors())) from error


def _complaint(one: Mapping[str, Any]) -> str:
    """One line on one thing that pydantic refused: the key's path, the value, what is allowed."""
    text = one["msg"].removeprefix("Value error, ")
    path = ".".join(str(part) for part in ("data", *one["loc"]))
    if one["type"] == "extra_forbidden":
        known = OfficeSpec.model_fields if one["loc"][0] == "office" else DataSpec.model_fields
        return f"{path}: no such key{nearest(str(one['loc'][-1]), known)}; allowed are {', '.join(known)}"
    # What our own checks raise names its key already.
    return text if one["type"] == "value_error" else f"{path} = {one['input']!r}: {text}"
