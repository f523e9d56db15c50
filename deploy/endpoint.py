"""A running endpoint as commands reach it: its URL, and the admin key where one is needed."""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configs.errors import IntrovertError
from server.admin_key import admin_key_file

KEY_VARIABLE = "INTROVERT_ADMIN_KEY"
TIMEOUT_S = 10.0


class EndpointError(IntrovertError):
    """No endpoint answers at the URL, or it refuses; the text says what to do."""


class KeyFileError(IntrovertError):
    """The file of the admin key cannot be read."""

    exit_code = 2


class Endpoint:
    """The admin routes of a running endpoint."""

    def __init__(self, url: str, key: str | None) -> None:
        """Use `of` for a command's options."""
        self._url = url.rstrip("/")
        self._key = key

    @classmethod
    def of(cls, options: argparse.Namespace) -> Endpoint:
        """The endpoint that a command's options name.

        Raises:
            KeyFileError: the file of the admin key cannot be read.
        """
        return cls(options.url, find_key(options.url, options.admin_key_file))

    def call(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """Its JSON answer.

        Raises:
            EndpointError: there is none, or it is a refusal.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} if data else {}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            request = urllib.request.Request(self._url + path, data, headers, method=method)
            # never through a redirect: the key is for this address alone
            with _OPENER.open(request, timeout=timeout_s) as answer:
                document: dict[str, Any] = json.load(answer)
                return document
        except urllib.error.HTTPError as error:
            raise EndpointError(_refusal(self._url, error)) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise EndpointError(
                f"no Introvert endpoint answers at {self._url} ({reason}); start one with "
                "`introvert serve CONFIG` or give its address with --url"
            ) from None


def find_key(url: str, key_file: str | None) -> str | None:
    """The admin key for a URL: of the file, of the environment, or of this machine's endpoint.

    Raises:
        KeyFileError: the file cannot be read.
    """
    if key_file is not None:
        try:
            return Path(key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8"
            raise KeyFileError(f"--admin-key-file {key_file} cannot be read: {reason}") from None
    if key := os.environ.get(KEY_VARIABLE):
        return key.strip()
    try:
        parts = urlsplit(url)
        if not _is_here(parts.hostname or ""):
            return None
        return admin_key_file(parts.port or 80).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None  # another user's endpoint, or one whose key was configured


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _is_here(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    try:
        message = str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        message = "that is no answer of an Introvert endpoint"
    return f"{url} answered with status {error.code}: {message}"
