"""The schema as a page: `python -m configs.documentation > docs/configuration.md`."""

from __future__ import annotations

import sys
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from configs.schema import RunConfig

HEADER = """\
# Configuration

One YAML file, seven sections and a seed. Unknown keys are errors. Any value can be overridden on
the command line: `--set experts.rank=8` (repeatable, the value is read as YAML). Presets: `demo`,
`two_gpu`, `moin_5k`.

This page is made from the schema by `python -m configs.documentation`; a test keeps the two equal.
"""


def render() -> str:
    """Markdown: a table of keys, defaults and meanings for each section."""
    parts = [HEADER, _table("top level", "", RunConfig)]
    for name, info in RunConfig.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            parts.append(_table(name, (info.annotation.__doc__ or "").strip(), info.annotation))
    return "\n".join(parts)


def _table(title: str, text: str, model: type[BaseModel]) -> str:
    rows = [
        f"| `{key}` | {_default(info.default)} | {' '.join(info.description.split())} |"
        for key, info in model.model_fields.items()
        if info.description
    ]
    paragraph = f"\n{' '.join(text.split())}\n" if text else ""
    header = "| key | default | meaning |\n|---|---|---|"
    return f"## {title}\n{paragraph}\n{header}\n" + "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return "–" if value is None else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(render())
