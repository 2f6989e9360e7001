"""Recycling: an adapter of an old base model is moved to the next base.

Qin et al. 2023, arXiv:2305.08702. With the weights M of the old base, T of the tuned model and N of
the next base, ``direct`` is N + (T - M), or the LoRA adapter on N; ``init`` trains from there;
``distill`` trains N with the old model as teacher; ``both`` does both.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmcl.core import write_atomic
from mmcl.evaluation import AccuracyMatrix, strict_json
from mmcl.export import FORMATS
from mmcl.export.formats import new_folder
from mmcl.registry.few_shot import CARD, FewShot, write_few_shot
from mmcl.registry.learning_curve import (
    LearningCurve,
    make_run,
    measure_curve,
    run_config,
    score,
    step_flops,
    train,
)
from mmcl.registry.records import Registry
from mmcl.registry.recycle_plan import BASE, check_plan, discard, write_plan
from mmcl.registry.signatures import FitCheck, base_weights, compare
from mmcl.registry.sources import (
    Adapter,
    ModelConfig,
    build_module,
    export_base,
    export_model,
    lora_config,
    model_config,
    touched_weights,
)

Mode = Literal["direct", "init", "distill", "both"]
_FINETUNE = {"class_path": "mmcl.strategies.Finetune"}
_MUST_FIT = ("shapes", "tokenizer", "image token")
Log = Callable[[str], None]


@dataclass(frozen=True)
class RecycleOptions:
    """Options of a recycling; see ``mmcl recycle --help``.

    Attributes:
        adapter: as the command line names it.
        base: as the command line names it.
        mode: "direct", "init", "distill" or "both".
        stream: name of a stream or path of a card, "" = none (direct only).
        task: name of the task, "" = the adapter's.
        data_dir: folder of built streams.
        samples: labeled training samples.
        test_samples: test samples at most.
        steps: optimizer steps.
        evaluate_every: steps between two evaluations.
        batch_size: samples of a step.
        learning_rate: None = that of the adapter's run, else 1e-4.
        alpha: weight of the distillation.
        temperature: of the distillation.
        hidden_weight: weight of the error of the embeddings.
        seed: of the samples and the run.
        against_scratch: also train from the next base alone, at equal FLOPs.
    """

    adapter: str
    base: str
    mode: Mode
    stream: str = ""
    task: str = ""
    data_dir: str = "data"
    samples: int = 32
    test_samples: int = 1000
    steps: int = 200
    evaluate_every: int = 20
    batch_size: int = 16
    learning_rate: float | None = None
    alpha: float = 0.9
    temperature: float = 10.0
    hidden_weight: float = 0.0
    seed: int = 0
    against_scratch: bool = True

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: naming the option.
        """
        for name in ("samples", "test_samples", "steps", "evaluate_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 or more")
        if self.mode != "direct" and not self.stream:
            raise ValueError(
                f"--mode {self.mode} trains, and there is no --data: give a card or the name of a "
                "stream, or use --mode direct"
            )


@dataclass(frozen=True)
class Scores:
    """Scores on the same test samples, 0 to 1, None if not measured.

    Attributes:
        old: the old base with the adapter, the target.
        bare: the next base alone.
        direct: the next base with the adapter, without training.
    """

    old: float | None = None
    bare: float | None = None
    direct: float | None = None


@dataclass(frozen=True)
class Recycled:
    """Result of a recycling.

    Attributes:
        options: as given.
        few_shot: chosen samples, None without a stream.
        scores: without training.
        recycled: curve of the recycled run, None in mode "direct".
        scratch: curve of the run from the next base alone, None if there is none.
        checks: how the adapter fits the next base.
    """

    options: RecycleOptions
    few_shot: FewShot | None
    scores: Scores
    recycled: LearningCurve | None
    scratch: LearningCurve | None
    checks: tuple[FitCheck, ...]


