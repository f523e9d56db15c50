"""Where experts in training stand, as one file: a safetensors file whose metadata is JSON.

Nothing in it is unpickled, and what is not whole, or belongs to other work, counts as not there.
Knows nothing of what a member is trained on or when a checkpoint is due.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from configs.manifest import LossPoint
from expert_trainer.errors import StorageError
from expert_trainer.storage import Storage

logger = logging.getLogger(__name__)

FORMAT = 1
_METADATA = "introvert"


class Progress(BaseModel):
    """How far a member has come, apart from its tensors."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    """Optimiser steps taken."""
    tokens: int = 0
    """Tokens read."""
    seconds: float = 0.0
    """Wall time spent on it, earlier runs included."""
    loss_curve: list[LossPoint] = []
    recent_losses: list[float] = []
    """Losses of the steps since the curve's last point."""
    heldout_curve: list[LossPoint] = []
    best_step: int | None = None
    """The step of the best held-out loss so far."""
    best_loss: float | None = None
    worse: int = 0
    """Held-out losses in a row that were not better."""
    stopped_early: bool = False


@dataclass(frozen=True)
class MemberState:
    """One member of a checkpoint."""

    progress: Progress
    tensors: Mapping[str, torch.Tensor]


class _Header(BaseModel):
    """What the metadata says of the file."""

    model_config = ConfigDict(extra="forbid")

    format: int
    digest: str
    """Of the work that the checkpoint belongs to."""
    content: str
    """Hash of the tensors."""
    members: dict[str, Progress]


@dataclass(frozen=True)
class CheckpointFile:
    """The checkpoint of one piece of work."""

    directory: Storage
    digest: str
    """Hash of everything that the work depends on; names the file."""

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.digest}.safetensors"

    def write(self, members: Mapping[str, MemberState]) -> bool:
        """Put a checkpoint in the place of the one before; tells whether that went well.

        One that cannot be written is no reason to lose the training: it is warned of.
        """
        tensors = {
            f"{member}/{name}": value.detach().to("cpu").contiguous()
            for member, state in members.items()
            for name, value in state.tensors.items()
        }
        header = _Header(
            format=FORMAT,
            digest=self.digest,
            content=_hash(tensors),
            members={member: state.progress for member, state in members.items()},
        )
        content = save(tensors, metadata={_METADATA: header.model_dump_json()})
        try:
            self.directory.write(self.name, content)
        except StorageError as error:
            logger.warning("no checkpoint was written, training goes on: %s", error)
            return False
        return True

    def read(self) -> dict[str, MemberState]:
        """The members of the checkpoint; none where there is no sound one."""
        try:
            content = self.directory.read(self.name)
            header, tensors = _parse(content)
        except FileNotFoundError:
            return {}
        except (StorageError, SafetensorError, ValidationError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            logger.warning("the checkpoint %s is not used: %s", self.name, reason)
            return {}
        if (header.format, header.digest) != (FORMAT, self.digest):
            logger.warning("the checkpoint %s is not used: it belongs to other work", self.name)
            return {}
        return {
            member: MemberState(
                progress,
                {
                    name.removeprefix(f"{member}/"): value
                    for name, value in tensors.items()
                    if name.startswith(f"{member}/")
                },
            )
            for member, progress in header.members.items()
        }

    def remove(self) -> None:
        """Take it away; where that fails it is in nobody's way."""
        try:
            self.directory.remove(self.name)
        except StorageError as error:
            logger.warning("the checkpoint %s stays: %s", self.name, error)


def _parse(content: bytes) -> tuple[_Header, dict[str, torch.Tensor]]:
    """Header and tensors of a file.

    Raises:
        SafetensorError, ValidationError, ValueError, KeyError: it is not a whole checkpoint.
    """
    tensors: dict[str, torch.Tensor] = load(content)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    header = _Header.model_validate_json(metadata[_METADATA])
    if header.content != _hash(tensors):
        raise ValueError("its content is not what was written")
    return header, tensors


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\n".encode())
        total.update(tensors[name].numpy().tobytes())
    return total.hexdigest()
