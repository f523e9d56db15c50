"""LoRA adapters on the frozen base, several at once. The only importer of peft.

PEFT finds the layers, names the weights and writes the config; its own adapter stays off. The
values live here, one slot for each expert that is trained at the same time, and a batch holds the
rows of several experts, slot by slot. Each adapted layer multiplies the rows of each slot by that
slot's matrices in two batched products (grouped as in mLoRA, arXiv 2312.02515, section 4.1).

Knows nothing of training. Shapes: K slots, G of them active, M tokens of each, R rank, I and O
features in and out, P values of a slot. Both matrices are stored with R first, whose products are
several times faster on a CPU than those of the transposed matrix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from configs.schema import ExpertsConfig
from expert_trainer.base import Base
from expert_trainer.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from expert_trainer.errors import BaseModelError

_NAME = "default"
_SCALING = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora"}
"""Our settings and what PEFT calls them."""
_ALIGNED = 16
"""Values between the starts of two matrices are a multiple of this: 64 bytes, a cache line."""


@dataclass(frozen=True)
class _Place:
    """Where the two matrices of one layer lie among a slot's values."""

    layer: Any
    index: int
    scaling: float
    down_name: str
    up_name: str
    down_at: int
    up_at: int
    rank: int
    inputs: int
    outputs: int

    def down(self, slots: torch.Tensor) -> torch.Tensor:
        """The matrices A in `[K, P]` values or gradients: a view `[K, R, I]`."""
        part = slots[:, self.down_at : self.down_at + self.rank * self.inputs]
        return part.view(len(slots), self.rank, self.inputs)

    def up(self, slots: torch.Tensor) -> torch.Tensor:
        """The matrices B, transposed: a view `[K, R, O]`."""
        part = slots[:, self.up_at : self.up_at + self.rank * self.outputs]
        return part.view(len(slots), self.rank, self.outputs)


