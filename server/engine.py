"""The engine: how vLLM's server is started, and how it is spoken to.

The only module that knows vLLM's flags, environment and routes; it imports nothing of it, since
the engine is a child process. It does not know when an engine is started or given up: that is the
supervisor's.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from configs.manifest import Fingerprint
from configs.schema import BaseConfig, EngineArg, ServingConfig
from expert_trainer.hashed import HashedDirectory
from server.errors import EngineCallError, ServingConfigError

ENGINE = "vllm"
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The only values that `--max-lora-rank` takes."""
OWN_FLAGS = frozenset({"model", "served-model-name", "host", "port", "enable-lora", "lora-modules"})
"""Flags that the control plane relies on, so that a config may not set them."""
CALL_TIMEOUT_S = 120.0
"""Longest that one load or probe may take."""
PROBE_TEXT = "Hello"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One expert as an engine loads it."""

    served_name: str
    """`expert-0007@3f2a9c…`: a new version is a new name, and so never a stale cache."""
    path: str
    """Its directory on the engine's machine."""
    rank: int
    fingerprint: Fingerprint
    source: HashedDirectory | None = None
    """What is copied to `path` before the engine starts; none: it is there by itself."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What an engine computes on: GPUs, or cores where there are none."""

    gpus: tuple[str, ...] = ()
    """As Ray assigned them; the process sees these alone."""
    cores: tuple[int, ...] = ()
    """The operating system's numbers."""

    @property
    def label(self) -> str:
        """`cuda:0,1` or `cores:0-3`."""
        if self.gpus:
            return f"cuda:{','.join(self.gpus)}"
        return f"cores:{_ranges(self.cores)}"


@dataclass(frozen=True)
class EngineCommand:
    """A process to start."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of whoever starts it."""
    cores: tuple[int, ...] = ()
    """Cores the process is confined to; empty: none in particular."""


def build_command(
    *,
    base: BaseConfig,
    serving: ServingConfig,
    devices: Devices,
    adapters: Sequence[Adapter],
    host: str,
    port: int,
) -> EngineCommand:
    """The command that starts an engine with room for `adapters`.

    The adapters are loaded over HTTP once it answers, one by one: named on the command line, a
    single damaged one would keep the whole engine from starting.

    Raises:
        ServingConfigError: `serving.engine_args` sets a flag of ours, or a rank is too high.
    """
    check_engine_args(serving)
    flags: dict[str, EngineArg] = {
        "model": base.model,
        "served-model-name": base.served_name,
        "host": host,
        "port": port,
        "revision": base.revision,
        "trust-remote-code": base.trust_remote_code or None,
        "max-model-len": serving.max_model_len,
        "disable-uvicorn-access-log": True,
        **_lora_flags(adapters, serving),
        **(_gpu_flags(base, serving, devices) if devices.gpus else _cpu_flags(base, devices)),
    }
    flags |= {_flag(name): value for name, value in serving.engine_args.items()}
    env = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        **({"HF_HUB_OFFLINE": "1"} if Path(base.model).is_dir() else {}),
        **({} if devices.gpus else _cpu_env(serving, devices)),
        **serving.engine_env,
    }
    argv = (sys.executable, "-m", SERVER_MODULE, *_render(flags))
    return EngineCommand(argv=argv, env=env, cores=devices.cores)


def check_engine_args(serving: ServingConfig) -> None:
    """Refuse extra arguments that would cut the engine off from the control plane.

    Raises:
        ServingConfigError: names the argument.
    """
    for name in serving.engine_args:
        if _flag(name) in OWN_FLAGS:
            raise ServingConfigError(
                f"serving.engine_args.{name} is set by the control plane itself; remove it"
            )


def accepted_rank(rank: int) -> int:
    """The least rank the engine can be sized for that holds `rank`.

    Raises:
        ServingConfigError: there is none.
    """
    for accepted in LORA_RANKS:
        if rank <= accepted:
            return accepted
    raise ServingConfigError(
        f"an expert of rank {rank} cannot be served: {ENGINE} takes {LORA_RANKS[-1]} at the most; "
        "train with a lower experts.rank"
    )


