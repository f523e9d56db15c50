"""One engine's HTTP API, as far as the control plane needs it.

The only module that knows vLLM's routes; its command line is in `server.engine`. It does not know
when an engine is started or given up, nor what is to be loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import aiohttp

from server.engine import ENGINE, Adapter
from server.errors import EngineCallError

CALL_TIMEOUT_S = 120.0
"""Longest that one load or probe may take."""
PROBE_TEXT = "Hello"
_TOKENS = re.compile(r"^vllm:iteration_tokens_total_sum(?:{[^}]*})? (\S+)$", re.MULTILINE)


class EngineClient:
    """One engine's HTTP API, as far as the control plane needs it."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, api_key: str | None = None
    ) -> None:
        """Speak to the engine at `url` through a session that the caller closes."""
        self._session = session
        self._url = url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def healthy(self, timeout_s: float) -> bool:
        """Whether the engine says, within `timeout_s`, that it is well."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.get(f"{self._url}/health", timeout=timeout) as response:
                return response.status == HTTPStatus.OK
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def version(self) -> str:
        """Engine and version, such as `vllm 0.32.0`."""
        answer = await self._call("GET", "/version")
        with _expected_shape("/version"):
            return f"{ENGINE} {answer['version']}"

    async def max_model_len(self) -> int | None:
        """Context length in tokens, if the engine tells it."""
        models = await self._call("GET", "/v1/models")
        with _expected_shape("/v1/models"):
            lengths = [model.get("max_model_len") for model in models["data"]]
            return next((int(length) for length in lengths if length is not None), None)

    async def load(self, adapter: Adapter) -> None:
        """Load an adapter under its served name."""
        body = {"lora_name": adapter.served_name, "lora_path": adapter.path}
        await self._call("POST", "/v1/load_lora_adapter", body)

    async def unload(self, served_name: str) -> None:
        """Take an adapter out; one that is not there is out already.

        Requests that it is answering go on to their end.
        """
        try:
            await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": served_name})
        except EngineCallError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    async def generate(self, model: str, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Have `model` generate one token."""
        await self._complete(model, PROBE_TEXT, {}, timeout_s)

    async def tokens_computed(self) -> float:
        """Tokens of prompts and answers that it has computed since its start."""
        text = str(await self._call("GET", "/metrics"))
        return sum(float(value) for value in _TOKENS.findall(text))

    async def probe(self, model: str, token_ids: Sequence[int]) -> list[float]:
        """Generate one token after `token_ids`; return the log-probabilities of these.

        Returns:
            Nats, one for each token after the first, given those before it.
        """
        choice = await self._complete(model, list(token_ids), {"prompt_logprobs": 0})
        with _expected_shape("/v1/completions"):
            # The first entry is null, each other maps the token's id to its log-probability.
            rows = choice["prompt_logprobs"][1:]
            return [
                float(row[str(token)]["logprob"])
                for row, token in zip(rows, token_ids[1:], strict=True)
            ]

    async def _complete(
        self,
        model: str,
        prompt: str | list[int],
        extra: Mapping[str, Any],
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **extra}
        answer = await self._call("POST", "/v1/completions", body, timeout_s)
        with _expected_shape("/v1/completions"):
            if answer["usage"]["completion_tokens"] < 1:
                raise EngineCallError(f"{model} generated nothing", HTTPStatus.OK)
            choice: dict[str, Any] = answer["choices"][0]
            return choice

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Any:
        """One call; JSON answers are parsed, others come back as text.

        Raises:
            EngineCallError: no answer, or a refusal.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self._url + path, json=body, headers=self._headers, timeout=timeout
            ) as response:
                if response.status != HTTPStatus.OK:
                    raise EngineCallError(_reason(await response.text()), response.status)
                if response.content_type == "application/json":
                    return await response.json()
                return await response.text()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # no JSON, or no UTF-8
            reason = str(error) or type(error).__name__
            raise EngineCallError(f"no answer from the engine ({reason})") from None


@contextmanager
def _expected_shape(route: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineCallError(
            f"{route} answered in a shape unknown to this version "
            f"({type(error).__name__}: {error})",
            HTTPStatus.OK,
        ) from None


def _reason(text: str) -> str:
    """The first line of a refusal's message, or of its text if it has none."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text
    lines = str(message).strip().splitlines()
    return lines[0][:300] if lines else "refused without a reason"