class Adapter:
    """The adapters of one base: a number of slots, each holding one expert's values."""

    def __init__(self, base: Base, config: ExpertsConfig, base_name: str) -> None:
        """Put one slot into the base's linear layers, in place; no slot is active.

        Args:
            base: the loaded base; its own parameters stay frozen.
            config: rank, alpha, rsLoRA, dropout and target modules.
            base_name: what the saved config calls the base, rather than a path of this machine.

        Raises:
            BaseModelError: the base has none of the target modules, or one that vLLM cannot serve.
        """
        self._base = base
        self._base_name = base_name
        self._config = config
        self._peft: PeftModel = _attach(base.model, config)
        _refuse_head(base.model)
        base.model.eval()
        self._places = _lay_out(self._peft, base.model)
        self._size = max(_aligned(p.up_at + p.rank * p.outputs) for p in self._places)
        self._active: tuple[int, ...] = ()
        self._noise: Sequence[int] | None = None
        self._generator = torch.Generator(base.device)
        self.resize(1)
        for place in self._places:
            place.layer.forward = self._forward(place)

    @property
    def slots(self) -> int:
        """How many experts it has room for."""
        return len(self._values)

    @property
    def target_modules(self) -> list[str]:
        """Names of the modules that carry the adapter, without their place in the model."""
        return sorted({self._path(place).rpartition(".")[2] for place in self._places})

    def resize(self, slots: int) -> None:
        """Make room for so many experts; what the slots held is gone."""
        device = self._base.device
        self._values = torch.zeros(slots, self._size, device=device)
        self._gradients = torch.zeros(slots, self._size, device=device)
        self._parameters = [torch.nn.Parameter(values) for values in self._values]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._stacks = [_Stack(place, self._gradients) for place in self._places]
        self._picked: tuple[int, ...] = ()
        """The slots whose matrices the stacks have at hand."""

    def parameter(self, slot: int) -> torch.nn.Parameter:
        """All values of a slot as one leaf `[P]`, float32; its `.grad` is summed by each backward.

        Whoever trains it zeroes `.grad` in place and never replaces it.
        """
        return self._parameters[slot]

    @contextmanager
    def using(self, slots: Sequence[int], noise: Sequence[int] | None = None) -> Iterator[None]:
        """Apply slots inside the context; the base alone where there are none.

        Args:
            slots: the active slots in the order of their rows. A batch has the same number of rows
                for each, slot by slot.
            noise: for dropout, a number for each active slot from which its masks are made; no
                dropout without.
        """
        before = self._active, self._noise
        self._pick(tuple(slots))
        self._noise = noise if self._config.dropout > 0 else None
        try:
            yield
        finally:
            self._pick(before[0])
            self._noise = before[1]

    @torch.no_grad()
    def reset(self, slot: int, seed: int) -> None:
        """Give a slot the initial values of a new expert: A uniform, B zero, as in PEFT.

        The values depend on the seed alone, not on the device or on what was trained before.
        """
        random = torch.Generator().manual_seed(seed)
        self._values[slot].zero_()
        for place in self._places:
            values = torch.empty(place.rank, place.inputs)
            torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=random)
            place.down(self._values)[slot].copy_(values)

    @torch.no_grad()
    def settle(self, slot: int) -> None:
        """Round the values to the base's type: what is measured is what will be served."""
        self._values[slot] = self._values[slot].to(self._base.dtype).float()

    def state(self, slot: int) -> torch.Tensor:
        """A copy of a slot's values: float32 `[P]` on the adapter's device."""
        return self._values[slot].clone()

    def set_state(self, slot: int, values: torch.Tensor) -> None:
        """Put values from `state` back, into this slot or another."""
        self._values[slot].copy_(values)

    def save(self, slot: int, directory: Path) -> None:
        """Write a slot as PEFT and vLLM read an adapter; equal values make equal bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            name: value.to("cpu", self._base.dtype).contiguous()
            for name, value in self._named(slot).items()
        }
        save_file(weights, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = self._peft.peft_config[_NAME].to_dict()
        config |= {
            "base_model_name_or_path": self._base_name,
            "inference_mode": True,
            "target_modules": self.target_modules,
        }
        text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
        (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")

    def load(self, slot: int, directory: Path) -> None:
        """Give a slot the values of a saved adapter of the same shape and scaling.

        Raises:
            BaseModelError: it was made with other settings than this run's.
        """
        require_scaling(directory, self._config)
        saved = load_file(directory / ADAPTER_WEIGHTS)
        mine = self._named(slot)
        if {n: v.shape for n, v in saved.items()} != {n: v.shape for n, v in mine.items()}:
            raise BaseModelError(
                f"{directory} holds an adapter of another shape than this run's config makes; "
                "train again, or set experts.target_modules back"
            )
        for name, value in mine.items():
            value.copy_(saved[name])

    @torch.no_grad()
    def _pick(self, slots: tuple[int, ...]) -> None:
        """Make slots active: all of them as they lie, some of them as a copy."""
        self._active = slots
        if not slots:
            return
        if slots != self._picked:
            some = slots != tuple(range(self.slots))
            self._index = torch.tensor(slots, device=self._base.device) if some else None
            self._copy = torch.empty_like(self._values[: len(slots)]) if some else self._values
            self._picked = slots
            for stack in self._stacks:
                stack.pick(self._copy, self._index)
        if self._index is not None:
            torch.index_select(self._values, 0, self._index, out=self._copy)

    def _named(self, slot: int) -> dict[str, torch.Tensor]:
        """Views of a slot's matrices, shaped and named as PEFT saves them."""
        downs = {p.down_name: p.down(self._values)[slot] for p in self._places}
        ups = {p.up_name: p.up(self._values)[slot].T for p in self._places}
        return downs | ups

    def _path(self, place: _Place) -> str:
        return place.down_name.removesuffix(".lora_A.weight")

    def _forward(self, place: _Place) -> Any:
        """What the adapted layer computes: the base's own, with the active slots' updates."""
        own_forward = place.layer.get_base_layer().forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not self._active:
                result: torch.Tensor = own_forward(x)
                return result
            shape = (len(self._active), -1, place.inputs)
            keep = None if self._noise is None else self._keep(place, x.reshape(shape))
            layer = self._stacks[place.index]
            updated: torch.Tensor = _AdaptedLinear.apply(x, keep, layer, layer.anchor)  # type: ignore[no-untyped-call]
            return updated

        return forward

    def _keep(self, place: _Place, x_GMI: torch.Tensor) -> torch.Tensor:
        """Dropout's masks, scaled: made from each slot's noise and the layer, and nothing else."""
        assert self._noise is not None, "dropout is on"
        kept = 1 - self._config.dropout
        keep_GMI = torch.empty_like(x_GMI)
        for mask, noise in zip(keep_GMI, self._noise, strict=True):
            self._generator.manual_seed(noise + place.index)
            mask.bernoulli_(kept, generator=self._generator).div_(kept)
        return keep_GMI


class _Stack:
    """One layer: the base's weight, and the active slots' matrices and gradients."""

    def __init__(self, place: _Place, gradients: torch.Tensor) -> None:
        self._place = place
        self.scaling = place.scaling
        self.anchor = torch.zeros((), requires_grad=True)
        """What tells autograd that the update is to be differentiated."""
        self._base = place.layer.get_base_layer()
        self._transposed = place.layer.fan_in_fan_out
        self._weights: dict[torch.dtype, torch.Tensor] = {}
        self._gradients = place.down(gradients), place.up(gradients)
        self._index: torch.Tensor | None = None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The base's weight `[O, I]`; one of another type is made once, as it never changes."""
        if dtype not in self._weights:
            weight = self._base.weight.T if self._transposed else self._base.weight
            self._weights[dtype] = weight.detach().to(dtype)
        return self._weights[dtype]

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The base's bias `[O]`, if it has one."""
        return None if self._base.bias is None else self._base.bias.to(dtype)

    def pick(self, values: torch.Tensor, index: torch.Tensor | None) -> None:
        """Take the matrices in the active slots' values, which are those of `index` or all."""
        self.down, self.up = self._place.down(values), self._place.up(values)
        self._index = index

    def add_gradients(self, down: tuple[torch.Tensor, ...], up: tuple[torch.Tensor, ...]) -> None:
        """Add a product of two matrices per active slot, times the scaling, to its gradient."""
        for total, (left, right) in zip(self._gradients, (down, up), strict=True):
            if self._index is not None:
                product = torch.bmm(left, right).to(total.dtype)
                total.index_add_(0, self._index, product, alpha=self.scaling)
            elif left.dtype == total.dtype:
                total.baddbmm_(left, right, alpha=self.scaling)
            else:
                total.add_(torch.bmm(left, right), alpha=self.scaling)


