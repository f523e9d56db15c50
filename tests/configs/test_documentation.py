from pathlib import Path

from configs.documentation import render

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_schema_says() -> None:
    assert PAGE.read_text() == render()
