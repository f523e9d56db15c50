"""A training run drawn for a terminal of a given size.

Knows how things look and nothing of when they are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deploy.training_state import Actor, TrainingState
from deploy.training_words import counted, duration, members, short_name, time_left

BAR_WIDTH = 24
FRAME_LINES = 7
"""Lines of the view that are no actor's row, and one below it that stays free."""
MIN_ROWS = 3
MIN_WIDTH_WITH_NODE = 90
"""Columns of the narrowest terminal that has room for the names of nodes."""
MEMBERS_WIDTH = 16
"""Characters for the experts of an actor: one name; more where the terminal is wide."""
OTHER_COLUMNS_WIDTH = 86
"""Characters of all other columns and the gaps between them, where names are long."""


def draw(state: TrainingState, title: str, *, width: int, height: int) -> RenderableType:
    """What a terminal shows of a state; nothing of it changes when the state does.

    Args:
        state: the run.
        title: what is being done.
        width: columns of the terminal.
        height: lines of the terminal.
    """
    if state.pool is None:
        return Text("")
    shown = busiest(state.actors.values(), max(height - FRAME_LINES, MIN_ROWS))
    parts: list[RenderableType] = [Text(""), _header(state, title)]
    if shown:
        several = len({actor.node for actor in state.actors.values()}) > 1
        with_node = several and width >= MIN_WIDTH_WITH_NODE
        parts += [Text(""), _actors(shown, width, with_node)]
    if rest := _rest(state, shown):
        parts.append(Text(rest, style="dim"))
    return Group(*parts)


def busiest(actors: Iterable[Actor], rows: int) -> list[Actor]:
    """The actors with most before them, as many as there are rows, in the order of their names.

    By the steps left and not by speed, so that a row stays where it is from one look to the next.
    """
    most = sorted(actors, key=lambda actor: (-actor.steps_left, _natural(actor.name)))[:rows]
    return sorted(most, key=lambda actor: _natural(actor.name))


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Order in which `trainer-9.1` stands before `trainer-10.1`."""
    parts = name.replace(".", "-").split("-")
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _header(state: TrainingState, title: str) -> Group:
    bar = Table.grid(padding=(0, 2))
    share = state.share_done
    bar.add_row(
        Text(title, style="bold"),
        ProgressBar(total=1.0, completed=share, width=BAR_WIDTH, complete_style="green"),
        Text(f"{share:.0%}", style="bold", no_wrap=True),
        Text(f"{duration(state.seconds)} gone, {time_left(state)}", no_wrap=True),
    )
    counts = Text(f"{counted(state.counts)}  ", no_wrap=True)
    counts.highlight_regex(r"[\d,]+ of [\d,]+ done", "green")
    counts.highlight_regex(r"[\d,]+ failed", "bold red")
    counts.append(f"{state.tokens_per_second:,.0f} tokens/s", style="cyan")
    return Group(bar, counts)


def _actors(actors: Sequence[Actor], width: int, with_node: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("actor", no_wrap=True)
    if with_node:
        table.add_column("node", no_wrap=True, max_width=24)
    table.add_column("device", no_wrap=True)
    table.add_column("training", no_wrap=True)
    for heading in ("step", "tokens/s", "loss", "held-out"):
        table.add_column(heading, justify="right", no_wrap=True)
    room = max(MEMBERS_WIDTH, width - OTHER_COLUMNS_WIDTH + (0 if with_node else 14))
    for actor in actors:
        node = [actor.node] if with_node else []
        table.add_row(short_name(actor.name), *node, actor.device, *_work(actor, room))
    return table


def _work(actor: Actor, room: int) -> list[str | Text]:
    """What an actor is at; for several experts the longest one's steps and the mean losses."""
    group = sorted(actor.training.values(), key=lambda member: member.id)
    if not group:
        return [Text("waits", style="dim"), "", "", "", ""]
    longest = max(group, key=lambda member: (member.steps_left, member.steps))
    return [
        members([member.id for member in group], room),
        f"{longest.step:,}/{longest.steps:,}",
        f"{actor.tokens_per_second:,.0f}" if actor.tokens_per_second else "–",
        _mean(member.loss for member in group),
        _mean(member.heldout for member in group),
    ]


def _mean(losses: Iterable[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    return f"{sum(known) / len(known):.3f}" if known else "–"


def _rest(state: TrainingState, shown: Sequence[Actor]) -> str:
    """`… and 52 more actors, 3 of them waiting; 2 are starting`."""
    up, parts = len(state.actors), []
    if more := up - len(shown):
        names = {actor.name for actor in shown}
        hidden = [actor for name, actor in state.actors.items() if name not in names]
        idle = sum(not actor.training for actor in hidden)
        waiting = f", {idle} of them waiting" if idle else ""
        parts.append(f"… and {more} more {'actor' if more == 1 else 'actors'}{waiting}")
    if state.starting:
        parts.append(
            f"{state.starting} {'actor is' if state.starting == 1 else 'actors are'} starting"
        )
    return "; ".join(parts)
