"""Overrides `key.path=value` of a recipe, or of how a run is carried out, as strict as any other configuration.

Stages and mask strategies are addressed by name or number: `stages.warmup.steps=10`,
`masks.strategies.0.budget=8`, `model.encoder.depth=6`. Values are JSON, or else text; `stages.warmup=null` removes one.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nextvid.config.recipe import ExecutionConfig, RecipeConfig
from nextvid.config.strict import Model, parse
from storage.errors import ConfigError


def apply_overrides(recipe: RecipeConfig, overrides: Sequence[str]) -> RecipeConfig:
    """The recipe with each `key.path=value` put in place. Raises ConfigError with the nearest name."""
    return _applied(recipe, overrides, f"recipe {recipe.name} with {', '.join(overrides)}")


def apply_how(how: ExecutionConfig, overrides: Sequence[str]) -> ExecutionConfig:
    """The same for how a run is carried out: `device=cpu`, `checkpoint_every_steps=100`."""
    return _applied(how, overrides, f"how, with {', '.join(overrides)}")


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Values nested as in a recipe, or by paths, as `key.path=value`."""
    return [f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in flat(values)]


def flat(value: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of JSON values with their paths as overrides write them: members of lists by name, else by number."""
    match value:
        case dict():
            inside = [(str(key), item) for key, item in value.items()]
        case list() if any(isinstance(item, dict) for item in value):
            names = [item.get("name", at) if isinstance(item, dict) else at for at, item in enumerate(value)]
            inside = [(str(name), item) for name, item in zip(names, value, strict=True)]
        case _:
            yield path, value
            return
    for key, item in inside:
        yield from flat(item, f"{path}.{key}" if path else key)


class _Block(dict[str, Any]):
    """A block that is absent by default, and of which an override gives a field: `parse` knows its keys."""


def _applied(config: Model, overrides: Sequence[str], where: str) -> Model:
    if not overrides:
        return config
    values = config.model_dump(mode="json")
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override '{override}': write it as key.path=value")
        *parents, last = path.strip().split(".")
        holder: Any = values
        for part in parents:
            key = _key(holder, part, override)
            if holder[key] is None:
                holder[key] = _Block()
            holder = holder[key]
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        key = _key(holder, last, override)
        if value is None and isinstance(holder, list) and isinstance(key, int):
            del holder[key]
        else:
            holder[key] = value
    return parse(type(config), values, where)


def _key(holder: Any, part: str, override: str) -> str | int:  # noqa: ANN401 - JSON is Any
    """The key or index that `part` names in a mapping, or in a list by number or by its members' names."""
    match holder:
        case _Block():
            return part
        case dict():
            known = {name: name for name in holder}
        case list():
            known = {str(index): index for index in range(len(holder))}
            known |= {item["name"]: index for index, item in enumerate(holder) if isinstance(item, dict)}
        case _:
            raise ConfigError(f"override '{override}': there is nothing below the value before '{part}'")
    if part in known:
        return known[part]
    near = difflib.get_close_matches(part, list(known), n=1)
    remedy = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    raise ConfigError(f"override '{override}': there is no '{part}'; {remedy}")
