"""The base model: finding, loading and hashing it.

Knows nothing of adapters. The weights are frozen the moment they are loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import BaseConfig, ExpertsConfig
from expert_trainer.errors import BaseModelError

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Base:
    """A loaded base: frozen weights on one device, and the tokenizer."""

    model: Any
    """A transformers causal language model in evaluation mode, no parameter requiring gradients."""
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype


def load_base(config: BaseConfig) -> Base:
    """Load the base onto the first GPU that this process sees, or else the CPU.

    Raises:
        BaseModelError: nothing there that transformers can load as a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(config, device)
    directory = find_base(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(config, error) from None
    frozen: Any = model.requires_grad_(False)
    return Base(frozen.eval().to(device), load_tokenizer(config), device, dtype)


def load_tokenizer(config: BaseConfig) -> Any:
    """The base's tokenizer, without a limit to the length of a text.

    Raises:
        BaseModelError: there is none, or only a slow one, which cannot say where a token lies.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            find_base(config), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(config, error) from None
    if not tokenizer.is_fast:
        raise BaseModelError(f"base.model {config.model}: its tokenizer has no fast version")
    tokenizer.model_max_length = 10**9
    return tokenizer


def resolve_dtype(config: BaseConfig, device: torch.device) -> torch.dtype:
    """The weight type: as configured, or bfloat16 on a GPU and float32 on a CPU."""
    import torch

    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def training_dtype(config: ExpertsConfig, base: Base) -> torch.dtype:
    """The arithmetic that experts are trained in, see `experts.precision`.

    Of CPUs, those with AVX-512 BF16 or AMX multiply bfloat16 several times faster than float32;
    without, torch emulates it slowly.
    """
    import torch

    if base.dtype != torch.float32 or config.precision == "bfloat16":
        return torch.bfloat16
    if config.precision == "float32":
        return torch.float32
    if base.device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        fast = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def find_base(config: BaseConfig) -> Path:
    """Directory of the base: the one given, or the hub's snapshot, downloaded if need be.

    Raises:
        BaseModelError: no such directory, and no such model that can be reached.
    """
    directory = Path(config.model)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise BaseModelError(f"base.model {directory} holds no model: config.json is missing")
        return directory
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*WEIGHT_FILES, *TOKENIZER_FILES, "*.json", "*.py"]
    try:
        found = snapshot_download(config.model, revision=config.revision, allow_patterns=patterns)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        raise BaseModelError(
            f"base.model {config.model}: neither a directory here nor a model that the hub hands "
            "out; check the name and the network, or give a directory"
        ) from None
    return Path(found)


def resolve_base(config: BaseConfig) -> BaseConfig:
    """The base with an absolute path, for processes that work in other directories.

    The name of a model on a hub stays as it is.
    """
    directory = Path(config.model)
    if not directory.is_dir():
        return config
    return config.model_copy(update={"model": str(directory.resolve()), "name": config.served_name})


def base_digest(config: BaseConfig) -> str:
    """Content hash of the base's weights and config: sha256 over file names and contents."""
    directory = find_base(config)
    digest = _digest(directory, WEIGHT_FILES)
    if not any(directory.glob("*.safetensors")):
        raise BaseModelError(
            f"base.model {directory}: no *.safetensors; other weights are not read"
        )
    return digest


def tokenizer_digest(config: BaseConfig) -> str:
    """Content hash of the base's tokenizer and chat template."""
    return _digest(find_base(config), TOKENIZER_FILES)


def _digest(directory: Path, patterns: Sequence[str]) -> str:
    total = hashlib.sha256()
    files = {path for pattern in patterns for path in directory.glob(pattern)}
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}\0{content}\n".encode())
    return total.hexdigest()


def _unusable(config: BaseConfig, error: Exception) -> BaseModelError:
    reason = " ".join(str(error).split())
    return BaseModelError(
        f"base.model {config.model} cannot be loaded as a causal language model: {reason[:300]}"
    )
