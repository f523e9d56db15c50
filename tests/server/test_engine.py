from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.manifest import Fingerprint
from configs.schema import BaseConfig, EngineArg, ServingConfig
from server.engine import (
    LORA_RANKS,
    Adapter,
    Devices,
    EngineCommand,
    Room,
    accepted_rank,
    build_command,
    fingerprint_distance,
    room_for,
)
from server.errors import ServingConfigError

CPU = Devices(cores=(0,))


def adapters(*ranks: int) -> list[Adapter]:
    fingerprint = Fingerprint(token_ids=[1, 2], logprobs=[-1.0])
    return [
        Adapter(f"expert-{i:04d}@{i:012x}", f"/bundle/{i}", rank, fingerprint)
        for i, rank in enumerate(ranks)
    ]


def command(
    base: BaseConfig | None = None,
    serving: ServingConfig | None = None,
    devices: Devices = CPU,
    ranks: tuple[int, ...] = (4, 8),
    api_key: str | None = None,
) -> EngineCommand:
    return build_command(
        base=base or BaseConfig(model="org/model"),
        serving=serving or ServingConfig(),
        devices=devices,
        room=room_for(adapters(*ranks), serving or ServingConfig()),
        host="127.0.0.1",
        port=20001,
        api_key=api_key,
    )


def value(command: EngineCommand, flag: str) -> str | None:
    argv = command.argv
    return argv[argv.index(flag) + 1] if flag in argv else None


def test_a_cpu_engine_is_pinned_eager_and_in_float32() -> None:
    made = command(devices=Devices(cores=(0, 1, 3)))
    assert value(made, "--dtype") == "float32"
    assert "--enforce-eager" in made.argv
    assert made.env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1,3"
    assert made.env["OMP_NUM_THREADS"] == "3"
    assert made.env["TORCHDYNAMO_DISABLE"] == "1"
    assert made.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert made.cores == (0, 1, 3)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in made.env


def test_one_core_needs_no_process_that_places_threads() -> None:
    made = command()
    assert value(made, "--distributed-executor-backend") == "uni"
    assert made.env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_a_gpu_engine_spans_its_gpus() -> None:
    made = command(
        serving=ServingConfig(gpu_memory_utilization=0.5), devices=Devices(gpus=("2", "3"))
    )
    assert value(made, "--tensor-parallel-size") == "2"
    assert value(made, "--dtype") == "bfloat16"
    assert value(made, "--gpu-memory-utilization") == "0.5"
    assert "--enforce-eager" not in made.argv
    assert not [name for name in made.env if "CPU" in name or "OMP" in name]
    assert made.cores == ()


@pytest.mark.parametrize(
    ("serving", "ranks", "expected"),
    [
        ({}, (4, 4, 4), Room(slots=6, host_slots=7, rank=8)),
        ({}, (4,) * 20, Room(slots=28, host_slots=40, rank=8)),
        ({"slots": 2}, (4, 4, 4), Room(slots=2, host_slots=6, rank=8)),
        ({"slots": 5}, (4,), Room(slots=5, host_slots=6, rank=8)),
        ({"slots": 2, "host_slots": 3}, (4, 4, 4), Room(slots=2, host_slots=3, rank=8)),
        ({"max_rank": 33}, (4,), Room(slots=2, host_slots=3, rank=64)),
        ({}, (4, 9), Room(slots=4, host_slots=5, rank=16)),
        ({}, (4, 1000), Room(slots=4, host_slots=5, rank=512)),
    ],
)
def test_room_follows_the_experts_or_the_config(
    serving: dict[str, object], ranks: tuple[int, ...], expected: Room
) -> None:
    assert room_for(adapters(*ranks), ServingConfig.model_validate(serving)) == expected


def test_room_becomes_flags() -> None:
    made = command(serving=ServingConfig(slots=2), ranks=(4, 4, 4))
    flags = ("--max-loras", "--max-cpu-loras", "--max-lora-rank")
    assert [value(made, flag) for flag in flags] == ["3", "6", "8"]  # one slot more, for the next
    assert "--lora-target-modules" not in made.argv
    assert "--enable-lora" in made.argv


