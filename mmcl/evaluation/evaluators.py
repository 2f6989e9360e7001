"""Evaluators of one cell of the accuracy matrix: predictions on a task's test data, scored.

``evaluate`` does it for a loop of one's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcl.core import (
    IGNORE_INDEX,
    Batch,
    Output,
    Strategy,
    Task,
    TaskStream,
    device_of,
    forward,
    generate,
)
from mmcl.core.batch import text_ids
from mmcl.core.distributed import (
    all_gather_samples,
    all_gather_strings,
    all_reduce_sum,
    rank_and_world,
)
from mmcl.core.model import VLM, eval_mode
from mmcl.evaluation.predictions import Prediction
from mmcl.evaluation.retrieval import Retrieval, recall_at_k
from mmcl.evaluation.scorers import find_scorer


@dataclass(frozen=True)
class EvalSpec:
    """Specification of one evaluation: the task and the classes that compete.

    Attributes:
        task: its test data are scored.
        names: class names that compete, in the order of the logits, all different.
        allowed: logit indices that may be predicted, None = all (class- and domain-incremental).
        knows_task: True if the model may know the task of a sample (task-incremental).
        prompt_names: names of the same classes in prompts; () = ``names``.
    """

    task: Task
    names: tuple[str, ...]
    allowed: tuple[int, ...] | None = None
    knows_task: bool = False
    prompt_names: tuple[str, ...] = ()

    @property
    def score(self) -> str:
        """Name of the metric: accuracy, recall@1 for captions, the scorer's name for answers."""
        if self.task.scorer:
            return self.task.scorer
        return "recall@1" if self.task.task_type in ("captioning", "retrieval") else "accuracy"


def make_eval_spec(stream: TaskStream, row: int, column: int) -> EvalSpec:
    """Return the specification of matrix cell (row, column), which depends on no later task.

    Class-incremental: all classes seen until the row's or the column's task compete, whichever is
    later. Task-incremental: the classes of the column's task. Eval-only tasks: their own classes.
    """
    task = stream.evaluated_task(column)
    seen = task.classes if task.is_eval_only else stream.classes_seen(max(row - 1, column))
    knows_task = stream.scenario == "task" and not task.is_eval_only
    return EvalSpec(
        task,
        stream.display_names(seen),
        task.class_ids if knows_task else None,
        knows_task,
        stream.prompt_names(seen),
    )


class Evaluator:
    """Evaluator that collects a model's predictions for a column and computes one metric.

    Attributes:
        value: the metric, 0 to 1, the same on all ranks; None before ``compute``.
        predictions: sample ids, targets, predictions and scores in sample order, after ``compute``.
        retrieval: recalls at 1, 5 and 10 both ways, after ``compute``; None if none was computed.
    """

    def __init__(self, column: EvalSpec) -> None:
        self.column = column
        self.value: float | None = None
        self.predictions: dict[str, Tensor] = {}
        self.retrieval: Retrieval | None = None
        self.errors: list[str] = []
        self._batches: list[dict[str, Tensor]] = []
        self._seen = 0
        self._device = torch.device("cpu")

    def reset(self, model: Any) -> None:
        """Reset the evaluator, and give the model the classes of this column."""
        self._batches, self._seen = [], 0
        if self.column.names and hasattr(model, "set_classes"):
            with torch.inference_mode(False):
                names = self.column.prompt_names or self.column.names
                model.set_classes(names, self.column.task.templates)

    def update(self, model: Any, strategy: Strategy, batch: Batch) -> None:
        """Update with the predictions for a batch."""
        self.errors += batch.errors
        if not len(batch):
            return
        batch = self.mask_task_ids(batch)
        if self.column.task.is_eval_only:
            # Heads trained for the stream's classes do not apply to the classes of this task.
            output = model(batch, strategy.prompts(model, batch))
        else:
            output = forward(model, strategy, batch)
        if self.column.score == "recall@1":
            samples = _embeddings(output, batch)
        else:
            samples = _predictions(output.logits, batch.labels, self.column.allowed)
        samples["sample"] = self.sample_ids(batch)
        self._device = batch.labels.device
        self._batches.append({name: tensor.detach().cpu() for name, tensor in samples.items()})

    def mask_task_ids(self, batch: Batch) -> Batch:
        """Return the batch with its task ids masked (-1), unless the scenario reveals them."""
        if self.column.knows_task:
            return batch
        return replace(batch, task_ids=torch.full_like(batch.task_ids, -1))

    def sample_ids(self, batch: Batch) -> Tensor:
        """Return the sample ids (B,) of a batch, else positions in the pass over all ranks."""
        first, self._seen = self._seen, self._seen + len(batch)
        if batch.sample_ids is not None:
            return batch.sample_ids
        rank, world = rank_and_world()
        return torch.arange(first, self._seen) * world + rank

    def compute(self) -> None:
        """Gather the predictions of all ranks and compute the metric."""
        self.errors = all_gather_strings(self.errors, self._device)
        samples = self._gathered()
        if not samples or not len(samples["sample"]):
            raise ValueError(
                f"no test sample of '{self.column.task.name}' could be read: check its shards"
            )
        if "answer" in samples:
            self.value = float((samples["answer"] == samples["truth"]).double().mean())
        else:
            self.retrieval = recall_at_k(
                samples["image"], samples["text"], samples["caption"], image_ids=samples["shown"]
            )
            self.value = self.retrieval.mean
        kept = ("sample", "truth", "answer", "score")
        self.predictions = {name: samples[name] for name in kept if name in samples}

    def _gathered(self) -> dict[str, Tensor]:
        names = self._batches[0].keys() if self._batches else ()
        own = {name: torch.cat([batch[name] for batch in self._batches]) for name in names}
        self._batches = []
        all_ranks = {n: all_gather_samples(t.to(self._device)).cpu() for n, t in own.items()}
        if not all_ranks:
            return {}
        # Stable, since the captions of one sample share its id.
        order = torch.argsort(all_ranks["sample"], stable=True)
        return {name: tensor[order] for name, tensor in all_ranks.items()}


