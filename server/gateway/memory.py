"""What Python's garbage collector need not look at, since it stays for as long as the gateway runs.

Without this a sixth of a forwarded request's time goes into looking through modules, models and
routers again and again, and one request in a hundred waits 40 ms for it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

NEW_OBJECTS = 5000, 20, 20
"""Containers made before the new ones are looked through, and how often that is done before those
that have survived it once, or twice, are. A request makes some hundreds, and leaves hardly any."""

Given = ParamSpec("Given")
Result = TypeVar("Result")


def settle() -> None:
    """Collect what is garbage now, and never again look for any in what is alive now.

    What is dropped later is freed as ever by its reference counts; only cycles of it would stay.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*NEW_OBJECTS)


def settling(load: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same function, after whose first success the process settles once more: its libraries
    have come to stay, and what it gives later is little beside them."""
    done = False

    def loading(*arguments: Given.args, **named: Given.kwargs) -> Result:
        nonlocal done
        result = load(*arguments, **named)
        if not done:
            done = True
            settle()
        return result

    return loading
