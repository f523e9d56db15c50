"""The demo's questions, asked through the official client, with who answered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from configs.errors import IntrovertError
from deploy.demo.questions import QUESTIONS

TOKENS = 40


class QuestionError(IntrovertError):
    """The endpoint did not answer one of the demo's questions."""


@dataclass(frozen=True)
class Answer:
    """One question and what came back."""

    question: str
    expert: str
    """Id of the expert that answered, or `base`."""
    version: str
    worker: str
    score: float
    """Cosine of the question and the expert's centroid."""
    route_ms: float
    seconds: float
    model: str
    """What the body's `model` says."""
    text: str


def ask_all(url: str) -> Iterator[Answer]:
    """Ask every question by meaning, greedily, one after the other."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    for question in QUESTIONS:
        started = time.monotonic()
        try:
            raw = client.chat.completions.with_raw_response.create(
                model="introvert",
                messages=[{"role": "user", "content": question}],
                max_tokens=TOKENS,
                temperature=0,
            )
        except openai.OpenAIError as error:
            raise QuestionError(f"'{question}' was not answered: {error}") from None
        completion = raw.parse()
        yield Answer(
            question=question,
            expert=raw.headers["x-introvert-expert"],
            version=raw.headers["x-introvert-expert-version"],
            worker=raw.headers["x-introvert-worker"],
            score=float(raw.headers["x-introvert-route-score"]),
            route_ms=float(raw.headers["x-introvert-route-ms"]),
            seconds=round(time.monotonic() - started, 3),
            model=completion.model,
            text=(completion.choices[0].message.content or "").strip(),
        )
