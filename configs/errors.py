"""Errors of this room.

IntrovertError          what a user can mend: one clear sentence with the remedy, never a traceback
└── ConfigError         a config file, preset or override that cannot be used
"""

from __future__ import annotations


class IntrovertError(Exception):
    """A failure that a user can mend. Its text names the thing and the remedy.

    The command line prints it as one line and exits with `exit_code`; every room's own errors
    descend from it.
    """

    exit_code = 1


class ConfigError(IntrovertError):
    """A config that cannot be used; `problems` holds every fault found, one line each."""

    exit_code = 2

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        lines = "\n".join(f"  {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n{lines}")
