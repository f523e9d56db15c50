"""Clients that ask a cluster's experts all the time."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from typing import Self
from urllib.error import HTTPError

from server.cluster import Cluster

PROMPT = [40, 41, 42]
ANSWER_TOKENS = 8
ANSWER_S = 240.0
"""Ends hangs, and says nothing of speed."""


class Load:
    """Requests for every expert through the gateway, one after the other, from some threads."""

    def __init__(self, cluster: Cluster) -> None:
        self.answers: list[tuple[str, str, str]] = []
        """Served name in the body, version in the header, text."""
        self.failures: list[str] = []
        self._url = cluster.url
        self._models = [home.id for home in cluster.table.experts]
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(3)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        """Return when so many more answers have come."""
        wanted = len(self.answers) + more
        deadline = time.monotonic() + ANSWER_S
        while len(self.answers) < wanted and not self.failures:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _ask(self, number: int) -> None:
        while not self._over.is_set():
            model = self._models[number % len(self._models)]
            body = {"model": model, "prompt": PROMPT, "max_tokens": ANSWER_TOKENS, "temperature": 0}
            request = urllib.request.Request(
                f"{self._url}/v1/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            number += 1
            try:
                with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
                    answer = json.load(response)
                    version = response.headers["x-introvert-expert-version"]
            except OSError as error:
                detail = error.read().decode() if isinstance(error, HTTPError) else ""
                self.failures.append(f"{error} {detail}")
            else:
                text = answer["choices"][0]["text"]
                self.answers.append((answer["model"], version, text))
