"""The engine: how vLLM's server is started, with room for how many adapters of which rank.

The only module that knows vLLM's flags and environment (its routes: `server.engine_client`); it
imports nothing of it, since the engine is a child process. It does not know when an engine is
started or given up: that is the supervisor's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.manifest import Fingerprint
from configs.schema import BaseConfig, EngineArg, ServingConfig
from expert_trainer.hashed import HashedDirectory
from server.engine_door import KEY_VARIABLE, EngineDoor
from server.engine_slots import AHEAD, SlotFiller
from server.errors import ServingConfigError

ENGINE = "vllm"
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
OFFLINE_MODULE = "server.engine_host"
LINES = f"{OFFLINE_MODULE}.BatchLines"
"""Import path of the middleware that takes many requests in one call."""
DOOR = f"{EngineDoor.__module__}.{EngineDoor.__name__}"
"""Import path of the middleware that asks for the key."""
FILLER = f"{SlotFiller.__module__}.{SlotFiller.__name__}"
"""Import path of the middleware that fills slots ahead."""
OFFLINE_SEQUENCES = 256
"""Requests that a batch's engine computes at once on a CPU: what `LLM.generate` has there, twice
what vLLM gives its API server; on a GPU both have more."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The only values that `--max-lora-rank` takes."""
SPARE_SLOTS = 8
"""Slots at the most that are added to those of the experts placed (see `room_for`)."""
OWN_FLAGS = frozenset(
    {
        "model",
        "served-model-name",
        "host",
        "port",
        "root-path",
        "api-key",
        "enable-lora",
        "lora-modules",
        "max-loras",
        "max-cpu-loras",
        "max-lora-rank",
        "lora-target-modules",
    }
)
"""Flags that the control plane relies on, so that a config may not set them."""


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
    """Its files as they were published: copied to `path` if they lie behind a URL, and compared
    with what is there before the engine sees it. None: nobody knows what they should be."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many adapters an engine has room for, fixed from its start to its end."""

    slots: int
    """Experts that may be asked at once. On the device there is room for one adapter more, which is
    copied in ahead or being verified."""
    host_slots: int
    """Adapters in host memory, at least as many as on the device, which are among them."""
    rank: int
    """Highest rank of an adapter, one of `LORA_RANKS`."""
    modules: frozenset[str] = frozenset()
    """Names of the layers that adapters may change, such as `q_proj`; empty: all.

    The fewer the better, and the output head is not to be among them: with room for adapters of
    the head vLLM 0.32 dies on a CPU of a request for log-probabilities of its prompt, as
    fingerprint probes are, that shares a step with another (see docs/decisions/0010)."""


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
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Added to the environment of whoever starts it; holds the engine's key."""
    cores: tuple[int, ...] = ()
    """Cores the process is confined to; empty: none in particular."""


def build_command(
    *,
    base: BaseConfig,
    serving: ServingConfig,
    devices: Devices,
    room: Room | None,
    host: str,
    port: int,
    api_key: str | None = None,
    offline: bool = False,
) -> EngineCommand:
    """The command that starts an engine.

    The adapters are loaded over HTTP once it answers, one by one: named on the command line, a
    single damaged one would keep the whole engine from starting.

    Args:
        base: the model.
        serving: limits and extra arguments.
        devices: what it computes on.
        room: for adapters; none: it serves the base alone, which is faster without that room.
        host: address it listens on.
        port: a free one.
        api_key: what its callers must show; travels in the environment, for a
            command line is there for everybody to read.
        offline: whether it is a batch's (see `server.engine_host`).

    Raises:
        ServingConfigError: `serving.engine_args` sets a flag of ours.
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
        "disable-log-stats": offline or None,
        **(_lora_flags(room, ahead=0 if offline else AHEAD) if room else {}),
        **(_gpu_flags(base, serving, devices) if devices.gpus else _cpu_flags(base, devices)),
    }
    if offline and not devices.gpus:
        flags["max-num-seqs"] = OFFLINE_SEQUENCES
    flags |= {_flag(name): value for name, value in serving.engine_args.items()}
    env = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        **({"HF_HUB_OFFLINE": "1"} if Path(base.model).is_dir() else {}),
        **({} if devices.gpus else _cpu_env(serving, devices)),
        **serving.engine_env,
        # empty: none asked for, even if whoever started us has one in the environment
        KEY_VARIABLE: api_key or "",
    }
    # the flag adds to the middleware that a config asks for, and the last one stands outermost
    lines = ("--middleware", LINES) if offline else ()
    filler = ("--middleware", FILLER) if room and not offline else ()
    door = ("--middleware", DOOR) if api_key else ()
    module = OFFLINE_MODULE if offline else SERVER_MODULE
    argv = (sys.executable, "-m", module, *_render(flags), *lines, *filler, *door)
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


def room_for(
    adapters: Sequence[Adapter], serving: ServingConfig, modules: Iterable[str] = ()
) -> Room | None:
    """The room of an engine that starts with `adapters`; none if there are none.

    `modules` are the names of the layers that they change, if those are known.

    With `auto` there are slots to spare, for an engine admits no request of another expert while
    as many experts as it has slots are running: without them, experts that are all busy would keep
    those of a new bundle from being verified and from answering. In host memory there is room for
    all of them twice: an adapter that finds none there is read from the disk again in the middle
    of a step, while all requests wait.
    """
    if not adapters:
        return None
    placed = len(adapters)
    spare = min(placed, SPARE_SLOTS)
    slots = placed + spare if serving.slots == "auto" else serving.slots
    host = 2 * placed if serving.host_slots == "auto" else serving.host_slots
    # one that no engine takes is refused by itself, and must not cost the others theirs
    largest = min(max(adapter.rank for adapter in adapters), LORA_RANKS[-1])
    rank = largest if serving.max_rank == "auto" else serving.max_rank
    return Room(slots, max(host, slots + AHEAD), accepted_rank(rank), frozenset(modules))


def fingerprint_distance(measured: Sequence[float], recorded: Sequence[float]) -> float:
    """Mean absolute difference, in nats; infinite for lists of different lengths."""
    if len(measured) != len(recorded) or not recorded:
        return math.inf
    return sum(abs(a - b) for a, b in zip(measured, recorded, strict=True)) / len(recorded)


def _lora_flags(room: Room, *, ahead: int) -> dict[str, EngineArg]:
    return {
        "enable-lora": True,
        "max-loras": room.slots + ahead,
        "max-cpu-loras": room.host_slots,
        "max-lora-rank": room.rank,
        "lora-target-modules": sorted(room.modules) or None,
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
