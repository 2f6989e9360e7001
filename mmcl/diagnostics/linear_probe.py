"""Linear probes of frozen features: what the representation forgot, beside what the read-out did.

Davari et al. 2022, arXiv:2203.13381: representation forgetting is the loss of accuracy of the best
linear classifier of the features. Here that is a ridge regression on one-hot targets, in closed
form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core import Batch, forward
from mmcl.core.batch import IGNORE_INDEX
from mmcl.core.seeding import generator
from mmcl.data.stored_sample import Split
from mmcl.diagnostics.task_loss import ProbeData, mean_or_none
from mmcl.evaluation.continual_metrics import MetricValue
from mmcl.evaluation.diagnostic_record import Diagnostic, Panel, Series
from mmcl.evaluation.matrix import AccuracyMatrix
from mmcl.lightning.module import ContinualModule

RIDGES = tuple(10.0**power for power in range(-6, 2))
"""Candidates of lambda, relative to the mean square of the centered features."""
_HELD_OUT = 0.2
_FEWEST = 5
_REPRESENTATION = "probe accuracy when the task was just learned minus probe accuracy at the end"
_READOUT = "score of the run when the task was just learned minus its score at the end"


@dataclass(frozen=True)
class ProbeScore:
    """Accuracy of a linear probe on test features, and the lambda that was chosen."""

    accuracy: float
    ridge: float


def ridge_classifier(features: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return weight (D, K) and bias (K,) of the ridge regression on targets, in float64.

    It minimizes ``mean ||x W + b - t||^2 + ridge s ||W||^2``, where s is the mean square of the
    centered features; the bias has no penalty.

    Args:
        features: (N, D).
        targets: (N, K), for example one-hot.
        ridge: more than 0.
    """
    x, t = features.double(), targets.double()
    center, mean = x.mean(0), t.mean(0)
    x, t = x - center, t - mean
    size = x.square().mean().clamp_min(torch.finfo(torch.float64).tiny)
    if x.shape[0] < x.shape[1]:  # the same solution, through the (N, N) Gram matrix
        gram = x @ x.T / len(x) + ridge * size * torch.eye(len(x), dtype=x.dtype)
        weight = x.T @ torch.linalg.solve(gram, t) / len(x)
    else:
        gram = x.T @ x / len(x) + ridge * size * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(gram, x.T @ t / len(x))
    return weight, mean - center @ weight


def fit_probe(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, seed: int = 0
) -> ProbeScore:
    """Train a linear probe and score it on test features.

    Lambda is the candidate of highest accuracy on a fifth of the training samples that is held
    out, the largest of equal ones; then the probe is trained on all of them.

    Args:
        train: (N, D) features and (N,) int64 classes, of any numbers.
        test: the same of the test split; a class without a training sample is always wrong.
        seed: of the held-out part.

    Raises:
        ValueError: if there are fewer than 5 training samples or 2 classes, no test sample, or
            features that are not finite.
    """
    (x, labels), (test_x, test_labels) = train, test
    classes = torch.tensor(sorted(set(labels.tolist())), dtype=labels.dtype)
    if len(x) < _FEWEST or len(classes) < 2:
        raise ValueError(
            f"a probe needs {_FEWEST} training samples of 2 classes, got {len(x)} of {len(classes)}"
        )
    if not len(test_x):
        raise ValueError("there is no test sample")
    if not (x.isfinite().all() and test_x.isfinite().all()):
        raise ValueError("some features are not finite")
    targets = (labels[:, None] == classes).double()
    order = torch.randperm(len(x), generator=generator(seed))
    held = max(1, round(_HELD_OUT * len(x)))
    out, kept = order[:held], order[held:]

    def score(ridge: float) -> tuple[float, float]:
        weights = ridge_classifier(x[kept], targets[kept], ridge)
        return _accuracy(weights, x[out], labels[out], classes), ridge

    ridge = max(score(ridge) for ridge in RIDGES)[1]
    weights = ridge_classifier(x, targets, ridge)
    return ProbeScore(_accuracy(weights, test_x, test_labels, classes), ridge)


def _accuracy(
    weights: tuple[Tensor, Tensor], features: Tensor, labels: Tensor, classes: Tensor
) -> float:
    weight, bias = weights
    predicted = classes[(features.double() @ weight + bias).argmax(1)]
    return float((predicted == labels).double().mean())