def _predictions(
    logits: Tensor, labels: Tensor, allowed: tuple[int, ...] | None
) -> dict[str, Tensor]:
    if allowed is not None:
        mask = torch.full((logits.shape[1],), float("-inf"), device=logits.device)
        mask[list(allowed)] = 0
        logits = logits + mask
    best = logits.max(1)
    return {"answer": best.indices, "truth": labels, "score": best.values.float()}


def _embeddings(output: Output, batch: Batch) -> dict[str, Tensor]:
    if output.image is None or output.text is None or batch.input_ids is None:
        raise ValueError(
            "retrieval needs an image and a text embedding of every sample, got None: use a model "
            "that returns Output.image and Output.text"
        )
    caption = text_ids(batch.input_ids, batch.attention_mask)
    shown = torch.full_like(caption, -1) if batch.image_ids is None else batch.image_ids
    own = {"image": output.image.float(), "text": output.text.float()}
    return {**own, "caption": caption, "shown": shown}


class GenerationEvaluator(Evaluator):
    """Evaluator that generates answers for a column and scores them, strictly and leniently.

    Attributes:
        answers: one for every test sample, in sample order, after ``compute``.
        lenient: the lenient score, which ignores the format of an answer, 0 to 1.
        version: version of the scorer's rule.
    """

    def __init__(self, column: EvalSpec) -> None:
        super().__init__(column)
        self.answers: list[Prediction] = []
        self.lenient: float | None = None
        self.scorer = find_scorer(column.task.scorer)
        self.version = self.scorer.version
        self._lines: list[str] = []

    def reset(self, model: VLM) -> None:
        """Reset the evaluator."""
        self._lines, self._seen = [], 0

    def update(self, model: VLM, strategy: Strategy, batch: Batch) -> None:
        """Update with generated answers; a failing batch is retried sample by sample."""
        self.errors += batch.errors
        if not len(batch):
            return
        self._device = batch.labels.device
        batch = self.mask_task_ids(batch)
        ids = self.sample_ids(batch).tolist()
        predictions = self._predictions(model, strategy, batch)
        for index, (sample_id, prediction) in enumerate(zip(ids, predictions, strict=True)):
            reference = batch.references[index]
            key = batch.keys[index] if batch.keys else ""
            line = [sample_id, key, reference.question, list(reference.answers), prediction]
            self._lines.append(json.dumps(line))

    def compute(self) -> None:
        """Gather the answers of all ranks and compute the metric."""
        self.errors = all_gather_strings(self.errors, self._device)
        lines = [json.loads(line) for line in all_gather_strings(self._lines, self._device) if line]
        self._lines = []
        if not lines:
            raise ValueError(
                f"no test sample of '{self.column.task.name}' could be read: check its shards"
            )
        lines.sort(key=lambda line: int(line[0]))
        references = [tuple(line[3]) for line in lines]
        questions = [line[2] for line in lines]
        scored = self.scorer.score([line[4] for line in lines], references, questions)
        self.value, self.lenient = scored.strict, scored.lenient
        samples = zip(lines, references, scored.strict_scores, scored.lenient_scores, strict=True)
        self.answers = [
            Prediction(
                key=key, target=truths[0], text=prediction, correct=strict >= 0.5,
                question=question, references=truths, strict=round(strict, 6),
                lenient=round(lenient, 6),
            )
            for (_, key, question, _, prediction), truths, strict, lenient in samples
        ]  # fmt: skip

    def _predictions(self, model: VLM, strategy: Strategy, batch: Batch) -> list[str]:
        try:
            return self._generate(model, strategy, batch)
        except (RuntimeError, ValueError, IndexError) as error:
            if len(batch) == 1:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                self.errors.append(f"{(batch.keys or ('a sample',))[0]}: no answer ({reason})")
                return [""]
        indices = torch.arange(len(batch), device=batch.labels.device)
        return [self._predictions(model, strategy, batch.take(i[None]))[0] for i in indices]

    def _generate(self, model: VLM, strategy: Strategy, batch: Batch) -> list[str]:
        task = self.column.task
        candidates: Sequence[str] = self.column.names if task.decoding == "candidates" else ()
        options = {"candidates": candidates, "max_new_tokens": task.max_new_tokens}
        if task.is_eval_only:
            # As for classes: the strategy does not transform outputs of an eval-only task.
            predictions: list[str] = model.generate(  # type: ignore[attr-defined]
                batch, strategy.prompts(model, batch), **options
            )
            return predictions
        return generate(model, strategy, batch, **options)


