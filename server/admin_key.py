"""The key for `/admin/*`: as configured, or made at each start for whoever runs the endpoint.

A key that is made lies in a file of its user's cache directory while the endpoint lives, so that
commands on the same machine find it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from configs.schema import GatewayConfig
from server.keys import digest_of, new_key

log = logging.getLogger(__name__)


def admin_key_file(port: int) -> Path:
    """Where the admin key of this machine's endpoint on a port lies, if one was made."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "introvert" / f"admin-{port}.key"


class AdminKey:
    """The admin key of one endpoint."""

    def __init__(self, config: GatewayConfig) -> None:
        """Make a key, unless one is configured."""
        self._key = None if config.admin_key_sha256 else new_key()
        self._file: Path | None = None

    @property
    def made_sha256(self) -> str | None:
        """SHA-256 of the key that was made; none: one is configured."""
        return digest_of(self._key).hex() if self._key else None

    def publish(self, port: int) -> None:
        """Write the key where this user's commands find it."""
        if self._key is None:
            return
        file = admin_key_file(port)
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.unlink(missing_ok=True)  # another user's, or readable by others
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
                opened.write(self._key + "\n")
        except OSError as error:
            log.warning(
                "the admin key cannot be written to %s (%s): /admin/* stays closed; configure "
                "gateway.admin_key_sha256 to use it",
                file,
                error.strerror,
            )
        else:
            self._file = file

    def withdraw(self) -> None:
        """Take the file away, if it is still this endpoint's."""
        if self._file is None:
            return
        try:
            if self._file.read_text(encoding="utf-8").strip() == self._key:
                self._file.unlink()
        except OSError as error:
            log.debug("%s is gone already: %s", self._file, error.strerror)
        self._file = None
