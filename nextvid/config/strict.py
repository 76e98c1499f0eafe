"""The strict base of every configuration, and `parse`, which explains what a file got wrong."""

import difflib
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import ErrorDetails

from storage.digest import digest_config
from storage.errors import ConfigError as ConfigError  # re-exported: nextvid.model imports no storage

Model = TypeVar("Model", bound=BaseModel)
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

SHOWN_PROBLEMS = 10
DIGESTED: dict[str, Any] = {}  # the context of `Strict.digested`
SHOWN_CHARACTERS = 1000  # our choice: of one problem; a key may have as many as the file
CREDENTIALS = re.compile(r"://[^/\s]*@")  # of a URL: messages end in logs


class Strict(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    YOUNGER: ClassVar[frozenset[str]] = frozenset()  # fields that came after digests were kept

    @model_serializer(mode="wrap")
    def _values(self, values: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """All fields; for digests without the younger ones that have their defaults, so that kept digests stay."""
        found: dict[str, Any] = values(self)
        if info.context is not DIGESTED:
            return found
        plain = {
            name
            for name in self.YOUNGER
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True)
        }
        return {name: value for name, value in found.items() if name not in plain}

    def digested(self, include: set[str] | None = None, exclude: set[str] | None = None) -> dict[str, Any]:
        """The plain values that a digest is of, all of them or of some fields."""
        return self.model_dump(mode="json", include=include, exclude=exclude, context=DIGESTED)

    def digest(self) -> str:
        """Id of this configuration: canonical JSON with floats as `repr`."""
        return digest_config(self.digested())


def parse(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Build a configuration from plain values.

    Raises ConfigError that names the place and, for a misspelt key, the nearest known one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [f"{where}: {_explain(model, problem)[:SHOWN_CHARACTERS]}" for problem in problems[:SHOWN_PROBLEMS]]
        if more := len(problems) - len(lines):
            lines.append(f"{where}: and {more} problems more")
        raise ConfigError("\n".join(lines)) from None


def _explain(model: type[BaseModel], problem: ErrorDetails) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        holder: Any = model  # the one that lacks the key
        for part in problem["loc"][:-1]:
            found = holder.model_fields[part].annotation if part in getattr(holder, "model_fields", {}) else holder
            holder = inner_model(found) or holder
        known = sorted(holder.model_fields)
        near = difflib.get_close_matches(str(problem["loc"][-1])[:SHOWN_CHARACTERS], known, n=1)
        remedy = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key '{path}'; {remedy}"
    got = CREDENTIALS.sub("://***@", reprlib.repr(problem["input"]))
    return f"'{path}': {problem['msg']}" + (f" (got {got})" if path else "")


def inner_model(annotation: object) -> type[BaseModel] | None:
    """The configuration inside `X`, `X | None`, `list[X]`, `tuple[X, ...]` or `dict[str, X]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        if found := inner_model(argument):
            return found
    return None
