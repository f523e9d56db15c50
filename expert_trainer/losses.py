"""Losses of a causal language model whose output head is frozen.

Knows nothing of adapters or optimisers. Shapes: B rows, L tokens, N predicted tokens, H hidden
size, V vocabulary, G members that share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from expert_trainer.attention import LAYOUT, layout_of, use_documents
from expert_trainer.packing import Batch
from expert_trainer.precision import keep_low

CHUNK_LOGITS = {"cpu": 2**19, "cuda": 2**27}
"""Logits held at once: on a CPU as many as stay in its caches."""
PROBE_TOKENS = 8


class LanguageModel:
    """A causal language model taken apart into its body and its head.

    A head that is one linear layer is applied here, to predicted positions only and in chunks,
    so that the `[N, V]` logits never exist at once. Models that do more to their logits (scale or
    cap them) are recognised by trying, and run through their own forward.
    """

    def __init__(self, model: Any, training_dtype: torch.dtype | None = None) -> None:
        """Take a model as it is.

        Args:
            model: a transformers causal language model.
            training_dtype: arithmetic of `total_loss`; default: that of the model's weights, but
                bfloat16 for those in float16, whose gradients would need loss scaling.
        """
        self.model = model
        half = model.dtype != torch.float32
        self._own_dtype = torch.bfloat16 if half else torch.float32
        self.training_dtype = training_dtype or self._own_dtype
        self._body = model.base_model
        self._head = model.get_output_embeddings()
        self._plain_head = isinstance(self._head, nn.Linear) and self._head_is_all()
        if self._plain_head:
            self._head_weight = self._head.weight.detach().to(self.training_dtype)
        self._by_documents = use_documents(model)
        keep_low(model)

    @torch.no_grad()
    def _head_is_all(self) -> bool:
        ids = torch.arange(PROBE_TOKENS, device=self.model.device)[None]
        ids = ids % self.model.config.vocab_size
        hidden = self._body(input_ids=ids, use_cache=False).last_hidden_state
        logits = self.model(input_ids=ids, use_cache=False).logits
        return bool(torch.allclose(self._head(hidden).float(), logits.float(), atol=1e-3))

    def total_loss(
        self, batch: Batch, weights: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted losses of a batch that members share, in the training's arithmetic.

        A loss that is not finite spoils the total, but not the gradients of other members' rows.

        Args:
            batch: the same number of rows for each member, member by member.
            weights: of each member, what its targets' losses are multiplied by.

        Returns:
            The weighted sum over all targets, differentiable, and the plain sums of each member,
            nats, float32 `[G]`.
        """
        labels_N = _of_targets(batch.labels, batch)
        member_N = self._members(batch, len(weights))
        weights_G = torch.tensor(weights, dtype=torch.float32).to(self.model.device)
        with self._precision(self.training_dtype):
            if self._plain_head:
                total, losses_N = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
                    _of_targets(self._hidden(batch), batch),
                    self._head_weight,
                    self._head.bias,
                    labels_N,
                    weights_G[member_N],
                )
            else:
                logits_NV = _of_targets(self._own_logits(batch), batch)
                losses_N = F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
                total = (losses_N * weights_G[member_N]).sum()
        return total, torch.zeros_like(weights_G).index_add_(0, member_N, losses_N.detach())

    @torch.no_grad()
    def token_losses(self, batch: Batch, *, as_trained: bool = False) -> torch.Tensor:
        """Loss of each target of a batch, nats, `[N]`, in the order of `batch.owners`' targets.

        Args:
            batch: rows of any documents.
            as_trained: in the training's arithmetic rather than in that of the model's weights.
        """
        labels_N = _of_targets(batch.labels, batch)
        with self._precision(self.training_dtype if as_trained else self._own_dtype):
            if not self._plain_head:
                logits_NV = _of_targets(self._own_logits(batch), batch)
                return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
            hidden_NH = _of_targets(self._hidden(batch), batch)
            size = _chunk_rows(hidden_NH, self._head.weight)
            losses = [
                F.cross_entropy(self._head(hidden).float(), labels, reduction="none")
                for hidden, labels in zip(
                    *(torch.split(t, size) for t in (hidden_NH, labels_N)), strict=True
                )
            ]
            return torch.cat(losses)

    def _precision(self, dtype: torch.dtype) -> torch.autocast:
        """Mixed precision where the arithmetic is not float32."""
        device = self.model.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype != torch.float32)

    def _members(self, batch: Batch, members: int) -> torch.Tensor:
        """The member of each target, `[N]`."""
        targets = torch.tensor(batch.shared_targets(members))
        member_N = torch.arange(members).repeat_interleave(targets)
        return member_N.to(self.model.device)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        hidden_BLH: torch.Tensor = self._body(**self._inputs(batch)).last_hidden_state
        return hidden_BLH

    def _own_logits(self, batch: Batch) -> torch.Tensor:
        logits_BLV: torch.Tensor = self.model(**self._inputs(batch)).logits
        return logits_BLV

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "use_cache": False,
        }
        if self._by_documents:
            inputs[LAYOUT] = layout_of(batch.position_ids)
        return inputs


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross entropy of a frozen linear head; its gradient is made on the way forward.

    The head needs no gradient, so a chunk's logits can be turned into the gradient of its hidden
    states at once and be forgotten (arXiv 2410.10989, section 3.2, fused linear cross entropy).
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - the signature that autograd calls
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        factors_N: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device, dtype = hidden_NH.device, weight_VH.dtype
        size = min(_chunk_rows(hidden_NH, weight_VH), len(hidden_NH))
        gradient_NH = torch.empty_like(hidden_NH)
        losses_N = torch.empty(len(hidden_NH), device=device)
        # used for every chunk: fresh memory costs a CPU as much as the arithmetic on it
        logits_own = torch.empty(size, len(weight_VH), dtype=dtype, device=device)
        logits_exact = torch.empty(size, len(weight_VH), device=device)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(hidden_NH), size):
                part = slice(start, start + size)
                labels = labels_N[part]
                own, exact = logits_own[: len(labels)], logits_exact[: len(labels)]
                torch.mm(hidden_NH[part].to(dtype), weight_VH.T, out=own)
                if bias_V is not None:
                    own += bias_V
                exact.copy_(own)
                exact -= exact.amax(-1, keepdim=True)
                wanted = exact.gather(-1, labels[:, None])
                sums = exact.exp_().sum(-1, keepdim=True)
                losses_N[part] = (sums.log() - wanted)[:, 0]
                own.copy_(exact)
                mean_weight = (own @ weight_VH) / sums
                gradient_NH[part] = (mean_weight - weight_VH[labels]) * factors_N[part, None]
        ctx.save_for_backward(gradient_NH)
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * factors_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * gradients[0].to(gradient_NH.dtype), None, None, None, None


def _of_targets(values_BL: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What lies at the positions that predict; unlike a mask, indices never wait for a GPU."""
    return values_BL.flatten(0, 1).index_select(0, batch.wanted)


def _chunk_rows(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> int:
    budget = CHUNK_LOGITS.get(hidden_NH.device.type, CHUNK_LOGITS["cuda"])
    return max(1, budget // len(weight_VH))