@torch.no_grad()
def collect_features(
    module: ContinualModule, probes: ProbeData, row: int, number: int, split: Split
) -> tuple[Tensor, Tensor]:
    """Return the frozen features and classes of a split of a task.

    Of a contrastive model the image embedding of the forward pass, of a generative one the output
    of the last block, mean over the tokens of the question. Without augmentation.

    Args:
        module: in evaluation mode, on the device of ``probes``.
        probes: of the stream.
        row: number of learned tasks.
        number: a task with classes.
        split: train or test.

    Returns:
        (N, D) float32 and (N,) int64 on the CPU, -1 for an answer that is none of the classes.
    """
    spec = probes.spec(row, number)
    model = module.model
    if spec.names and hasattr(model, "set_classes"):
        model.set_classes(spec.prompt_names or spec.names, spec.task.templates)
    index_of = {name: index for index, name in enumerate(_classes_of(probes, number))}
    features, labels = [], []
    for batch in probes.batches(model, spec.task.index, split):
        if not len(batch):
            continue
        with probes.precision():
            features.append(_features(module, batch).float().cpu())
        if batch.is_generative:
            answers = [ref.answers[0] if ref.answers else "" for ref in batch.references]
            labels.append(torch.tensor([index_of.get(answer, -1) for answer in answers]))
        else:
            labels.append(batch.labels.cpu())
    if not features:
        return torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(labels)


def _features(module: ContinualModule, batch: Batch) -> Tensor:
    if not batch.is_generative:
        output = forward(module.model, module.strategy, batch)
        if output.image is None:
            raise ValueError(
                f"{type(module.model).__name__} returns no Output.image: a linear probe needs the "
                "image embedding of every sample"
            )
        return output.image
    if not callable(blocks := getattr(module.model, "blocks", None)):
        raise TypeError(
            f"a linear probe needs model.blocks() -> the layers of the language model, and "
            f"{type(module.model).__name__} has none: wrap it in mmcl.models or add the method"
        )
    hidden: list[Tensor] = []

    def see(block: nn.Module, given: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple | list) else output)

    handle = blocks()[-1].register_forward_hook(see)
    try:
        forward(module.model, module.strategy, batch)
    finally:
        handle.remove()
    states = hidden[-1]
    is_question = _is_question(batch)
    added = states.shape[1] - is_question.shape[1]  # prompts stand in front
    mask = nn.functional.pad(is_question, (added, 0), value=True).to(states)[..., None]
    return (states * mask).sum(1) / mask.sum(1).clamp_min(1)


def _is_question(batch: Batch) -> Tensor:
    """Return (B, L) bool, True on the tokens before the first answer, False on padding."""
    before = (batch.labels != IGNORE_INDEX).cumsum(1) == 0
    return before if batch.attention_mask is None else before & batch.attention_mask


def _classes_of(probes: ProbeData, number: int) -> tuple[str, ...]:
    task = probes.data.stream.evaluated_task(number)
    if task.task_type == "classification":
        return tuple(map(str, task.class_ids))
    names = probes.data.stream.classes_seen(len(probes.data.stream) - 1)
    return tuple(names[index] for index in task.class_ids if index < len(names))


def linear_probe(
    load: Callable[[int], ContinualModule | None],
    probes: ProbeData,
    rows: Sequence[int],
    numbers: Sequence[int],
    matrix: AccuracyMatrix | None,
    *,
    seed: int = 0,
) -> Diagnostic:
    """Measure the accuracy of linear probes in every state of a run, and what was forgotten.

    Args:
        load: row -> the module after so many tasks, on the device of ``probes``; None = lost.
        probes: of the run's stream; ``samples`` bounds both splits.
        rows: numbers of learned tasks, ascending.
        numbers: tasks; those without classes are left out and named.
        matrix: of the run, for the read-out's forgetting; None = there is none.
        seed: of the held-out parts.
    """
    stream = probes.data.stream
    names = ("zero-shot", *(task.name for task in stream))
    probed = [number for number in numbers if _has_classes(probes, number)]
    notes = [
        f"'{probes.name(n)}' has no classes and is left out." for n in numbers if n not in probed
    ]
    found, gaps = _probe_all(load, probes, rows, probed, seed)
    notes += gaps
    curves = [Series(probes.name(n), [found.get((row, n)) for row in rows]) for n in probed] or [
        Series("no task with classes", [None] * len(rows))
    ]
    readout = [Series(probes.name(n), [_cell(matrix, row, n) for row in rows]) for n in probed]
    return Diagnostic(
        "linear_probe",
        "Linear probes",
        "Accuracy of a linear probe (ridge regression in closed form, trained on the train split "
        "of each task) of the frozen features of every state, and the run's own score. Where the "
        "probe keeps what the score loses, the read-out forgot and the representation did not.",
        "after",
        list(range(len(rows))),
        [
            Panel("probe accuracy", curves, is_score=True),
            *([Panel("score of the run", readout, is_score=True)] if matrix and readout else []),
        ],
        x_names=[names[row] for row in rows],
        metrics=_forgetting_metrics(probes, rows, probed, found, matrix),
        notes=notes,
        settings={"seed": str(seed), "samples": str(probes.samples or "all")},
    )


