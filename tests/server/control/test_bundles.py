"""Bundles on their way to workers."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.manifest import (
    BaseEntry,
    BundleManifest,
    ExpertEntry,
    FileEntry,
    RouterEntry,
)
from configs.schema import BaseConfig, RunConfig
from expert_trainer.base import base_digest, resolve_base
from expert_trainer.bundle import Bundle
from expert_trainer.errors import BaseModelError
from expert_trainer.storage import Storage
from server.control.bundles import check_base, describe
from server.errors import ServingConfigError
from tests.cards import make_card

CARD = make_card()


def config(tmp_path: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "bundle": {"path": str(tmp_path / "bundle")},
            "base": {"model": str(tmp_path / "base")},
            "data": {"train": ["x.jsonl"]},
            **sections,
        }
    )


def make_base(directory: Path, text: str = "{}") -> BaseConfig:
    directory.mkdir()
    (directory / "config.json").write_text(text)
    (directory / "model.safetensors").write_bytes(b"weights")
    return BaseConfig(model=str(directory))


def make_bundle(root: Path, digest: str, experts: list[ExpertEntry] | None = None) -> Bundle:
    manifest = BundleManifest(
        version="0123456789ab",
        created="2026-01-01T00:00:00+00:00",
        code_version="0",
        config_digest="0" * 64,
        base=BaseEntry(name="base", model="the/right-one", digest=digest),
        router=RouterEntry(version="0" * 12, clusters=1, files=[]),
        experts=experts or [],
    )
    return Bundle(root=root, manifest=manifest)


def test_a_relative_base_is_made_absolute_and_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "small-base")
    resolved = resolve_base(BaseConfig(model="small-base"))
    assert resolved.model == str(tmp_path / "small-base")
    assert resolved.served_name == "small-base"


def test_a_hub_name_stays_as_it_is() -> None:
    base = BaseConfig(model="org/model")
    assert resolve_base(base) == base


def test_another_base_than_the_experts_is_refused(tmp_path: Path) -> None:
    right = make_base(tmp_path / "right")
    wrong = make_base(tmp_path / "wrong", text='{"other": 1}')
    bundle = make_bundle(tmp_path / "bundle", base_digest(right))
    check_base(bundle, right)
    with pytest.raises(ServingConfigError, match="the/right-one"):
        check_base(bundle, wrong)


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "0" * 64)
    with pytest.raises(BaseModelError, match=r"config\.json"):
        check_base(bundle, BaseConfig(model=str(tmp_path)))


def test_engine_arguments_of_ours_are_refused_before_the_start(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "0" * 64)
    run = config(tmp_path, serving={"engine_args": {"port": 9000}})
    with pytest.raises(ServingConfigError, match=r"serving\.engine_args\.port"):
        describe(bundle, run.serving, run.base)


def test_experts_behind_a_url_are_described_without_being_copied(
    tmp_path: Path, ftp_url: str
) -> None:
    files = {"adapter_config.json": b"{}", "card.json": CARD.model_dump_json().encode()}
    entry = ExpertEntry(
        id="expert-0000",
        version="0" * 12,
        cluster=0,
        state="admitted",
        rank=8,
        mass=1.0,
        files=[
            FileEntry(path=name, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
            for name, content in files.items()
        ],
    )
    Storage(ftp_url).put_files(files, entry.directory, marker="card.json")
    near = make_bundle(tmp_path / "copies", "0" * 64, [entry])
    run = config(tmp_path)
    (expert,) = describe(replace(near, origin=Storage(ftp_url)), run.serving, run.base).experts
    assert expert.adapter.fingerprint == CARD.fingerprint
    assert expert.adapter.path == str(tmp_path / "copies" / entry.directory)
    assert expert.adapter.source
    assert expert.adapter.source.place == Storage(ftp_url) / entry.directory
    assert not (tmp_path / "copies").exists()
    assert sorted(expert.adapter.source.fetch(Path(expert.adapter.path)).iterdir()) == [
        tmp_path / "copies" / entry.directory / name for name in sorted(files)
    ]


def test_only_admitted_experts_are_served(tmp_path: Path) -> None:
    held_back = ExpertEntry(
        id="expert-0000",
        version="0" * 12,
        cluster=0,
        state="held_back",
        rank=8,
        mass=1.0,
        files=[],
    )
    run = config(tmp_path)
    deployment = describe(make_bundle(tmp_path / "b", "0" * 64, [held_back]), run.serving, run.base)
    assert deployment.experts == ()
