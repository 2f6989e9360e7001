"""Chain: several strategies combined into one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import tee
from pathlib import Path

from torch import Tensor, nn

from mmcl.core.batch import Batch
from mmcl.core.model import NO_PROMPTS, VLM, MissingMembersError, Output, Prompts
from mmcl.core.strategy import ReplayPlan, Strategy
from mmcl.core.task import Task


class Chain(Strategy):
    """Strategy that runs its members' hooks one after another, in list order.

    Two hooks have an order of their own, so that copies and measures are taken of the final
    weights: ``begin_task`` runs last for members with ``reads_weights``; ``end_task`` runs first
    for those with ``rewrites_weights`` and last for the others with ``reads_weights``.

    Prompts are merged and penalties are summed. If two members provide the same thing (a prompt
    position, a penalty name, the objective, a plan of samples to mix in), a ValueError names both.

    Args:
        strategies: at least one member; a member may be a chain.

    **Remembers** the state of its members. **Asks of the model** what its members ask.
    """

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        super().__init__()
        if not strategies:
            raise ValueError("strategies is empty: give at least one, or use Finetune")
        self.members = nn.ModuleList(strategies)
        self._list: list[Strategy] = list(strategies)

    def set_root(self, root: Strategy) -> None:
        """Set the outermost chain, for every member as well."""
        super().set_root(root)
        for member in self._list:
            member.set_root(root)

    def leaves(self) -> list[Strategy]:
        """Return the members that are no chains, and those of the members that are."""
        nested = [m.leaves() if isinstance(m, Chain) else [m] for m in self._list]
        return [member for members in nested for member in members]

    def attach(self, model: VLM) -> None:
        """Attach every member, and give it this chain as its ``root``.

        Raises:
            MissingMembersError: with what all members need and the model lacks.
        """
        self.set_root(self.root)
        missing: dict[str, Sequence[str]] = {}
        for member in self._list:
            try:
                member.attach(model)
            except MissingMembersError as error:
                missing |= error.missing
        if missing:
            raise MissingMembersError(model, missing)

    def set_memory_dir(self, folder: Path) -> None:
        """Set a separate memory folder for every member: ``member_0``, ``member_1``, ..."""
        for index, member in enumerate(self._list):
            member.set_memory_dir(folder / f"member_{index}")

    def before_task(self, model: VLM, task: Task) -> None:
        """Let every member see model and strategies before any member begins the task."""
        for member in self._list:
            member.before_task(model, task)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Begin the task in every member, last in those that read the weights."""
        for member in sorted(self.leaves(), key=lambda member: member.reads_weights):
            member.begin_task(model, task)
        for part in self.modules():
            if isinstance(part, Strategy):
                part.current_task = task

    def preview(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Preview the task with every member that has this hook, each over all batches."""
        users = [member for member in self._list if member.overrides("preview")]
        for member, own in zip(users, _copies(batches, len(users)), strict=True):
            member.preview(model, task, own)

    def replay_plan(self) -> ReplayPlan | None:
        """Return the plan of the only member that has one.

        Raises:
            ValueError: if two members have one.
        """
        found = [(m, plan) for m in self._list if (plan := m.replay_plan()) is not None]
        if len(found) > 1:
            raise ValueError(_clash("have a plan of samples to mix in", [m for m, _ in found]))
        return found[0][1] if found else None

    def extend_batch(self, model: VLM, batch: Batch) -> Batch:
        """Return the batch with the replayed samples of every member joined."""
        for member in self._list:
            batch = member.extend_batch(model, batch)
        return batch

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Return the merged prompts of all members.

        Raises:
            ValueError: if two members use the same position or name.
        """
        merged = NO_PROMPTS
        for member in self._list:
            merged = merged.merge(member.prompts(model, batch))
        return merged

    def transform_output(self, model: VLM, batch: Batch, output: Output) -> Output:
        """Return the output after every member's transform, in list order."""
        for member in self._list:
            output = member.transform_output(model, batch, output)
        return output

    def objective(self, model: VLM, batch: Batch, output: Output) -> Tensor | None:
        """Return the objective of the only member that has one.

        Raises:
            ValueError: if two members have one.
        """
        found = [(m, o) for m in self._list if (o := m.objective(model, batch, output)) is not None]
        if len(found) > 1:
            raise ValueError(_clash("replace the objective", [m for m, _ in found]))
        return found[0][1] if found else None

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the penalty terms of all members by name.

        Raises:
            ValueError: if two members use the same name.
        """
        terms: dict[str, Tensor] = {}
        owners: dict[str, Strategy] = {}
        for member in self._list:
            for name, term in member.penalty(model, batch, output).items():
                if name in terms:
                    raise ValueError(_clash(f"add a term '{name}'", [owners[name], member]))
                terms[name], owners[name] = term, member
        return terms

    def project_gradients(self, model: VLM) -> None:
        """Let every member edit the gradients, in list order."""
        for member in self._list:
            member.project_gradients(model)

    def after_step(self, model: VLM, batch: Batch, output: Output) -> None:
        """Run every member's hook after the step."""
        for member in self._list:
            member.after_step(model, batch, output)

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """End the task in every member, each with its own exact pass.

        Members that rewrite the weights come first, others that read them last.
        """
        ordered = sorted(self.leaves(), key=lambda m: (not m.rewrites_weights, m.reads_weights))
        for member, own in zip(ordered, _copies(batches, len(ordered)), strict=True):
            member.end_task(model, task, own)

    @contextmanager
    def merged_adapters(self, model: VLM) -> Iterator[None]:
        """Context in which the adapters of every member are merged into the weights."""
        with ExitStack() as stack:
            for member in self._list:
                stack.enter_context(member.merged_adapters(model))
            yield

    def overrides(self, hook: str) -> bool:
        """Whether any member overrides a hook."""
        return any(member.overrides(hook) for member in self._list)

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of entries of every member's buffers; names start with the member's."""
        return {
            f"{type(member).__name__}.{name}": count
            for member in self._list
            for name, count in member.buffer_sizes().items()
        }

    def inactive_parts(self) -> tuple[str, ...]:
        """Return the inactive parts of all members, each after the name of its member."""
        return tuple(
            f"{type(m).__name__}: {part}" for m in self._list for part in m.inactive_parts()
        )


def _copies(batches: Iterable[Batch], members: int) -> Sequence[Iterable[Batch]]:
    return [batches] * members if hasattr(batches, "__len__") else tee(batches, members)


def _clash(what: str, members: Sequence[Strategy]) -> str:
    names = " and ".join(type(member).__name__ for member in members)
    return f"{names} both {what}: leave one of them out of the chain"