def _probe_all(
    load: Callable[[int], ContinualModule | None],
    probes: ProbeData,
    rows: Sequence[int],
    numbers: Sequence[int],
    seed: int,
) -> tuple[dict[tuple[int, int], float], list[str]]:
    """Return the accuracy of the probe of every (row, task), and what was left out."""
    names = ("zero-shot", *(task.name for task in probes.data.stream))
    found: dict[tuple[int, int], float] = {}
    reasons: dict[tuple[int, int], str] = {}
    left_out: dict[str, None] = {}
    for row in rows:
        module = load(row)
        for number in numbers:
            if module is None:
                reasons[row, number] = f"the checkpoint after '{names[row]}' is lost"
                continue
            try:
                found[row, number] = _probe_cell(module, probes, row, number, seed, left_out)
            except ValueError as error:
                reasons[row, number] = str(error)
    undefined = [
        f"No probe of '{probes.name(n)}' after '{names[row]}': {reason}."
        for (row, n), reason in reasons.items()
    ]
    return found, [*left_out, *undefined]


def _probe_cell(
    module: ContinualModule,
    probes: ProbeData,
    row: int,
    number: int,
    seed: int,
    left_out: dict[str, None],
) -> float:
    """Return the accuracy of the probe of a task; samples without a class are noted."""
    splits: tuple[Split, Split] = ("train", "test")
    parts = [collect_features(module, probes, row, number, split) for split in splits]
    train, test = ((x[labels >= 0], labels[labels >= 0]) for x, labels in parts)
    gaps = [len(part[1]) - len(kept[1]) for part, kept in zip(parts, (train, test), strict=True)]
    if not len(train[1]):
        raise ValueError("no training sample has an answer that is one of its classes")
    if any(gaps):
        name = probes.name(number)
        left_out[
            f"{gaps[0]} training samples of '{name}' and {gaps[1]} test samples have an answer "
            "that is no class and are left out."
        ] = None
    return fit_probe(train, test, seed=seed).accuracy


def _has_classes(probes: ProbeData, number: int) -> bool:
    task = probes.data.stream.evaluated_task(number)
    is_known = task.task_type in ("classification", "instruction")
    return is_known and not task.is_eval_only and len(_classes_of(probes, number)) > 1


def _cell(matrix: AccuracyMatrix | None, row: int, number: int) -> float | None:
    if matrix is None or row >= len(matrix.rows) or number >= len(matrix.columns):
        return None
    value = matrix.get(row, number)
    return value if value is None or math.isfinite(value) else None


def _forgetting_metrics(
    probes: ProbeData,
    rows: Sequence[int],
    numbers: Sequence[int],
    found: Mapping[tuple[int, int], float],
    matrix: AccuracyMatrix | None,
) -> list[MetricValue]:
    """Return the forgetting of representation and read-out, mean over earlier tasks and of each."""
    last = max(rows, default=0)
    earlier = [number for number in numbers if number + 1 < last]
    metrics: list[MetricValue] = []
    cells = {(row, n): _cell(matrix, row, n) for row in range(last + 1) for n in earlier}
    kinds: list[tuple[str, str, Mapping[tuple[int, int], float | None]]] = [
        ("representation forgetting", _REPRESENTATION, found),
        ("read-out forgetting", _READOUT, cells),
    ]
    for kind, definition, values in kinds:
        lost: dict[int, float | None] = {}
        for number in earlier:
            learned, now = values.get((number + 1, number)), values.get((last, number))
            lost[number] = None if learned is None or now is None else learned - now
        reason = "a value is missing" if earlier else "no task was learned after another"
        mean = mean_or_none(list(lost.values()))
        metrics.append(
            MetricValue(f"mean {kind}", mean, definition, reason if mean is None else None)
        )
        metrics += [
            MetricValue(
                f"{kind}, {probes.name(number)}", value, definition,
                "a value is missing" if value is None else None,
            )
            for number, value in lost.items()
        ]  # fmt: skip
    return metrics
