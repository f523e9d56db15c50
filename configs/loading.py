"""YAML and overrides to a `RunConfig`, with every fault reported at once."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.errors import ConfigError
from configs.schema import RunConfig

PRESETS = Path(__file__).parent


def preset_path(name: str) -> Path:
    """Path of a shipped preset such as `demo`."""
    return PRESETS / f"{name}.yaml"


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a config.

    Args:
        source: a YAML file, or the name of a shipped preset (`demo`, `two_gpu`, `moin_5k`).
        overrides: `section.key=value` strings, the value parsed as YAML; they win over the file.

    Raises:
        ConfigError: with every fault at once, each with its key's path and what would be right.
    """
    path = _find(source)
    tree = _read_yaml(path)
    problems = [problem for item in overrides if (problem := _apply_override(tree, item))]
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems += explain(error, RunConfig)
    if problems:
        raise ConfigError(str(path), problems)
    return config


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each fault of a validation as one line: key path, what is wrong, what would be right."""
    faults: dict[str, _Fault] = {}
    for detail in error.errors():
        location, owner, field = _walk(detail["loc"], model)
        key = ".".join(location) or "(top level)"
        # A value that fits no branch of a union fails once for each: one fault, several remedies.
        faults.setdefault(key, _Fault(key, owner, field)).details.append(detail)
    return [fault.line() for fault in faults.values()]


@dataclass
class _Fault:
    """Everything pydantic says against one key."""

    key: str
    owner: type[BaseModel] | None
    field: str
    details: list[ErrorDetails] = dataclass_field(default_factory=list)

    def line(self) -> str:
        kind, given = self.details[0]["type"], self.details[0]["input"]
        if kind == "extra_forbidden":
            known = sorted(self.owner.model_fields) if self.owner else []
            close = difflib.get_close_matches(self.field, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
            return f"{self.key}: unknown key; {hint}"
        messages = [detail["msg"].removeprefix("Value error, ") for detail in self.details]
        if kind == "value_error":
            return f"{self.key}: {'; '.join(messages)}"
        if kind == "missing":
            return f"{self.key}: missing{self._meaning()}"
        prefix = "Input should be "
        if all(message.startswith(prefix) for message in messages):
            remedies = dict.fromkeys(message.removeprefix(prefix) for message in messages)
            wanted = f"should be {' or '.join(remedies)}"
        else:
            wanted = "; ".join(message[0].lower() + message[1:] for message in messages)
        return f"{self.key}: got {given!r}, {wanted}{self._meaning()}"

    def _meaning(self) -> str:
        info = self.owner.model_fields.get(self.field) if self.owner else None
        text = " ".join((info.description or "").split()) if info else ""
        return f" ({text})" if text else ""


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    preset = preset_path(str(source))
    if path.suffix == "" and preset.is_file():
        return preset
    presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    raise ConfigError(str(source), [f"no such file; give a YAML file or a preset ({presets})"])


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"not YAML: {' '.join(str(error).split())}"]) from None
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    if not isinstance(tree, dict):
        raise ConfigError(str(path), ["must be a mapping of sections (bundle, base, data, …)"])
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Set one `a.b=value` in place; return the fault, if there is one."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return f"--set {override}: give it as section.key=value"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return f"--set {override}: the value is not YAML"
    node = tree
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            return f"--set {override}: '{part}' holds a value, not a section"
        node = child
    node[parts[-1]] = value
    return None


def _walk(
    loc: tuple[int | str, ...], model: type[BaseModel]
) -> tuple[list[str], type[BaseModel] | None, str]:
    """Follow an error's location through the schema, dropping pydantic's union-branch labels."""
    location: list[str] = []
    owner: type[BaseModel] | None = None
    current: type[BaseModel] | None = model
    field = ""
    for part in loc:
        if current is not None:
            owner, field = current, str(part)
            location.append(field)
            info = current.model_fields.get(field)
            current = _as_model(info.annotation) if info else None
        elif not _is_branch(part):
            location.append(str(part))
    return location, owner, field


def _is_branch(part: int | str) -> bool:
    """Whether a location part is the label of a union's branch, not a key of the user's."""
    return isinstance(part, str) and (
        part in {"int", "float", "bool", "str"}
        or part.startswith(("literal[", "constrained-", "list[", "function-"))
    )


def _as_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for branch in typing.get_args(annotation):
            if (found := _as_model(branch)) is not None:
                return found
    return None
