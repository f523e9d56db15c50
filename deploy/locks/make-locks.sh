#!/usr/bin/env bash
# Resolve the lock files anew from pyproject.toml. Run by `make lock`, from the repository's root, with uv on the PATH.
# Needs PyTorch's CPU build among pip's configured sources (PIP_FIND_LINKS), or PyTorch's own index.
set -euo pipefail
cd "$(dirname "$0")/../.."
locks=deploy/locks
platform=(--python-version 3.11 --python-platform x86_64-manylinux_2_28)
quiet=(--generate-hashes --no-emit-index-url --no-header --no-annotate --quiet)
source=(--extra-index-url https://download.pytorch.org/whl/cpu)
[ -n "${PIP_FIND_LINKS:-}" ] && source=(--find-links "$PIP_FIND_LINKS")
absent=(--no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec)

uv pip compile pyproject.toml --extra cpu --constraint $locks/torch-cpu.txt --no-emit-package torch \
    "${absent[@]}" "${platform[@]}" "${quiet[@]}" "${source[@]}" --output-file $locks/cpu.txt
uv pip compile pyproject.toml --extra gpu "${platform[@]}" "${quiet[@]}" --output-file $locks/gpu.txt
uv pip compile pyproject.toml --extra cpu --extra dev --constraint $locks/torch-cpu.txt --constraint $locks/cpu.txt \
    --no-emit-package torch "${absent[@]}" "${platform[@]}" "${quiet[@]}" "${source[@]}" --output-file $locks/all.txt
python3 - $locks <<'PY'
"""dev.txt is what the dev extra adds to cpu.txt."""
import pathlib, re, sys

locks = pathlib.Path(sys.argv[1])

def entries(name):
    blocks = re.split(r"\n(?=[A-Za-z0-9])", (locks / name).read_text().strip())
    return {re.split(r"[=\[ ]", block)[0]: block for block in blocks}

runtime, everything = entries("cpu.txt"), entries("all.txt")
(locks / "dev.txt").write_text("\n".join(v for k, v in everything.items() if k not in runtime) + "\n")
(locks / "all.txt").unlink()
PY
