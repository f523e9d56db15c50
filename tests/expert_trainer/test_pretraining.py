import json
from dataclasses import replace
from pathlib import Path

import pytest

from expert_trainer.pretraining import (
    END_OF_TEXT,
    SUMMARY_FILE,
    PretrainingError,
    SmallLlama,
    pretrain,
)

TEXTS = [
    f"The {animal} runs over the {place}."
    for animal in ("fox", "dog", "cat", "hen") * 8
    for place in ("hill", "field", "river", "road")
]
SHAPE = SmallLlama(
    vocabulary=320,
    hidden=32,
    intermediate=64,
    layers=2,
    heads=2,
    context=64,
    sequence_length=32,
    batch_rows=4,
    tokens=20_000,
    learning_rate=5e-3,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pretraining") / "base"
    pretrain(TEXTS, directory, shape=SHAPE, seed=3)
    return directory


def test_the_base_loads_like_any_other_and_has_learnt(made: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    model = AutoModelForCausalLM.from_pretrained(made)
    ids = tokenizer(TEXTS[0] + END_OF_TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.0  # a uniform guess costs ln 320 = 5.8
    summary = json.loads((made / SUMMARY_FILE).read_text())
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["final_loss"] < 3.0


def test_the_tokenizer_round_trips_and_shows_a_chat_as_text(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made)
    text = "Any text, even wörds → unseen."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}],
        tokenize=False,
    )
    assert chat == "Hello.\nYes.\n"


def test_the_same_seed_gives_the_same_weights(made: Path, tmp_path: Path) -> None:
    pretrain(TEXTS, tmp_path / "again", shape=SHAPE, seed=3)
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (made / weights).read_bytes()


def test_progress_counts_every_step(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    shape = replace(SHAPE, tokens=1000)
    pretrain(
        TEXTS,
        tmp_path / "b",
        shape=shape,
        seed=0,
        on_progress=lambda step, steps, _: seen.append((step, steps)),
    )
    assert seen == [(step, 7) for step in range(1, 8)]


def test_too_little_text_is_a_clear_error_and_leaves_no_base(tmp_path: Path) -> None:
    with pytest.raises(PretrainingError, match="give more text"):
        pretrain(["short"], tmp_path / "base", shape=SHAPE, seed=0)
    assert not (tmp_path / "base").exists()