class ValidationLoss:
    """Mean task loss over the validation part of a task, exact over batches and ranks.

    It is the loss of training without penalties: a mean over samples, for answers over tokens. A
    contrastive loss compares the samples of a batch, so it depends on the size of batches.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, model: Any, strategy: Strategy, batch: Batch) -> None:
        """Add the loss of a batch, weighted by its samples or tokens in the loss."""
        output = forward(model, strategy, batch)
        loss = strategy.objective(model, batch, output)
        if loss is None:
            loss = model.loss(output, batch)
        is_scored = batch.labels != IGNORE_INDEX
        has_labels = batch.is_generative or batch.input_ids is None
        count = (
            is_scored.sum().double()
            if has_labels
            else torch.tensor(float(len(batch))).to(self._sums)
        )
        self._sums += torch.stack([loss.double() * count, count])

    def compute(self) -> float:
        """Return the mean over all ranks."""
        total, count = all_reduce_sum(self._sums).tolist()
        return float(total / max(1.0, count))


def make_evaluator(column: EvalSpec) -> Evaluator:
    """Return the evaluator of a column: of answers, or of classes and embeddings."""
    is_generated = column.task.task_type == "instruction"
    return GenerationEvaluator(column) if is_generated else Evaluator(column)


def evaluate(
    model: VLM,
    strategy: Strategy,
    loader: Iterable[Batch],
    *,
    allowed: Sequence[int] | None = None,
    knows_task: bool = False,
    scorer: str = "exact",
    max_new_tokens: int = Task.max_new_tokens,
) -> float:
    """Evaluate a model and its strategy on a loader: one cell of an ``AccuracyMatrix``.

    Accuracy of samples with classes; for captions mean recall@1 of both directions, every image
    once (``Batch.image_ids``); the scorer's strict score of answers. Model and strategy are in
    evaluation mode meanwhile. Processes take their own samples, and all get the score over all.

    Args:
        model: on its device, with the classes that compete set.
        strategy: attached to the model.
        loader: test batches, each sample once, in any order.
        allowed: classes that may be predicted (task-incremental: the task's); None = all.
        knows_task: let the strategy see ``task_ids`` (task-incremental); else they are masked.
        scorer: of generated answers.
        max_new_tokens: of generated answers.

    Returns:
        The score, 0 to 1.

    Raises:
        ValueError: if the loader is empty.
    """
    evaluator: Evaluator | None = None
    device = device_of(model)
    with eval_mode(cast(nn.Module, model)), eval_mode(strategy), torch.no_grad():
        for batch in loader:
            if evaluator is None:
                task = Task(0, "evaluation")
                if batch.is_generative:
                    task = replace(
                        task, task_type="instruction", scorer=scorer, max_new_tokens=max_new_tokens
                    )
                elif batch.input_ids is not None:
                    task = replace(task, task_type="captioning")
                ids = None if allowed is None else tuple(allowed)
                evaluator = make_evaluator(EvalSpec(task, (), ids, knows_task))
            evaluator.update(model, strategy, batch.to(device))
    if evaluator is None:
        raise ValueError("the loader gave no batch to evaluate: give the test data of a task")
    evaluator.compute()
    return cast(float, evaluator.value)
