"""`introvert batch`: a file of requests to a file of answers, each line once; resumes by itself."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import RunConfig, load_config
from configs.errors import IntrovertError
from deploy.output import check_report, note, say, table, write_report

if TYPE_CHECKING:
    from server.batch.own import OwnBackend
    from server.batch.types import Counts, JobSpec

KEY_VARIABLE = "INTROVERT_API_KEY"
SAMPLING = ("max_tokens", "temperature", "top_p", "seed")


class BatchUsageError(IntrovertError):
    """Options that cannot be used together, or an output that is there already."""

    exit_code = 2


def run(options: argparse.Namespace) -> int:
    """Answer the input; 0 when every line is an answer or an error line."""
    from deploy.batch_view import BatchView
    from server.batch.job import check_job

    config = load_config(options.config, options.overrides)
    check_report(options.report)
    spec = job_spec(options, config)
    check_job(spec)
    with BatchView() as view:
        counts = asyncio.run(_run(options, config, spec, view))
    say(summary(counts, spec))
    write_report(options.report, report(counts, spec))
    return 0


def job_spec(options: argparse.Namespace, config: RunConfig) -> JobSpec:
    """The job that the options ask for.

    Raises:
        BatchUsageError: they cannot be used.
        BatchError: the output cannot be.
    """
    from expert_trainer.storage import is_url
    from server.batch.errors import BatchOutputError
    from server.batch.job import has_begun
    from server.batch.outputs import check_kind, exists
    from server.batch.types import JobSpec

    output = options.output
    check_kind(output)
    errors = options.errors or f"{output.removesuffix(Path(output).suffix)}.errors.jsonl"
    if not errors.endswith(".jsonl"):
        raise BatchOutputError(f"{errors}: error lines are written as .jsonl")
    if options.concurrency < 1:
        raise BatchUsageError("--concurrency must be at least 1")
    if options.work:
        work = Path(options.work)
    elif is_url(output):
        digest = hashlib.sha256(output.encode()).hexdigest()[:16]
        work = config.bundle.scratch / "batch" / digest
    else:
        work = Path(f"{output}.work")
    if not options.overwrite and not has_begun(work):
        for place in (output, errors):
            if exists(place):
                raise BatchUsageError(
                    f"{place} is there already; give another name, or --overwrite to replace it"
                )
    return JobSpec(
        inputs=tuple(options.inputs),
        output=output,
        errors=errors,
        work=work.absolute(),
        defaults=_defaults(options),
        in_order=options.in_order,
    )


def summary(counts: Counts, spec: JobSpec) -> str:
    """What a person wants to know in the end."""
    rows = [
        [expert, done, total]
        for expert, (done, total) in sorted(counts.experts.items(), key=lambda kv: -kv[1][1])
    ]
    seconds = counts.seconds.get("answering", 0.0)
    now = counts.done + counts.failed - counts.finished_before
    speed = f", {now / seconds:.1f} lines/s, {counts.tokens / seconds:.0f} tokens/s" if now else ""
    before = f" ({counts.finished_before:,} of them before)" if counts.finished_before else ""
    lines = [table(["expert", "answered", "lines"], rows)] if rows else []
    lines.append(
        f"{counts.total:,} lines{before}: {counts.done:,} answered in {spec.output}, "
        f"{counts.failed:,} errors in {spec.errors}"
    )
    times = ", ".join(f"{phase} {taken:.1f} s" for phase, taken in counts.seconds.items())
    lines.append(f"{times}{speed}")
    return "\n".join(lines)


def report(counts: Counts, spec: JobSpec) -> dict[str, Any]:
    """The same for a program."""
    return {
        **asdict(counts),
        "experts": {k: {"answered": d, "lines": n} for k, (d, n) in counts.experts.items()},
        "output": spec.output,
        "errors": spec.errors,
        "inputs": list(spec.inputs),
    }


async def _run(options: argparse.Namespace, config: RunConfig, spec: JobSpec, view: Any) -> Counts:
    from server.batch.job import run_job

    if options.url:
        from server.batch.endpoint import EndpointBackend

        key = os.environ.get(KEY_VARIABLE)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with EndpointBackend(
            options.url, concurrency=options.concurrency, headers=headers
        ) as endpoint:
            return await run_job(spec, endpoint, view)
    with ExitStack() as stack:
        async with await asyncio.to_thread(_own_backend, options, config, stack) as engines:
            counts = await run_job(spec, engines, view)
        note("ending the engines …")
        return counts


def _own_backend(options: argparse.Namespace, config: RunConfig, stack: ExitStack) -> OwnBackend:
    """Engines that are on their way up, and the router."""
    from router.model import Router
    from server.batch.engines import BatchEngines
    from server.batch.own import OwnBackend

    note("starting engines …")
    engines = stack.enter_context(BatchEngines(config))
    router = Router.load(
        engines.bundle.router_dir, device=config.router.device, runtime=config.router.runtime
    )
    return OwnBackend(
        engines.bundle.manifest,
        router,
        table=lambda: engines.table,
        demand=engines.demand,
        engine_key=engines.engine_key,
        sure_only=not options.fast_routing,
    )


def _defaults(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for assignment in options.defaults:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise BatchUsageError(f"--default {assignment}: give FIELD=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    named = {name: getattr(options, name) for name in SAMPLING}
    return found | {name: value for name, value in named.items() if value is not None}
