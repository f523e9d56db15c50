"""What a process that trains keeps from expert to expert: the base and the adapter's slots.

Knows nothing of jobs, Ray or what is learnt.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from configs.manifest import Fingerprint
from configs.schema import RunConfig
from expert_trainer.shards import Shard
from expert_trainer.types import Example


class Stopwatch:
    """Adds up the wall seconds inside its context."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._begin = 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._begin = time.perf_counter()
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._begin


class Workbench:
    """The loaded base with its adapter, and a tokenizer that threads take turns with."""

    def __init__(self, config: RunConfig) -> None:
        """Load the base and put the adapter in.

        Raises:
            BaseModelError: the base cannot be loaded, or the adapter does not fit it.
        """
        from expert_trainer.base import load_base, training_dtype
        from expert_trainer.lora import Adapter
        from expert_trainer.losses import LanguageModel
        from expert_trainer.measure import probe_ids
        from expert_trainer.rendering import Renderer

        self.base = load_base(config.base)
        self.adapter = Adapter(self.base, config.experts, config.base.served_name)
        self.model = LanguageModel(self.base.model, training_dtype(config.experts, self.base))
        self.computing = Stopwatch()
        """Time inside forward, backward and optimiser steps."""
        self._probe = probe_ids(self.base.tokenizer, self.base.model.config.vocab_size)
        self._renderer = Renderer(self.base.tokenizer)
        self._one_at_a_time = threading.Lock()

    def examples(self, shards: tuple[Shard, ...]) -> list[Example]:
        """The documents of shards, as tokens; may be called from any thread.

        Raises:
            ExpertError: a shard that is missing or not what the fit wrote.
        """
        examples = []
        for shard in shards:
            for document in shard.documents():
                with self._one_at_a_time:  # a fast tokenizer is not to be shared between threads
                    examples.append(self._renderer.render(document))
        return examples

    def fingerprint(self) -> Fingerprint:
        """What the base answers to the probe with the adapter's active slot."""
        from expert_trainer.measure import fingerprint

        with self.computing:
            return fingerprint(self.model, self._probe)
