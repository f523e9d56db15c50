"""Every command and path in the images, the compose file and the cluster file exists here."""

import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs import load_config
from deploy.cli import build_parser

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMPOSE = ROOT / "docker" / "compose.yaml"
CLUSTER = ROOT / "deploy" / "ray-cluster.yaml"
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


def instructions(dockerfile: Path) -> list[list[str]]:
    """The Dockerfile's instructions, continuation lines joined, as words."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [line.split() for line in lines]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def introvert_commands(text: str) -> list[list[str]]:
    """The arguments of every call of `introvert` in a text."""
    calls = re.findall(r"(?:^|[\s'/])introvert ((?:[\w$@{}:.=/\"-]+ ?)+)", text, flags=re.MULTILINE)
    return [shlex.split(call.replace('"', "")) for call in calls]


@pytest.fixture(scope="module")
def ray_start_flags() -> set[str]:
    ray = Path(sys.executable).with_name("ray")
    help_text = subprocess.run(
        [ray, "start", "--help"], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"--[a-z-]+", help_text))


def test_there_is_an_image_for_cpu_and_one_for_gpu() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_everything_copied_exists_and_every_package_is_copied(dockerfile: Path) -> None:
    copied = [words[1:-1] for words in instructions(dockerfile) if words[0] == "COPY"]
    sources = {source for words in copied for source in words}
    missing = [source for source in sources if not (ROOT / source).exists()]
    assert missing == []
    assert {"configs", "router", "expert_trainer", "server", "deploy"} <= sources
    assert {"Makefile", "pyproject.toml", "deploy/locks"} <= sources


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_install_step_is_a_make_target_with_a_lock(dockerfile: Path) -> None:
    runs = [" ".join(words[1:]) for words in instructions(dockerfile) if words[0] == "RUN"]
    install = next(run for run in runs if run.startswith("make "))
    words = shlex.split(install)
    assert words[1] in make_targets()
    extra = dict(word.split("=") for word in words[2:])["EXTRA"]
    assert dockerfile.name.startswith(extra)
    assert (ROOT / "deploy" / "locks" / f"{extra}.txt").is_file()


def test_entrypoint_is_executable_and_parses() -> None:
    assert ENTRYPOINT.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", ENTRYPOINT], check=True)


def test_entrypoint_hands_on_other_commands() -> None:
    done = subprocess.run(
        [ENTRYPOINT, "echo", "as it stands"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "as it stands\n"


def test_compose_roles_exist_in_the_entrypoint() -> None:
    roles = set(re.findall(r"^([a-z]+)\)$", ENTRYPOINT.read_text(), flags=re.MULTILINE))
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert {service["command"][0] for service in services.values()} == roles
    assert roles == {"head", "worker", "gateway"}


def test_compose_files_exist() -> None:
    text = COMPOSE.read_text()
    named = re.findall(r"docker/[\w.-]+", text)
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_compose_default_config_is_a_preset() -> None:
    default = re.search(r"INTROVERT_CONFIG:-(\w+)", COMPOSE.read_text())
    assert default is not None
    load_config(default.group(1))


@pytest.mark.parametrize("path", [COMPOSE, CLUSTER, ENTRYPOINT], ids=lambda path: path.name)
def test_introvert_calls_parse(path: Path) -> None:
    calls = introvert_commands(path.read_text().replace('"$@"', "CONFIG"))
    assert calls
    for call in calls:
        build_parser().parse_args(call)


def test_compose_healthcheck_parses() -> None:
    check = yaml.safe_load(COMPOSE.read_text())["services"]["gateway"]["healthcheck"]["test"]
    assert check[:2] == ["CMD", "introvert"]
    build_parser().parse_args(check[2:])


@pytest.mark.parametrize("path", [CLUSTER, ENTRYPOINT], ids=lambda path: path.name)
def test_ray_start_flags_exist(path: Path, ray_start_flags: set[str]) -> None:
    text = re.sub(r"\\\n", " ", path.read_text())
    starts = re.findall(r"ray start (.*)", text)
    assert starts
    used = {flag for start in starts for flag in re.findall(r"--[a-z-]+", start)}
    assert used <= ray_start_flags


def test_cluster_file_has_what_the_launcher_needs_and_installs_with_make() -> None:
    cluster = yaml.safe_load(CLUSTER.read_text())
    assert {"cluster_name", "provider", "auth", "head_start_ray_commands"} <= set(cluster)
    install = cluster["setup_commands"][-1].split("&&")[-1].split()
    assert install[0] == "make"
    assert install[1] in make_targets()


def test_commands_on_the_cluster_use_the_cluster() -> None:
    """Without an address each would start a private Ray on the head."""
    lines = [line for line in CLUSTER.read_text().splitlines() if "bin/introvert " in line]
    assert len(lines) == 2
    assert all("RAY_ADDRESS=auto " in line for line in lines)


@pytest.mark.parametrize("path", [CLUSTER, ENTRYPOINT], ids=lambda path: path.name)
def test_engines_do_not_run_behind_everything_else(path: Path) -> None:
    joins = [line for line in path.read_text().splitlines() if "ray start --address" in line]
    hosts = [line for line in joins if "--num-cpus=0" not in line]
    assert len(hosts) == 1
    assert "RAY_worker_niceness=0 " in hosts[0]


def test_workers_of_one_host_have_cores_of_their_own() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    cpu = {name: each for name, each in services.items() if each.get("profiles") == ["cpu"]}
    assert len(cpu) == 2
    assert len({each["cpuset"] for each in cpu.values()}) == 2


def test_images_listen_on_the_default_port() -> None:
    port = str(load_config("demo").gateway.port)
    ports = yaml.safe_load(COMPOSE.read_text())["services"]["gateway"]["ports"]
    assert ports == [f"{port}:{port}"]
    for dockerfile in DOCKERFILES:
        exposed = next(words for words in instructions(dockerfile) if words[0] == "EXPOSE")
        assert port in exposed
