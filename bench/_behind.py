"""A gateway process before upstreams of one's own choosing: its bundle, its table, its start.

The router is fitted as `introvert fit` fits it; the experts are one adapter under several names,
since no engine ever loads them here.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _stand import DIRECT, Program, free_port, running

from configs.manifest import BaseEntry
from configs.schema import RunConfig
from server.table import TABLE_FILE, ExpertHome, RoutingTable, WorkerEntry, write_table

ROOT = Path(__file__).resolve().parents[1]
START_S = 180.0


@dataclass(frozen=True)
class Texts:
    """What a router is fitted on, and queries that it has not seen."""

    corpus: Path
    queries: list[str]
    source: str


def texts(corpus: Path | None, here: Path, documents: int) -> Texts:
    """So many documents of a JSONL corpus, or of the packaged documentation strings.

    Rows with `split` are fitted on where that is `train` and asked where it is `test`; of others
    every tenth is asked. A long document is asked by its first words.
    """
    if corpus is None:
        rows = _packaged(here / "packaged")
    else:
        rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    if any("split" in row for row in rows):
        fitted = [row["text"] for row in rows if row.get("split") == "train"]
        asked = [row["text"] for row in rows if row.get("split") == "test"]
    else:
        fitted = [row["text"] for i, row in enumerate(rows) if i % 10]
        asked = [row["text"] for i, row in enumerate(rows) if i % 10 == 0]
    file = here / "corpus.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in fitted[:documents]]
    file.write_text("".join(lines), encoding="utf-8")
    queries = list(dict.fromkeys(" ".join(text.split()[:16]) for text in asked))
    return Texts(file, queries, corpus.name if corpus else "packaged documentation strings")


def _packaged(directory: Path) -> list[dict[str, Any]]:
    from deploy.demo.corpus import build_corpus

    if not directory.is_dir():
        build_corpus(directory, seed=0)
    lines = (directory / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def publish_fitted(config: RunConfig, here: Path) -> int:
    """Fit the router of `config` and publish it with experts that nothing loads; how many."""
    sys.path.insert(0, str(ROOT))
    from expert_trainer.bundle import ExpertDraft, publish
    from tests.cards import make_card
    from tests.end_to_end.conftest import build_base, build_expert

    build_base(here / "base")
    settings = here / "fit.json"
    settings.write_text(config.model_dump_json())
    command = [Path(sys.executable).with_name("introvert"), "fit", settings]
    subprocess.run(command, check=True, stdout=sys.stderr)
    router = Path(config.bundle.work) / "router"
    clusters = int(json.loads((router / "router.json").read_text())["clusters"])
    fingerprint = build_expert(here / "base", here / "adapter", seed=1)
    drafts = [
        ExpertDraft(
            here / "adapter",
            make_card(i, base_digest="0" * 64, fingerprint=fingerprint),
            1 / clusters,
        )
        for i in range(clusters)
    ]
    publish(
        config.bundle.path,
        base=BaseEntry(name=config.base.served_name, model=config.base.model, digest="0" * 64),
        router_dir=router,
        clusters=clusters,
        experts=drafts,
        config_digest="0" * 64,
    )
    return clusters


def table_of(config: RunConfig, upstreams: Sequence[str]) -> RoutingTable:
    """A table in which every upstream holds every expert of the published bundle."""
    from expert_trainer.bundle import open_published

    manifest = open_published(config.bundle, verify=False).manifest
    names = [entry.served_name for entry in manifest.experts]
    return make_table(config, upstreams, names, manifest.version)


def make_table(
    config: RunConfig, upstreams: Sequence[str], names: Sequence[str], bundle: str = "none"
) -> RoutingTable:
    """A table in which every upstream holds every expert of `names` (id@version)."""
    workers = [
        WorkerEntry(
            id=f"worker-{number}",
            state="ready",
            url=url,
            node="127.0.0.1",
            devices=f"cores:{number}",
            engine="constant",
            pid=1,
            experts=list(names),
            restarts=0,
            detail="",
        )
        for number, url in enumerate(upstreams)
    ]
    homes = [
        ExpertHome(
            id=name.partition("@")[0],
            version=name.partition("@")[2],
            served_name=name,
            cluster=cluster,
            workers=[worker.id for worker in workers],
        )
        for cluster, name in enumerate(names)
    ]
    return RoutingTable(
        version=1,
        bundle=bundle,
        base_name=config.base.served_name,
        max_model_len=4096,
        workers=workers,
        experts=homes,
    )


@contextmanager
def gateway(
    config: RunConfig,
    table: RoutingTable,
    here: Path,
    *,
    core: int | None = None,
    probe: bytes | None = None,
) -> Iterator[tuple[Program, str]]:
    """The real gateway process and its URL, once it can route, or once it answers the completion
    request `probe` where nothing is to be routed."""
    port = free_port()
    changed = config.gateway.model_copy(update={"port": port})
    run = here / "run"
    run.mkdir(parents=True, exist_ok=True)
    file = run / "gateway.json"
    file.write_text(config.model_copy(update={"gateway": changed}).model_dump_json())
    write_table(run / TABLE_FILE, table)
    files = ["--config", file, "--table", run / TABLE_FILE]
    command = [sys.executable, "-m", "server.gateway", *files]
    with running(command, here / "gateway.log", core=core) as program:
        url = f"http://127.0.0.1:{port}"
        path = "/ready" if probe is None else "/v1/completions"
        program.wait_answering(url + path, START_S, probe)
        yield program, url


def metric(url: str, name: str) -> float:
    """Sum of a metric's samples, whatever their labels; 0 where there is none."""
    with DIRECT.open(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.partition("{")[0].partition(" ")[0] == name
    )
