"""Errors of this room.

TrainerError                configs.errors.IntrovertError
├── CorpusError             data that cannot be read, or too much of it that cannot
├── BaseModelError          a base model or tokenizer that cannot be loaded or used
├── ExpertError             one expert that cannot be trained
│   └── DivergedError       its loss stopped being a number
├── PoolError               no place to train: Ray cannot be reached, or has not the resources
├── StorageError            a directory or URL that cannot be read or written to
│   └── PlaceError          one that the run needs, found out before any work
├── RunningError            another process is at work in the run's directory
├── NotFittedError          `introvert fit` has not been run on this config and data
├── UnknownExpertError      an expert was asked for that there is not
└── BundleError             a bundle that cannot be written or read
    ├── NotPublishedError   there is no manifest
    ├── DamagedBundleError  a file is missing, unknown or not what the manifest says
    └── StaleBundleError    it was made from another base or fit than the run's
"""

from __future__ import annotations

from configs.errors import IntrovertError


class TrainerError(IntrovertError):
    """Root of what this room raises for users."""


class CorpusError(TrainerError):
    """Data that cannot be read."""


class BaseModelError(TrainerError):
    """A base model that cannot be loaded or does not fit its use."""


class ExpertError(TrainerError):
    """One expert that cannot be trained."""


class DivergedError(ExpertError):
    """The training loss is not a finite number any more."""


class PoolError(TrainerError):
    """Ray cannot be reached, or its cluster lacks what the plan needs."""


class StorageError(TrainerError):
    """A directory or URL that cannot be read or written to; `reason` is the system's own."""

    def __init__(self, text: str, *, reason: str = "") -> None:
        self.reason = reason
        super().__init__(text)


class PlaceError(StorageError):
    """The bundle's or the working directory cannot be written to."""


class RunningError(TrainerError):
    """Another process is at work in the run's directory."""


class NotFittedError(TrainerError):
    """The router and shards are missing, or belong to another config or other data."""


class UnknownExpertError(TrainerError):
    """An expert was asked for that the bundle, or the fit, does not have."""

    exit_code = 2


class BundleError(TrainerError):
    """A bundle that cannot be written or read."""


class NotPublishedError(BundleError):
    """There is no manifest where a bundle was expected."""


class DamagedBundleError(BundleError):
    """A bundle whose files are not what its manifest says."""


class StaleBundleError(BundleError):
    """A bundle that was made from another base or fit than the run's."""


def describe(error: Exception) -> str:
    """An error in a line: one for users in its own words, any other with its class."""
    if isinstance(error, TrainerError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