class Recycling:
    """Recycling of one adapter in a folder; a killed one resumes by the same call.

    Args:
        adapter: LoRA adapter or weight delta.
        options: of the command.
        registry: where ids of bases are looked up.
        folder: of all files; made if missing.
        changes: settings of the runs, as in ``mmcl train``.
        log: receives messages.

    Raises:
        ValueError: if the adapter does not fit the next base, naming what differs first; or the
            folder holds another recycling.
    """

    def __init__(
        self, adapter: Adapter, options: RecycleOptions, registry: Registry, folder: Path,
        changes: Sequence[str] = (), log: Log = lambda sentence: None,
    ) -> None:  # fmt: skip
        self.adapter, self.options, self.folder = adapter, options, folder
        self.changes, self.log = tuple(changes), log
        check_plan(folder, asdict(options))
        text = export_base(options.base, registry, folder / BASE)
        self.base = model_config(text, registry, adapter.base)
        self._tuned = adapter.load()
        self._old, self._new = adapter.load_base(), build_module(self.base)
        self._weights = base_weights(self._old.model)
        self.touched = touched_weights(self._tuned, self._weights)
        self.checks = tuple(compare(self._old.model, self._new.model, self.touched))
        try:
            _expect_fit(adapter, options, self.checks)
        except ValueError:
            discard(folder)
            raise
        write_plan(folder, asdict(options))
        self.few: FewShot | None = None
        if options.stream:
            self.few = write_few_shot(
                options.stream, options.data_dir, _task_of(adapter, options), folder / "data",
                samples=options.samples, test_samples=options.test_samples, seed=options.seed,
            )  # fmt: skip
        self._write_materials()

    def run(self) -> Recycled:
        """Evaluate without training, train, and measure both learning curves."""
        scores = self._scores() if self.few is not None else Scores()
        recycled = scratch = None
        if self.options.mode != "direct":
            self.log(f"recycling ({self.options.mode}): {self.folder / 'run'}")
            recycled = self._curve("run", *self._recycled_start(), self.options.steps)
            if self.options.against_scratch:
                steps = self._equal_steps(recycled)
                self.log(f"training from the next base alone, {steps} steps of equal FLOPs in all")
                scratch = self._curve("scratch", self.base, self._student(), steps)
        return Recycled(self.options, self.few, scores, recycled, scratch, self.checks)

    def _write_materials(self) -> None:
        """Write the adapter as a folder, or tuned and moved weights as models; each once."""
        if self.adapter.kind == "lora":
            self.moved = self.folder / "adapter"
            old = self.adapter.folder or self.folder / "old_adapter"
            if not old.exists():
                FORMATS["peft"](self._tuned, old, half=False)
            if not self.moved.exists():
                copy_adapter(old, self.moved, self._new.model.lm.config._name_or_path)
        else:
            self.moved = self.folder / "start"
            if not self.moved.exists():
                add_delta(self._new.model, base_weights(self._tuned.model), self._weights)
                export_model(self._new, self.moved)
        self.teacher = self.folder / "teacher"
        is_needed = self.few is not None or self.options.mode in ("distill", "both")
        if is_needed and not self.teacher.exists():
            export_model(self._tuned, self.teacher)
        del self._tuned, self._old, self._new

    def _direct(self) -> tuple[ModelConfig, Mapping[str, Any]]:
        """Return model and strategy of the next base with the adapter."""
        if self.adapter.kind == "lora":
            return self.base, lora_config(adapter=str(self.moved.resolve()))
        return self._like(self.base, self.moved), _FINETUNE

    def _student(self) -> Mapping[str, Any]:
        """Return the strategy without recycling: a new adapter, or what the old run trained."""
        if self.adapter.kind == "lora":
            return lora_config(**self.adapter.lora_arguments())
        return _FINETUNE

    def _recycled_start(self) -> tuple[ModelConfig, Mapping[str, Any]]:
        options, (model, strategy) = self.options, self._direct()
        if options.mode == "init":
            return model, strategy
        if options.mode == "distill":
            model, strategy = self.base, self._student()
        distillation = {
            "class_path": "mmcl.strategies.RecycleDistillation",
            "init_args": {
                "teacher": self._like(self.base, self.teacher), "alpha": options.alpha,
                "temperature": options.temperature, "hidden_weight": options.hidden_weight,
            },
        }  # fmt: skip
        if strategy == _FINETUNE:
            return model, distillation
        members = [strategy, distillation]
        return model, {"class_path": "mmcl.core.Chain", "init_args": {"strategies": members}}

    def _like(self, model: ModelConfig, folder: Path) -> dict[str, Any]:
        """Return a model's configuration with the weights of a folder."""
        arguments = {**model["init_args"], "model": str(folder.resolve())}
        if "pretrained" in arguments:
            arguments["pretrained"] = None
        return {"class_path": model["class_path"], "init_args": arguments}

    def _config(
        self, model: ModelConfig, strategy: Mapping[str, Any], steps: int
    ) -> dict[str, Any]:
        assumed = 1e-4
        if self.adapter.settings is not None:
            assumed = float(self.adapter.settings["model"].get("learning_rate", 1e-3))
        rate = self.options.learning_rate
        return run_config(
            model, strategy, (self.folder / "data" / CARD).resolve(),
            learning_rate=assumed if rate is None else rate, batch_size=self.options.batch_size,
            samples=self.few.samples if self.few else 1, steps=steps,
            evaluate_every=self.options.evaluate_every, seed=self.options.seed,
        )  # fmt: skip

    def _scores(self) -> Scores:
        file = self.folder / "scores.json"
        if file.is_file():
            known: Scores = strict_json.load(Scores, strict_json.read(file), str(file))
            return known
        pairs = {
            "old": (self._like(self.base, self.teacher), _FINETUNE),
            "bare": (self.base, _FINETUNE),
            "direct": self._direct(),
        }
        found = {n: score(self._config(*pair, 1), self.changes) for n, pair in pairs.items()}
        scores = Scores(**found)
        write_atomic(file, strict_json.to_bytes(asdict(scores)))
        return scores

    def _curve(
        self, name: str, model: ModelConfig, strategy: Mapping[str, Any], steps: int
    ) -> LearningCurve:
        config = self._config(model, strategy, steps)
        run, cli = make_run(config, self.folder / name, self.changes, log=self.log)
        matrix: AccuracyMatrix = train(run, cli)
        return measure_curve(run, matrix)

    def _equal_steps(self, recycled: LearningCurve) -> int:
        """Return the steps from the next base alone whose FLOPs equal those of the recycled run."""
        config = self._config(self.base, self._student(), 1)
        run, _ = make_run(config, self.folder / "scratch", self.changes)
        # Batches of an epoch are of like size, so smaller where the samples are no multiple.
        samples = self.few.samples if self.few else 1
        batch = samples / math.ceil(samples / self.options.batch_size)
        return max(1, round(recycled.flops / step_flops(run, round(batch))))


