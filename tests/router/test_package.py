from __future__ import annotations

import subprocess
import sys

import pytest

import router

HEAVY = ("torch", "faiss", "sentence_transformers", "transformers")


@pytest.mark.parametrize(
    "module", ["router", "router.types", "router.conversation", "router.embedder"]
)
def test_importing_brings_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", router.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(router, name).__name__ == name


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = router.nothing