def fingerprint_distance(measured: Sequence[float], recorded: Sequence[float]) -> float:
    """Mean absolute difference, in nats; infinite for lists of different lengths."""
    if len(measured) != len(recorded) or not recorded:
        return math.inf
    return sum(abs(a - b) for a, b in zip(measured, recorded, strict=True)) / len(recorded)


class EngineClient:
    """One engine's HTTP API, as far as the control plane needs it."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        """Speak to the engine at `url` through a session that the caller closes."""
        self._session = session
        self._url = url

    async def healthy(self, timeout_s: float) -> bool:
        """Whether the engine says, within `timeout_s`, that it is well."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.get(f"{self._url}/health", timeout=timeout) as response:
                return response.status == 200
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
        """Take an adapter out."""
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": served_name})

    async def generate(self, model: str) -> None:
        """Have `model` generate one token."""
        await self._complete(model, PROBE_TEXT, {})

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
        self, model: str, prompt: str | list[int], extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, **extra}
        answer = await self._call("POST", "/v1/completions", body)
        with _expected_shape("/v1/completions"):
            if answer["usage"]["completion_tokens"] < 1:
                raise EngineCallError(f"{model} generated nothing")
            choice: dict[str, Any] = answer["choices"][0]
            return choice

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One call; JSON answers are parsed, others come back as text.

        Raises:
            EngineCallError: no answer, or a refusal.
        """
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        try:
            async with self._session.request(
                method, self._url + path, json=body, timeout=timeout
            ) as response:
                if response.status != 200:
                    raise EngineCallError(_reason(await response.text()))
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
            f"{route} answered in a shape unknown to this version ({type(error).__name__}: {error})"
        ) from None


def _reason(text: str) -> str:
    """The first line of a refusal's message, or of its text if it has none."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text
    lines = str(message).strip().splitlines()
    return lines[0][:300] if lines else "refused without a reason"


def _lora_flags(adapters: Sequence[Adapter], serving: ServingConfig) -> dict[str, EngineArg]:
    if not adapters:
        return {}
    slots = len(adapters) if serving.slots == "auto" else serving.slots
    return {
        "enable-lora": True,
        "max-loras": slots,
        "max-cpu-loras": max(slots, len(adapters)),
        "max-lora-rank": accepted_rank(max(adapter.rank for adapter in adapters)),
    }


def _gpu_flags(base: BaseConfig, serving: ServingConfig, devices: Devices) -> dict[str, EngineArg]:
    return {
        "dtype": "bfloat16" if base.dtype == "auto" else base.dtype,
        "tensor-parallel-size": len(devices.gpus),
        "gpu-memory-utilization": serving.gpu_memory_utilization,
    }


def _cpu_flags(base: BaseConfig, devices: Devices) -> dict[str, EngineArg]:
    flags: dict[str, EngineArg] = {
        "dtype": "float32" if base.dtype == "auto" else base.dtype,
        "enforce-eager": True,
    }
    if len(devices.cores) == 1:
        flags["distributed-executor-backend"] = "uni"
    return flags


def _cpu_env(serving: ServingConfig, devices: Devices) -> dict[str, str]:
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(serving.cpu_kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": _ranges(devices.cores),
        "OMP_NUM_THREADS": str(len(devices.cores)),
        # vLLM compiles a few small functions (log-probabilities, for one) with a C++ compiler at
        # their first use, whatever --enforce-eager says: not every machine has one, and it delays
        # the first answer of every engine.
        "TORCHDYNAMO_DISABLE": "1",
    }
    if len(devices.cores) == 1:
        # On a CPU the engine adds a process whose only purpose is to place OpenMP's threads on
        # cores. One core leaves nothing to place, and without that process an engine starts in 17 s
        # rather than 24 and takes half a GiB less (two cores, 0.3M-parameter Llama).
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


def _render(flags: Mapping[str, EngineArg]) -> list[str]:
    """Flags as arguments: true bare, false with `no-`, none left out, lists as repeated values."""
    argv: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        if value is True or value is False:
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            argv += [f"--{name}", *value]
        else:
            argv += [f"--{name}", str(value)]
    return argv


def _flag(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _ranges(cores: Sequence[int]) -> str:
    """Cores as a list of ranges: `0-3,6`."""
    parts: list[tuple[int, int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], core)
        else:
            parts.append((core, core))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
