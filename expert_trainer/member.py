"""One expert while it is trained: its curves, its held-out measurements, its finished directory.

Knows nothing of the other experts that share its passes of the base.
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from configs.manifest import LossPoint
from expert_trainer.bundle import code_version, utc_now
from expert_trainer.checkpoint import MemberState, Progress
from expert_trainer.errors import BaseModelError, ExpertError, StorageError
from expert_trainer.expert import CURVE_POINTS, RESULT_FILE, Result, TrainJob, adapter_files
from expert_trainer.job import Measured, StepTaken
from expert_trainer.measure import document_losses, mean_loss, sample, sample_tokens
from expert_trainer.optimise import Learner, Step
from expert_trainer.packing import endless_rows
from expert_trainer.schedule import tokens_per_step
from expert_trainer.storage import Storage
from expert_trainer.types import Example
from expert_trainer.workbench import Workbench

EVALUATION_SHARE = 0.1
"""Tokens that all evaluations of a training read together, over those that its steps have room
for: the sample of held-out documents is drawn so small."""
MEASURED_TOKENS = 4096
"""Tokens of a pass that measures, at the least: it keeps nothing for a way back."""
_BEST = "best"


class Member:
    """An expert in a slot of the workbench's adapter."""

    def __init__(
        self,
        job: TrainJob,
        slot: int,
        bench: Workbench,
        train: list[Example],
        heldout: list[Example],
    ) -> None:
        """Put the expert's first values into its slot.

        Args:
            job: what to train.
            slot: where its values are.
            bench: the base and its adapter.
            train: the documents.
            heldout: the held-out documents.

        Raises:
            ExpertError: there is nothing to train on, or the adapter to start from is not there.
        """
        if not any(example.target_count for example in train):
            raise ExpertError(f"{job.id}: its shard holds no document; run `introvert fit` again")
        self.job, self.slot = job, slot
        self.progress = Progress()
        self._bench, self._train, self._heldout = bench, train, heldout
        self._begin = time.perf_counter()
        experts = job.experts
        room = EVALUATION_SHARE * job.steps * tokens_per_step(experts)
        each = int(room / experts.evaluations)
        self._sample = sample_tokens(heldout, each, job.seed)
        self._best: torch.Tensor | None = None
        if job.init is None:
            bench.adapter.reset(slot, job.seed)
        else:
            self._load_initial()
        self.learner = Learner(
            bench.adapter,
            slot,
            endless_rows(train, experts.sequence_length, job.seed),
            experts,
            steps=job.steps,
            learning_rate=job.learning_rate,
            seed=job.seed,
        )

    @property
    def done(self) -> bool:
        """Whether no step is left to take."""
        return self.progress.step == self.job.steps or self.progress.stopped_early

    @property
    def evaluation_due(self) -> bool:
        """Whether the held-out loss is to be measured after the step just taken."""
        steps, evaluations = self.job.steps, self.job.experts.evaluations
        due = {math.ceil(steps * part / evaluations) for part in range(1, evaluations + 1)}
        return bool(self._sample) and self.progress.step in due

    @property
    def seconds(self) -> float:
        """Wall time since training began, earlier runs included."""
        return self.progress.seconds + time.perf_counter() - self._begin

    def note(self, step: Step) -> StepTaken:
        """Book a step that the learner has taken."""
        progress, steps = self.progress, self.job.steps
        progress.step += 1
        progress.tokens += step.tokens
        progress.recent_losses.append(step.loss)
        every = -(-steps // CURVE_POINTS)
        if len(progress.recent_losses) == every or progress.step == steps:
            self._end_curve()
        seconds = time.perf_counter() - self._begin
        return StepTaken(self.job.id, progress.step, step.loss, progress.tokens, seconds)

    def evaluate(self) -> Measured:
        """Measure the held-out loss; keep the best values, stop when patience is at its end."""
        experts, progress = self.job.experts, self.progress
        loss = mean_loss(self._losses(self._sample, [self.slot]))
        assert loss is not None, "a sample has targets"
        progress.heldout_curve.append(LossPoint(step=progress.step, loss=loss))
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
            self._best = self._bench.adapter.state(self.slot)
        else:
            progress.worse += 1
        if progress.worse >= experts.patience > 0 and progress.step < self.job.steps:
            progress.stopped_early = True
            self._end_curve()
        return Measured(self.job.id, progress.step, loss)

    def state(self) -> MemberState:
        """All that it takes to go on from here."""
        best = {} if self._best is None else {_BEST: self._best}
        progress = self.progress.model_copy(deep=True, update={"seconds": self.seconds})
        return MemberState(progress, {**self.learner.state(), **best})

    def restore(self, state: MemberState) -> None:
        """Go on from a state; what follows is what would have followed then, to the bit."""
        self.progress = state.progress
        self.learner.set_state(state.tensors, self.progress.step)
        best = state.tensors.get(_BEST)
        self._best = None if best is None else best.to(self._bench.base.device)

    def finish(self) -> Result:
        """Measure the best values and write the finished directory.

        Raises:
            ExpertError: it cannot be written.
        """
        job, bench = self.job, self._bench
        if self._best is not None:
            bench.adapter.set_state(self.slot, self._best)
        bench.adapter.settle(self.slot)
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            bench.adapter.save(self.slot, directory)
            result = self._result(directory)
            content = result.model_dump_json(indent=1) + "\n"
            (directory / RESULT_FILE).write_text(content, encoding="utf-8")
            try:
                job.root.put_tree(directory, job.id, marker=RESULT_FILE)
            except StorageError as error:
                raise ExpertError(f"{job.id}: {error}") from None
        return result

    def _result(self, directory: Path) -> Result:
        """Measurements and provenance of the adapter in a directory."""
        job, bench, progress = self.job, self._bench, self.progress
        heldout = sample(self._heldout, job.heldout_limit, job.seed)
        of_base, of_expert = (self._losses(heldout, slots) for slots in ([], [self.slot]))
        with bench.adapter.using([self.slot]):
            fingerprint = bench.fingerprint()
        return Result(
            digest=job.digest,
            files=adapter_files(Storage(directory)),
            base_digest=job.base_digest,
            tokenizer_digest=job.tokenizer_digest,
            shards=[shard.sha256 for shard in job.shards],
            heldout_shards=[shard.sha256 for shard in job.heldout],
            config=job.experts.model_dump(mode="json"),
            init="scratch" if job.init is None else job.init.digest,
            documents=len(self._train),
            tokens=sum(len(example.token_ids) for example in self._train),
            tokens_seen=progress.tokens,
            steps=progress.step,
            best_step=progress.step if progress.best_step is None else progress.best_step,
            stopped_early=progress.stopped_early,
            seed=job.seed,
            rank=job.experts.rank,
            alpha=job.experts.alpha,
            rslora=job.experts.rslora,
            target_modules=bench.adapter.target_modules,
            learning_rate=job.learning_rate,
            loss_curve=progress.loss_curve,
            heldout_curve=progress.heldout_curve,
            heldout_documents=len(heldout),
            heldout_tokens=int(of_base[:, 1].sum()),
            heldout_loss_base=mean_loss(of_base),
            heldout_loss_expert=mean_loss(of_expert),
            fingerprint=fingerprint,
            seconds=self.seconds,
            device=str(bench.base.device),
            created=utc_now(),
            code_version=code_version(),
        )

    def _losses(self, examples: list[Example], slots: list[int]) -> np.ndarray:
        """Losses of documents in the training's arithmetic, with a slot or with the base alone."""
        bench, length = self._bench, self.job.experts.sequence_length
        rows = max(self.job.experts.batch_rows, MEASURED_TOKENS // length)
        with bench.computing, bench.adapter.using(slots):
            return document_losses(bench.model, examples, length, rows, as_trained=True)

    def _end_curve(self) -> None:
        """Make a point of the losses since the last one."""
        progress, losses = self.progress, self.progress.recent_losses
        if losses:
            mean = sum(losses) / len(losses)
            progress.loss_curve.append(LossPoint(step=progress.step, loss=mean))
            progress.recent_losses = []

    def _load_initial(self) -> None:
        initial = self.job.init
        assert initial is not None, "there is something to start from"
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            try:
                initial.directory.get_tree(initial.name, directory)
                result = Result.model_validate_json((directory / RESULT_FILE).read_bytes())
                intact = result.files == adapter_files(Storage(directory))
                if not intact or result.digest != initial.digest:
                    raise ExpertError(
                        f"{self.job.id}: {initial.directory}/{initial.name} is not the adapter to "
                        "start from; run `introvert train` again"
                    )
                self._bench.adapter.load(self.slot, directory)
            except (FileNotFoundError, StorageError, ValueError, BaseModelError) as error:
                raise ExpertError(
                    f"{self.job.id}: the adapter to start from cannot be loaded: {error}"
                ) from None
