"""A training run in words: the lines that screen, log and final table share.

Pure: values in, text out. Knows no terminal.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.manifest import ExpertCard
from deploy.training_state import Counts, TrainingState
from expert_trainer.types import ActorLost, ExpertFailed

CAUSE_LENGTH = 400
"""Characters of a cause that a line shows; the whole of it is in the report."""


def duration(seconds: float) -> str:
    """`0:04:09`, `27:46:40`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def counted(counts: Counts) -> str:
    """`37 of 500 done, 64 running, 399 queued`; failed and reused ones where there are any."""
    parts = [
        f"{counts.done:,} of {counts.all:,} done",
        f"{counts.running:,} running",
        f"{counts.queued:,} queued",
    ]
    if counts.failed:
        parts.append(f"{counts.failed:,} failed")
    if counts.reused:
        parts.append(f"{counts.reused:,} reused")
    return ", ".join(parts)


def time_left(state: TrainingState) -> str:
    """`about 1:58:20 left`, `at most …` where the pool did not say how long its jobs are."""
    if state.pool and state.pool.ended:
        return "all done"
    seconds = state.seconds_left
    if seconds is None:
        return "time left not known yet"
    return f"{'about' if state.steps_known else 'at most'} {duration(seconds)} left"


def summary(state: TrainingState) -> str:
    """One line for a log that has no other view."""
    starting = (
        f"; {state.starting} of {state.pool.actors} actors are starting"
        if state.pool and state.starting
        else ""
    )
    return (
        f"{duration(state.seconds)}  {counted(state.counts)}; "
        f"{state.tokens_per_second:,.0f} tokens/s, {time_left(state)}{starting}"
    )


def finished(card: ExpertCard) -> str:
    """An expert's end."""
    state = card.state.replace("_", " ")
    return f"{card.id} {state} after {duration(card.seconds)}: {card.reason}; {effort(card)}"


def effort(card: ExpertCard) -> str:
    """`1,024,000 tokens in 320 steps, stopped early`."""
    early = ", stopped early" if card.stopped_early else ""
    return f"{card.tokens_seen:,} tokens in {card.steps:,} steps{early}"


def failed(event: ExpertFailed, actor: str | None) -> str:
    """A failed try and what becomes of the expert."""
    where = f" on {short_name(actor)}" if actor else ""
    outcome = "given up" if event.final else "to be tried again"
    return f"{event.id} failed{where}, try {event.attempt}, {outcome}: {one_line(event.cause)}"


def lost(event: ActorLost, node: str | None) -> str:
    """The end of an actor."""
    where = f" on {node}" if node else ""
    return f"actor {short_name(event.actor)}{where} lost: {one_line(event.cause)}"


def one_line(cause: str) -> str:
    """A cause without line breaks, cut where it is very long."""
    text = " ".join(cause.split())
    return text if len(text) <= CAUSE_LENGTH else f"{text[:CAUSE_LENGTH]} …"


def short_name(actor: str) -> str:
    """`trainer-3.1` for `trainer-a1b2c3-3.1`: the tag in the middle is the same for all."""
    parts = actor.split("-")
    return f"{parts[0]}-{parts[-1]}" if len(parts) > 2 else actor


def members(ids: Sequence[str], width: int) -> str:
    """As many names as fit, what the first begins with said once: `expert-0003, 0007 +6`."""
    if not ids:
        return ""
    prefix = ids[0][: ids[0].rfind("-") + 1]
    text = ids[0]
    for shown, name in enumerate(ids[1:], start=1):
        longer = f"{text}, {name.removeprefix(prefix)}"
        rest = len(ids) - shown - 1
        if len(longer) + (len(f" +{rest}") if rest else 0) > width:
            return f"{text} +{len(ids) - shown}"
        text = longer
    return text
