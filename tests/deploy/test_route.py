from pathlib import Path

import pytest

from configs.schema import RunConfig
from deploy.commands.route import find_router, serving
from expert_trainer.errors import NotPublishedError
from expert_trainer.storage import Storage
from router.types import Route


def config(path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {"bundle": {"path": str(path)}, "base": {"model": "b"}, "data": {"train": ["t"]}}
    )


def route(expert: str | None) -> Route:
    return Route(expert, cluster=3, score=0.5, margin=0.1, abstained=expert is None, top=())


def test_before_publication_the_fitted_router_is_shown(tmp_path: Path) -> None:
    run = config(tmp_path / "bundle")
    with pytest.raises(NotPublishedError):
        find_router(run)
    fitted = Path(run.bundle.work) / "router"
    fitted.mkdir(parents=True)
    assert find_router(run) == (fitted, None)


def test_a_fitted_router_behind_a_url_is_copied(tmp_path: Path, ftp_url: str) -> None:
    run = config(tmp_path / "bundle")
    places = {"work_dir": ftp_url, "scratch_dir": str(tmp_path / "scratch")}
    run = run.model_copy(update={"bundle": run.bundle.model_copy(update=places)})
    with pytest.raises(NotPublishedError):
        find_router(run)
    Storage(ftp_url).write("router/router.json", b"{}")
    directory, served = find_router(run)
    assert served is None
    assert directory.is_relative_to(tmp_path / "scratch")
    assert (directory / "router.json").read_bytes() == b"{}"


def test_who_would_answer() -> None:
    served = frozenset({"expert-0003"})
    assert serving(route("expert-0003"), served) == "expert-0003"
    assert serving(route("expert-0004"), served) == "base"
    assert serving(route(None), served) == "base"
    assert serving(route("expert-0003"), None) is None
