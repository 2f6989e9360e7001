"""Scoring a column of a generative model: what it says, and how far that is right."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from mmcl.core import Batch, Strategy, answer
from mmcl.core.distributed import gather_texts
from mmcl.core.model import VLM
from mmcl.lightning.scoring import Column, ColumnScorer
from mmcl.metrics.answers import Answer
from mmcl.metrics.scorers import find_scorer


class AnswerScorer(ColumnScorer):
    """Collects answers of a column and scores them, strictly and leniently.

    Attributes:
        answers: one for every test sample, in sample order, after ``finish``.
        lenient: the score that forgives the form, 0 to 1.
        version: of the scorer's rule.
    """

    def __init__(self, column: Column) -> None:
        super().__init__(column)
        self.answers: list[Answer] = []
        self.lenient: float | None = None
        self.scorer = find_scorer(column.task.scorer)
        self.version = self.scorer.version
        self._lines: list[str] = []

    def begin(self, model: VLM) -> None:
        """Forget what was said before."""
        self._lines = []

    def add(self, model: VLM, strategy: Strategy, batch: Batch) -> None:
        """Let the model answer a batch; a batch that fails is asked again row by row."""
        self.faults += batch.faults
        if not len(batch):
            return
        self._device = batch.labels.device
        batch = self.told(batch)
        numbers = range(len(batch)) if batch.sample is None else batch.sample.tolist()
        for row, number, said in zip(
            range(len(batch)), numbers, self._said(model, strategy, batch), strict=True
        ):
            reference = batch.references[row]
            key = batch.keys[row] if batch.keys else ""
            line = [number, key, reference.question, list(reference.answers), said]
            self._lines.append(json.dumps(line))

    def finish(self) -> None:
        """Gather the answers of all ranks and score them."""
        self.faults = gather_texts(self.faults, self._device)
        lines = [json.loads(line) for line in gather_texts(self._lines, self._device) if line]
        self._lines = []
        if not lines:
            raise ValueError(
                f"no test sample of '{self.column.task.name}' could be read: check its shards"
            )
        lines.sort(key=lambda line: int(line[0]))
        right = [tuple(line[3]) for line in lines]
        scored = self.scorer.score([line[4] for line in lines], right)
        self.value, self.lenient = scored.strict, scored.lenient
        rows = zip(lines, right, scored.strict_rows, scored.lenient_rows, strict=True)
        self.answers = [
            Answer(
                key=key, truth=truth[0], answer=said, correct=strict >= 0.5, question=question,
                references=truth, strict=round(strict, 6), lenient=round(lenient, 6),
            )
            for (_, key, question, _, said), truth, strict, lenient in rows
        ]  # fmt: skip

    def _said(self, model: VLM, strategy: Strategy, batch: Batch) -> list[str]:
        try:
            return self._asked(model, strategy, batch)
        except (RuntimeError, ValueError, IndexError) as error:
            if len(batch) == 1:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                self.faults.append(f"{(batch.keys or ('a row',))[0]}: no answer ({reason})")
                return [""]
        rows = torch.arange(len(batch), device=batch.labels.device)
        return [self._said(model, strategy, batch.take(row[None]))[0] for row in rows]

    def _asked(self, model: VLM, strategy: Strategy, batch: Batch) -> list[str]:
        task = self.column.task
        candidates: Sequence[str] = self.column.names if task.decode == "candidates" else ()
        how = {"candidates": candidates, "max_new_tokens": task.max_new_tokens}
        if task.is_probe:
            # As for classes: what refines the stream's answers does not apply to a probe's.
            said: list[str] = model.answer(  # type: ignore[attr-defined]
                batch, strategy.prompts(model, batch), **how
            )
            return said
        return answer(model, strategy, batch, **how)


def scorer_of(column: Column) -> ColumnScorer:
    """Return what scores a column: by answers, classes or embeddings."""
    return AnswerScorer(column) if column.task.kind == "answer" else ColumnScorer(column)
