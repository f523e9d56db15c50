"""A frozen model's activations kept in the training's arithmetic, for CPUs.

Under autocast a float32 model's norms and rotary positions give float32, which every layer that
takes it converts again, and whose gradients are converted back. Here both give the training's type
at once, and a norm takes seven passes over the activations instead of fifteen. Measured for a norm
in bfloat16 arithmetic, 2,048 tokens of 192 features, forward and backward: 0.4 instead of 2.4 ms.

Knows nothing of adapters or losses. Shapes: N tokens, H features.
"""

from __future__ import annotations

from typing import Any

import torch

_EPSILONS = ("variance_epsilon", "eps")
"""What models call the number that is added to the mean square."""


def keep_low(model: Any) -> int:
    """Let a model's RMS norms and rotary positions stay in autocast's type while it is on.

    Models differ in what they mean by an RMS norm (some add 1 to the weight), so each is tried on
    numbers and left alone unless it computes what is computed here. Outside autocast, all stay as
    they are.

    Returns:
        how many norms were taken over.
    """
    if model.device.type != "cpu":
        return 0
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(_lower)
    return sum(_take_over(module) for module in model.modules() if _looks_like_one(module))


def _lower(_: Any, __: Any, positions: Any) -> Any:
    """Cosines and sines in the type that queries and keys have; as in a model of that type."""
    if not torch.is_autocast_enabled("cpu") or not isinstance(positions, tuple):
        return positions
    return tuple(part.to(torch.get_autocast_dtype("cpu")) for part in positions)


def _looks_like_one(module: torch.nn.Module) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        and any(hasattr(module, name) for name in _EPSILONS)
    )


@torch.no_grad()
def _take_over(module: Any) -> bool:
    weight_H = module.weight
    epsilon = next(getattr(module, name) for name in _EPSILONS if hasattr(module, name))
    own_forward = module.forward
    random = torch.Generator().manual_seed(0)
    probe = 3 * torch.randn(4, len(weight_H), generator=random)
    expected = own_forward(probe.to(weight_H.dtype)).float()
    found = _RmsNorm.apply(probe, weight_H, epsilon, torch.float32)  # type: ignore[no-untyped-call]
    tolerance = 1e-4 if weight_H.dtype == torch.float32 else 5e-2
    if (found - expected).abs().max() > tolerance * expected.abs().max():
        return False

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled("cpu"):
            result: torch.Tensor = own_forward(hidden)
            return result
        dtype = torch.get_autocast_dtype("cpu")
        normed: torch.Tensor = _RmsNorm.apply(hidden, weight_H, epsilon, dtype)  # type: ignore[no-untyped-call]
        return normed

    module.forward = forward
    return True


class _RmsNorm(torch.autograd.Function):
    """`x / sqrt(mean(x²) + epsilon) · weight` (arXiv 1910.07467, equation 4), weight frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight_H: torch.Tensor, epsilon: float, dtype: torch.dtype
    ) -> torch.Tensor:
        x_NH = x.float()
        scale_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True)
        scale_N1 = scale_N1.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_NH, weight_H, scale_N1)
        ctx.dtype = x.dtype
        normed_NH: torch.Tensor = (x_NH * scale_N1).mul_(weight_H)
        return normed_NH.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NH, weight_H, scale_N1 = ctx.saved_tensors
        inner_NH = gradients[0].float() * weight_H
        along_N1 = torch.linalg.vecdot(inner_NH, x_NH).unsqueeze(-1)
        along_N1.mul_(scale_N1.pow(3)).div_(-x_NH.shape[-1])
        inner_NH.mul_(scale_N1).addcmul_(x_NH, along_N1)
        return inner_NH.to(ctx.dtype), None, None, None
