"""What every benchmark shares: its arguments, its figures with their goals, its conditions."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deploy.output import note, say, table

COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": lambda value, goal: value < goal,
    "<=": lambda value, goal: value <= goal,
    ">": lambda value, goal: value > goal,
    ">=": lambda value, goal: value >= goal,
    "==": lambda value, goal: value == goal,
}


@dataclass
class Report:
    """Figures by key, each with its unit, its goal and whether it meets it."""

    name: str
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)

    def add(self, key: str, value: float, unit: str, goal: str | None = None) -> None:
        """Record a figure; `goal` reads `<= 60`, or is none where the figure is for information."""
        ok = True
        if goal is not None:
            sign, bound = goal.split()
            ok = bool(COMPARE[sign](value, float(bound)))
        self.figures[key] = {"value": float(value), "unit": unit, "goal": goal, "ok": ok}
        note(f"  {key} = {value:.4g} {unit}" + (f" (goal {goal})" if goal else ""))

    def miss(self, key: str, unit: str, goal: str | None, why: str) -> None:
        """Record that a figure could not be measured, which meets no goal."""
        self.figures[key] = {"value": None, "unit": unit, "goal": goal, "ok": goal is None}
        note(f"  {key}: not measured: {why}")

    def close(self, path: str | None) -> int:
        """Print the table, write the report; exit code 0 when every goal is met."""
        self.conditions |= machine()
        rows = [
            [key, f["value"], f["unit"], f["goal"] or "", "ok" if f["ok"] else "MISSED"]
            for key, f in self.figures.items()
        ]
        say(table(["figure", "value", "unit", "goal", ""], rows))
        if path is not None:
            content = {"figures": self.figures, "conditions": self.conditions}
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(content, indent=2) + "\n")
        return 0 if all(figure["ok"] for figure in self.figures.values()) else 1


def machine() -> dict[str, Any]:
    """The machine and the versions that figures hold for."""
    model = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("introvert", "torch", "ray", "transformers")},
    }


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments every benchmark takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--quick", action="store_true", help="end within three minutes")
    arguments.add_argument("--report", metavar="FILE", help="write figures and conditions as JSON")
    return arguments
