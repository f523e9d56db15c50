"""What a training run came to, as the text that a person reads when it is over.

Pure: a summary, cards and what the events told in, lines out.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from configs.manifest import ExpertCard
from deploy.output import table
from deploy.training_state import TrainingState
from deploy.training_words import duration, one_line

if TYPE_CHECKING:
    from expert_trainer.training import TrainSummary

MAX_ROWS = 40
"""Experts up to which each has a row."""
EXTREMES = 5
"""Rows of the best and of the worst experts where there are more."""
TERMS_SHOWN = 4
EARLY = "*"
HEADERS = [
    "expert",
    "top terms",
    "tokens",
    "  steps",
    "base",
    "expert",
    "gain %",
    "state",
    "seconds",
]


def describe(summary: TrainSummary, cards: Sequence[ExpertCard], state: TrainingState) -> str:
    """The end of a training run: a table of experts, what failed and what it all cost.

    Args:
        summary: what the run did.
        cards: of all finished experts, those of earlier runs included.
        state: what the run's events told.
    """
    trained = set(summary.trained)
    blocks = []
    if cards:
        blocks.append(_experts(cards, trained))
        blocks.append(_losses(cards))
    blocks += [f"{failure.id} failed: {one_line(failure.cause)}" for failure in summary.failed]
    blocks += _totals(summary, state)
    return "\n".join(blocks)


def gain(card: ExpertCard) -> float | None:
    """Percent by which the expert's held-out loss lies below the base's; none if unmeasured."""
    if card.heldout_loss_base is None or card.heldout_loss_expert is None:
        return None
    return 100 * (1 - card.heldout_loss_expert / card.heldout_loss_base)


def _experts(cards: Sequence[ExpertCard], trained: set[str]) -> str:
    ordered = sorted(cards, key=lambda card: card.id)
    if len(ordered) <= MAX_ROWS:
        return _with_legend(table(HEADERS, _rows(ordered, trained)), ordered)
    measured = sorted((c for c in ordered if gain(c) is not None), key=lambda c: gain(c) or 0.0)
    parts = {
        f"the {EXTREMES} that gained least": measured[:EXTREMES],
        f"the {EXTREMES} that gained most": measured[-EXTREMES:][::-1],
    }
    seen = {card.id for card in measured[:EXTREMES]}
    parts["all others held back"] = [
        card for card in ordered if card.state == "held_back" and card.id not in seen
    ]
    shown = {name: part for name, part in parts.items() if part}
    rows = [row for part in shown.values() for row in _rows(part, trained)]
    header, rule, *lines = table(HEADERS, rows).splitlines()
    text, at = [header, rule], 0
    for name, part in shown.items():
        text += [f"{name}:", *lines[at : at + len(part)]]
        at += len(part)
    return _with_legend("\n".join(text), [card for part in shown.values() for card in part])


def _rows(cards: Sequence[ExpertCard], trained: set[str]) -> list[list[object]]:
    return [
        [
            card.id,
            " ".join(card.top_terms[:TERMS_SHOWN]),
            card.tokens_seen,
            f"{card.steps:>7,}{EARLY if card.stopped_early else ' '}",
            _loss(card.heldout_loss_base),
            _loss(card.heldout_loss_expert),
            gain(card),
            card.state.replace("_", " ") + ("" if card.id in trained else ", reused"),
            round(card.seconds),
        ]
        for card in cards
    ]


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:6.3f}"


def _with_legend(text: str, cards: Sequence[ExpertCard]) -> str:
    early = any(card.stopped_early for card in cards)
    legend = f"\n{EARLY} stopped early: its held-out loss no longer fell" if early else ""
    return f"{text}{legend}\n"


def _losses(cards: Sequence[ExpertCard]) -> str:
    """One line on the losses of all experts."""
    admitted = sum(card.state == "admitted" for card in cards)
    line = f"{len(cards):,} experts: {admitted:,} admitted, {len(cards) - admitted:,} held back"
    early = sum(card.stopped_early for card in cards)
    if early:
        line += f", {early:,} stopped early"
    gains = [each for card in cards if (each := gain(card)) is not None]
    if gains:
        line += (
            f"; gain {median(gains):.1f}% in the median, {fmean(gains):.1f}% on average, "
            f"from {min(gains):.1f}% to {max(gains):.1f}%"
        )
    return line


def _totals(summary: TrainSummary, state: TrainingState) -> list[str]:
    """What this run trained, how fast, and what failures cost it."""
    trained, seconds = len(summary.trained), max(summary.seconds, 1e-9)
    line = f"{trained:,} trained now in {duration(summary.seconds)}"
    if trained:
        line += (
            f": {trained * 3600 / seconds:,.0f} experts an hour, "
            f"{state.tokens_trained / seconds:,.0f} tokens/s"
        )
    if state.actor_seconds:
        busy = state.computing_seconds / state.actor_seconds
        line += f", actors computing {busy:.1%} of their time"
    lines = [line]
    if state.retries or state.tokens_wasted:
        share = state.tokens_wasted / max(state.tokens_trained, 1)
        lines.append(
            f"{state.retries:,} {'try was' if state.retries == 1 else 'tries were'} repeated; "
            f"failures cost {state.tokens_wasted:,} tokens of training, {share:.1%} of all"
        )
    return lines
