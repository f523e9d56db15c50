"""LoRA on a CPU, by expert: what vLLM's engine computes with where no GPU kernel does it.

vLLM 0.32's own operators for CPUs copy an adapter's matrices once for every token, which costs most
of a step. Here the tokens of one expert are multiplied by its matrices together: the more a step is
of one kind, as a batch grouped by expert is, the fewer and larger the products. Loaded into the
engine's process by `server.engine_host`; sums are those of the original in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows = slice | torch.Tensor
"""Tokens of one expert: a range where they lie together, else their places."""


class GroupedAdapters(PunicaWrapperCPU):
    """vLLM's wrapper of LoRA's operators, with the one for linear layers replaced."""

    _groups: tuple[tuple[int, Rows], ...] = ()

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Learn which tokens of the next step are whose."""
        super().update_metadata(*args, **kwargs)
        self._groups = grouped(self.token_lora_indices)

    def add_lora_linear(  # noqa: PLR0917 - as vLLM calls it
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add each token's own adapter to a layer's output, in place.

        Args:
            y: output, shape (tokens, all slices).
            x: input, shape (tokens, inputs).
            lora_a_stacked: of each slice, shape (slots, 1, rank, inputs).
            lora_b_stacked: of each slice, shape (slots, 1, outputs, rank).
            scale: of the update.
            output_slices: widths of the slices of `y`.
            buffer: not used.
            kwargs: not used.
        """
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for slot, rows in self._groups:
            inner = [a[slot, 0] for a in lora_a_stacked]
            rank = len(inner[0])
            # one product for all slices: each of their own is too small to be fast
            shared = inner[0] if len(inner) == 1 else torch.cat(inner)
            hidden = x[rows] @ shared.t().to(x.dtype)
            if scale != 1:
                hidden *= scale
            left = 0
            for place, (b, width) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
                mine = hidden[:, place * rank : (place + 1) * rank]
                outer = b[slot, 0].t().to(x.dtype)
                if isinstance(rows, slice):
                    y[rows, left : left + width].addmm_(mine, outer)
                else:
                    y[rows, left : left + width] += mine @ outer
                left += width


def grouped(slots: torch.Tensor) -> tuple[tuple[int, Rows], ...]:
    """Which tokens have which adapter.

    Args:
        slots: of each token the slot of its adapter, below 0 for none; shape (tokens,).

    Returns:
        Each slot that is used, with its tokens.
    """
    found: list[tuple[int, Rows]] = []
    for slot in sorted(set(slots.tolist())):
        if slot < 0:
            continue
        (places,) = torch.nonzero(slots == slot, as_tuple=True)
        first, last = int(places[0]), int(places[-1])
        together = last - first + 1 == len(places)
        found.append((slot, slice(first, last + 1) if together else places))
    return tuple(found)
