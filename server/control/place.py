"""Which places a request may name: the configured bundle's own, and those beside it. Pure.

A request gives no more than a name: what is opened is that name beside the configured bundle, so
no other path from a request ever reaches a file system.
"""

from __future__ import annotations

from pathlib import Path

from expert_trainer.remote import redacted
from expert_trainer.storage import is_url
from server.control.errors import ForbiddenPlaceError


def place_beside(configured: str, asked: str) -> str:
    """The place that is asked for, if it may be.

    Args:
        configured: the run's bundle, a path or an fsspec URL.
        asked: an absolute path or a URL, with its password or without.

    Returns:
        Directory or URL, made of the configured one's parent and a name.

    Raises:
        ForbiddenPlaceError: it is neither the configured bundle nor beside it.
    """
    if is_url(configured):
        parent, _, _ = configured.rstrip("/").rpartition("/")
        before, _, name = asked.rstrip("/").rpartition("/")
        if before in (parent, redacted(parent)) and _is_name(name) and not set(name) & set("?#%"):
            return f"{parent}/{name}"
    elif not is_url(asked):
        # without a look at the disk: not even whether a path exists is told
        wanted = Path(asked)
        for own in (Path(configured).absolute(), Path(configured).resolve()):
            if wanted.parent == own.parent and _is_name(wanted.name):
                return str(wanted)
    raise ForbiddenPlaceError(
        f"{redacted(asked)} does not lie beside the bundle that is configured; publish it into "
        f"{redacted(_parent(configured))}, or start another endpoint for it"
    )


def _is_name(text: str) -> bool:
    return text not in ("", ".", "..") and "/" not in text and "\0" not in text


def _parent(configured: str) -> str:
    if is_url(configured):
        return configured.rstrip("/").rpartition("/")[0]
    return str(Path(configured).absolute().parent)