def copy_adapter(source: Path, target: Path, base: str) -> None:
    """Copy a peft folder, with another base model named in its ``adapter_config.json``."""
    with new_folder(target) as temporary:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in (".json", ".safetensors", ".bin"):
                shutil.copyfile(file, temporary / file.name)
        config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (temporary / "adapter_config.json").write_text(text, encoding="utf-8")


@torch.no_grad()
def add_delta(model: Any, tuned: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    """Add ``tuned - old`` to the weights of a model, in place; sums are float64, rounded once.

    Weights that tuning did not change, and counters, stay those of the model.

    Args:
        model: the next base, of shapes equal to those of ``old``.
        tuned: weights of the tuned model by name, as ``base_weights`` returns them.
        old: weights of its base.

    Raises:
        ValueError: naming the first weight whose shape differs.
    """
    new = base_weights(model)
    for name, before in old.items():
        after = tuned[name]
        if torch.equal(after, before) or not after.is_floating_point():
            continue
        if name not in new or new[name].shape != before.shape:
            got = tuple(new[name].shape) if name in new else "missing"
            raise ValueError(
                f"'{name}' is {tuple(before.shape)} in the old base and {got} in the next: a "
                "difference of weights fits a base of equal shapes"
            )
        new[name].copy_(new[name].double() + (after.double() - before.double()))


def _task_of(adapter: Adapter, options: RecycleOptions) -> str:
    return options.task or adapter.task


def _expect_fit(adapter: Adapter, options: RecycleOptions, checks: Sequence[FitCheck]) -> None:
    """Raise a ValueError for the first difference with which no mode gives a meaning."""
    for check in checks:
        if not check.fits and check.what in _MUST_FIT:
            raise ValueError(
                f"{adapter.name} does not fit {options.base}, {check.what}: {check.detail}. Train "
                "it again on the new base; mmcl upgrade check lists all differences"
            )
