"""How busy the pool keeps its actors: thousands of short jobs on a Ray of several nodes.

Training is stubbed by a sleep, so 64 actors fit one machine; the pool, Ray and the nodes are real.
The actors wait for each other before the first job, so that the figures are the scheduler's and
not those of Ray's start.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from _naps import Nap, make_bed
from _report import Report, parser

from configs.schema import BaseConfig, BundleConfig, DataConfig, ExpertsConfig, RunConfig
from deploy.output import note
from expert_trainer.runtime import (
    DRIVER_ENVIRONMENT,
    RAY_ENVIRONMENT,
    alive_nodes,
    ray_session,
)
from expert_trainer.types import ActorUp, ExpertFailed, JobFinished, PoolEnded

NODES = 4
ACTORS = 64
JOB_S = 1.0
JOBS, QUICK_JOBS = 5_000, 1_600
WARM_UP = 0.2
"""Share of the jobs after which the driver's memory is looked at for the first time."""


@contextmanager
def cluster() -> Iterator[None]:
    """A Ray of several nodes on this machine, and a session on it."""
    from ray.cluster_utils import Cluster

    # what is for the driver alone, its session sets by itself: the nodes are as anybody starts them
    os.environ |= {k: v for k, v in RAY_ENVIRONMENT.items() if k not in DRIVER_ENVIRONMENT}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(NODES):
            made.add_node(num_cpus=ACTORS // NODES)
        os.environ["RAY_ADDRESS"] = made.address
        with ray_session():
            yield
    finally:
        made.shutdown()


def measure(report: Report, jobs: int) -> None:
    """Run the jobs and record the figures."""
    from expert_trainer.pool import Pool
    from expert_trainer.schedule import plan_crew

    config = RunConfig(
        bundle=BundleConfig(path="unused"),
        base=BaseConfig(model="none"),
        data=DataConfig(train=["none"]),
        experts=ExpertsConfig(actors=ACTORS),
    )
    crew = plan_crew(jobs, config.experts, alive_nodes())
    driver = psutil.Process()
    spans: list[tuple[float, float]] = []
    memory: list[int] = []
    with tempfile.TemporaryDirectory() as directory:
        pool = Pool(config, crew, make_bench=make_bed(Path(directory), ACTORS))
        up = 0
        for event in pool.run([Nap(f"nap-{i:04d}", JOB_S) for i in range(jobs)]):
            match event:
                case ActorUp():
                    up += 1
                    if up == ACTORS:
                        note(f"  {up} actors are up")
                    used, since = sum(driver.cpu_times()[:2]), time.monotonic()
                case JobFinished():
                    spans.append(event.outcome)
                    if len(spans) == int(WARM_UP * jobs) or len(spans) == jobs:
                        memory.append(driver.memory_info().rss)
                        cpu = (sum(driver.cpu_times()[:2]) - used) / (time.monotonic() - since)
                case ExpertFailed():
                    raise RuntimeError(f"a job that sleeps has failed: {event}")
                case PoolEnded():
                    ended = event
    wall = max(end for _, end in spans) - min(begin for begin, _ in spans)
    report.add("actors_busy_percent", 100 * jobs * JOB_S / (ACTORS * wall), "%", ">= 98")
    # the last wave of jobs leaves actors without work, whoever schedules
    waves = -(-jobs // ACTORS)
    report.add("best_possible_percent", 100 * jobs / (ACTORS * waves), "%")
    report.add("busy_by_the_actors_clocks_percent", 100 * ended.computing / ended.seconds, "%")
    report.add("jobs_per_second", jobs / wall, "1/s")
    report.add("driver_memory_growth_mib", (memory[-1] - memory[0]) / 2**20, "MiB", "<= 16")
    report.add("driver_cpu_percent", 100 * cpu, "% of a core")


def main() -> int:
    """Measure and report."""
    arguments = parser(__doc__ or "").parse_args()
    jobs = QUICK_JOBS if arguments.quick else JOBS
    report = Report("scheduler", conditions={"nodes": NODES, "actors": ACTORS, "jobs": jobs})
    report.conditions |= {
        "job_s": JOB_S,
        "busy": "sum of job seconds / (actors x wall), tail included",
    }
    begin = time.monotonic()
    with cluster():
        note(f"  {NODES} nodes are up after {time.monotonic() - begin:.0f} s")
        measure(report, jobs)
    return report.close(arguments.report)


if __name__ == "__main__":
    sys.exit(main())
