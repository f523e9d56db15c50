from pathlib import Path
from typing import Any

import pytest

from configs.schema import BaseConfig
from expert_trainer.base import load_tokenizer
from expert_trainer.errors import BaseModelError
from expert_trainer.rendering import Renderer, RenderError
from expert_trainer.types import Document, Example

CHAT = (
    {"role": "user", "content": "where is the boat"},
    {"role": "assistant", "content": "in the harbour"},
    {"role": "user", "content": "and the net"},
    {"role": "assistant", "content": "in the storm"},
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'user' or loop.last %}"
    "{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer(base_dir: Path) -> Any:
    return load_tokenizer(BaseConfig(model=str(base_dir)))


def predicted(tokenizer: Any, example: Example) -> str:
    wanted = zip(example.token_ids, example.targets, strict=True)
    text: str = tokenizer.decode([token for token, target in wanted if target])
    return text


def test_a_plain_text_is_predicted_to_its_end(tokenizer: Any) -> None:
    example = Renderer(tokenizer).render(Document(id="a", text="the boat and the tide"))
    assert tokenizer.decode(example.token_ids) == "the boat and the tide</s>"
    assert example.targets == [False] + [True] * (len(example.token_ids) - 1)


def test_a_completion_is_predicted_and_its_prompt_is_not(tokenizer: Any) -> None:
    example = Renderer(tokenizer).render(Document(id="a", prompt="the boat", text=" sails"))
    assert tokenizer.decode(example.token_ids) == "the boat sails</s>"
    assert predicted(tokenizer, example) == " sails</s>"
    prompt = tokenizer("the boat")["input_ids"]
    assert example.token_ids[: len(prompt)] == prompt, "tokens as a request's prompt has them"


def test_an_assistants_turns_are_predicted(tokenizer: Any) -> None:
    example = Renderer(tokenizer).render(Document(id="a", messages=CHAT))
    assert tokenizer.decode(example.token_ids) == tokenizer.apply_chat_template(
        list(CHAT), tokenize=False
    )
    assert predicted(tokenizer, example) == "in the harbour<|end|>\nin the storm<|end|>\n"


def test_a_templates_own_marks_decide(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    example = Renderer(tokenizer).render(Document(id="a", messages=CHAT))
    assert predicted(tokenizer, example) == "in the harbour<|end|>in the storm<|end|>"


def test_turns_that_the_template_rewrites_are_not_predicted(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    example = Renderer(tokenizer).render(Document(id="a", messages=CHAT))
    assert predicted(tokenizer, example) == "in the storm<|end|>\n"


def test_a_chat_that_the_template_refuses(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(RenderError, match="turns must alternate"):
        Renderer(tokenizer).render(Document(id="a", messages=CHAT))


def test_a_base_without_a_template_takes_no_chats(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(BaseModelError, match="no chat template"):
        Renderer(tokenizer).render(Document(id="a", messages=CHAT))
