"""`introvert route`: where each text would go, without generating anything."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from configs import RunConfig, load_config
from deploy.output import check_report, note, say, write_report
from router.types import Route


def run(options: argparse.Namespace) -> int:
    """One JSON line per text, in order."""
    from router.model import Router

    config = load_config(options.config, options.overrides)
    check_report(options.report)
    directory, served = find_router(config)
    note(f"router: {directory}" + (" (not published yet)" if served is None else ""))
    router = Router.load(directory, device=config.router.device, runtime=config.router.runtime)
    routes = [
        {"text": text, **asdict(route), "served_by": serving(route, served)}
        for text, route in zip(options.texts, router.route(options.texts), strict=True)
    ]
    for route in routes:
        say(json.dumps(route, ensure_ascii=False))
    write_report(options.report, {"router": str(directory), "routes": routes})
    return 0


def find_router(config: RunConfig) -> tuple[Path, frozenset[str] | None]:
    """The published router with the ids of the served experts, which is what serving goes by.

    Before the first publication the fitted router, with none instead of ids.

    Raises:
        NotPublishedError: neither is there.
        StorageError: what lies behind a URL cannot be had.
    """
    from expert_trainer.bundle import COPIES_DIR, open_published
    from expert_trainer.clusters import ROUTER_DIR
    from expert_trainer.errors import NotPublishedError
    from expert_trainer.storage import Storage

    try:
        bundle = open_published(config.bundle, verify=False)
    except NotPublishedError:
        work = Storage(config.bundle.work)
        if not work.exists(ROUTER_DIR):
            raise
        if work.path is not None:
            return work.path / ROUTER_DIR, None
        copy = config.bundle.scratch / COPIES_DIR / "fitted-router"
        work.get_tree(ROUTER_DIR, copy)
        return copy, None
    return bundle.router_dir, frozenset(entry.id for entry in bundle.manifest.served)


def serving(route: Route, served: frozenset[str] | None) -> str | None:
    """Who would answer: an expert, or the base for a text that abstains or has no served expert."""
    if served is None:
        return None
    return route.expert if route.expert in served else "base"