def test_slots_are_filled_ahead_where_there_are_experts_and_somebody_waits_for_an_answer() -> None:
    filler = ("--middleware", "server.engine_slots.SlotFiller")
    assert command().argv[-2:] == filler
    assert filler[1] not in command(ranks=()).argv
    batch = build_command(
        base=BaseConfig(model="org/model"),
        serving=ServingConfig(slots=2),
        devices=CPU,
        room=room_for(adapters(4), ServingConfig(slots=2)),
        host="127.0.0.1",
        port=20001,
        offline=True,
    )
    assert filler[1] not in batch.argv
    assert value(batch, "--max-loras") == "2"


def test_layers_that_no_adapter_changes_get_no_room() -> None:
    room = room_for(adapters(4), ServingConfig(), {"q_proj", "k_proj"})
    made = build_command(
        base=BaseConfig(model="org/model"),
        serving=ServingConfig(),
        devices=CPU,
        room=room,
        host="127.0.0.1",
        port=20001,
    )
    place = made.argv.index("--lora-target-modules")
    assert made.argv[place + 1 : place + 3] == ("k_proj", "q_proj")


def test_the_key_travels_in_the_environment_and_is_shown_nowhere() -> None:
    made = command(serving=ServingConfig(engine_env={"VLLM_API_KEY": "other"}), api_key="sesame")
    assert made.env["VLLM_API_KEY"] == "sesame"
    assert "sesame" not in " ".join(made.argv) + repr(made)
    assert made.argv[-2:] == ("--middleware", "server.engine_door.EngineDoor"), "outermost"
    assert command().env["VLLM_API_KEY"] == "", "a key of the environment is not ours"


def test_without_experts_there_is_no_lora() -> None:
    made = command(ranks=())
    assert not [argument for argument in made.argv if "lora" in argument]


def test_the_base_goes_by_its_name() -> None:
    made = command(BaseConfig(model="org/model", revision="abc", trust_remote_code=True))
    assert value(made, "--served-model-name") == "model"
    assert value(made, "--revision") == "abc"
    assert "--trust-remote-code" in made.argv
    assert "HF_HUB_OFFLINE" not in made.env


def test_a_local_base_keeps_off_the_hub(tmp_path: Path) -> None:
    assert command(BaseConfig(model=str(tmp_path))).env["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("given_args", "expected"),
    [
        ({"max-num-seqs": 8}, ["--max-num-seqs", "8"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"enable-chunked-prefill": True}, ["--enable-chunked-prefill"]),
        ({"middleware": ["a", "b"]}, ["--middleware", "a", "b"]),
    ],
)
def test_extra_arguments_are_passed_on(
    given_args: dict[str, EngineArg], expected: list[str]
) -> None:
    made = command(serving=ServingConfig(engine_args=given_args), ranks=())
    assert list(made.argv[-len(expected) :]) == expected


def test_extra_arguments_win_and_none_takes_one_out() -> None:
    serving = ServingConfig(
        engine_args={"dtype": "bfloat16", "enforce-eager": None},
        engine_env={"OMP_NUM_THREADS": "9"},
    )
    made = command(serving=serving)
    assert made.argv.count("--dtype") == 1
    assert value(made, "--dtype") == "bfloat16"
    assert "--enforce-eager" not in made.argv
    assert made.env["OMP_NUM_THREADS"] == "9"


@pytest.mark.parametrize("name", ["port", "--host", "max_loras", "lora_target_modules"])
def test_arguments_that_the_control_plane_relies_on_are_refused(name: str) -> None:
    with pytest.raises(ServingConfigError, match="remove it"):
        command(serving=ServingConfig(engine_args={name: "1"}))


@given(st.integers(1, 512))
def test_a_rank_is_rounded_up_to_one_that_is_accepted(rank: int) -> None:
    accepted = accepted_rank(rank)
    assert accepted in LORA_RANKS
    assert accepted >= rank
    assert all(other < rank or other >= accepted for other in LORA_RANKS)


def test_a_rank_beyond_the_engine_is_refused() -> None:
    with pytest.raises(ServingConfigError, match="rank 513"):
        accepted_rank(513)


def test_devices_are_named() -> None:
    assert Devices(cores=(0, 1, 2, 5)).label == "cores:0-2,5"
    assert Devices(gpus=("0", "1")).label == "cuda:0,1"


def test_fingerprints_are_compared_token_by_token() -> None:
    assert fingerprint_distance([-1.0, -2.0], [-1.5, -1.5]) == 0.5
    assert fingerprint_distance([-1.0], [-1.0, -2.0]) == math.inf
    assert not fingerprint_distance([math.nan], [-1.0]) <= 1.0
