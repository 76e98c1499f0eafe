"""Fields of the launchpad for a configuration, typed as its models are: Dagster refuses what is wrong at launch."""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel

from nextvid.config.strict import inner_model


def fields(model: type[BaseModel], path: str) -> dict[str, dg.Field]:
    """An optional field for each of the model's, with its description. Members of lists are addressed by their names.

    Ranges, and what must agree with other values, are checked when the run begins: a type knows nothing of them.
    """
    return {
        name: dg.Field(_typed(field.annotation, f"{path}_{name}"), is_required=False, description=field.description)
        for name, field in model.model_fields.items()
        if name != "name"
    }


def _typed(annotation: Any, path: str) -> Any:  # noqa: ANN401 - an annotation, and a type of Dagster's configuration
    origin, arguments = get_origin(annotation), get_args(annotation)
    if inner := inner_model(annotation):
        shape = dg.Shape(fields(inner, path))
        return dg.Map(str, shape, key_label_name="name") if origin in (tuple, list) else shape
    if origin in (tuple, list):
        return dg.Array(_typed(arguments[0], path))
    if origin is Annotated:
        return _typed(arguments[0], path)
    if origin in (Union, types.UnionType):
        given = [argument for argument in arguments if argument is not types.NoneType]
        typed = (
            _typed(given[0], path) if len(given) == 1 else dg.Any
        )  # the launchpad has no union of a number and words
        return dg.Noneable(typed) if len(given) < len(arguments) else typed
    if origin is Literal:
        return dg.Enum(path, [dg.EnumValue(value) for value in arguments])
    return annotation