class _AdaptedLinear(torch.autograd.Function):
    """`x · Wᵀ + bias + scaling · (x · Aᵀ) · B`, each slot's rows by its own A and B.

    One function for the base's layer and its update, so that neither output nor gradient exists
    twice, and the input is converted once. The gradients of A and B go straight into the slots'
    sums; W has none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        keep_GMI: torch.Tensor | None,
        stack: _Stack,
        anchor: torch.Tensor,
    ) -> torch.Tensor:
        device = x.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else x.dtype
        with torch.autocast(device, enabled=False):
            down_GRI, up_GRO = stack.down.to(dtype), stack.up.to(dtype)
            x_in = x.to(dtype)
            out = F.linear(x_in, stack.weight(dtype), stack.bias(dtype))
            x_GMI = x_in.reshape(len(down_GRI), -1, x.shape[-1])
            x_GMI = x_GMI if keep_GMI is None else x_GMI * keep_GMI.to(dtype)
            inner_GMR = torch.bmm(x_GMI, down_GRI.mT)
            out.view(*inner_GMR.shape[:2], -1).baddbmm_(inner_GMR, up_GRO, alpha=stack.scaling)
        ctx.save_for_backward(x_GMI, keep_GMI, inner_GMR, down_GRI, up_GRO)
        ctx.stack, ctx.like = stack, (x.dtype, x.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_GMI, keep_GMI, inner_GMR, down_GRI, up_GRO = ctx.saved_tensors
        dtype, shape = ctx.like
        gradient_GMO = gradients[0].reshape(*x_GMI.shape[:2], -1)
        inner_gradient_GMR = torch.bmm(gradient_GMO, up_GRO.mT)
        ctx.stack.add_gradients((inner_gradient_GMR.mT, x_GMI), (inner_GMR.mT, gradient_GMO))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        through = gradient_GMO @ ctx.stack.weight(gradient_GMO.dtype)
        if keep_GMI is None:
            through.baddbmm_(inner_gradient_GMR, down_GRI, alpha=ctx.stack.scaling)
        else:
            update = torch.bmm(inner_gradient_GMR, down_GRI)
            through.addcmul_(update, keep_GMI.to(update.dtype), value=ctx.stack.scaling)
        return through.view(shape).to(dtype), None, None, None


def require_scaling(directory: Path, config: ExpertsConfig) -> None:
    """See that a saved adapter's update is scaled as the config says.

    Rank, alpha and rsLoRA make the factor, and only the rank shows in the weights' shapes.

    Raises:
        BaseModelError: one of the three differs.
    """
    saved = json.loads((directory / ADAPTER_CONFIG).read_bytes())
    for key, name in _SCALING.items():
        theirs, ours = saved.get(name), getattr(config, key)
        if theirs != ours:
            raise BaseModelError(
                f"{directory} was trained with experts.{key}={theirs}, but this run's config says "
                f"{ours}; set experts.{key} back, or train again"
            )


def _attach(model: Any, config: ExpertsConfig) -> PeftModel:
    alpha: Any = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=config.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings, adapter_name=_NAME)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise BaseModelError(
            f"experts.target_modules {config.target_modules} does not fit the base: {reason[:300]}"
        ) from None


def _lay_out(peft: PeftModel, model: Any) -> list[_Place]:
    """Places for the matrices of all adapted layers, in the order of the layers' names."""
    names = {
        weight.data_ptr(): name
        for name, weight in get_peft_model_state_dict(peft, adapter_name=_NAME).items()
    }
    places: list[_Place] = []
    start = 0
    for _, layer in sorted(model.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        down: Any = layer.lora_A[_NAME].weight
        up: Any = layer.lora_B[_NAME].weight
        up_at = start + _aligned(down.numel())
        places.append(
            _Place(
                layer=layer,
                index=len(places),
                scaling=layer.scaling[_NAME],
                down_name=names[down.data_ptr()],
                up_name=names[up.data_ptr()],
                down_at=start,
                up_at=up_at,
                rank=len(down),
                inputs=down.shape[1],
                outputs=len(up),
            )
        )
        start = up_at + _aligned(up.numel())
    return places


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _refuse_head(model: Any) -> None:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(module, LoraLayer) for module in ends):
        raise BaseModelError(
            "experts.target_modules names the embedding or the output head, which serving keeps "
            "frozen for all experts; leave it out"
        )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
