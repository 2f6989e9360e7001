"""Chain: several strategies as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import tee
from pathlib import Path

from torch import Tensor, nn

from mmcl.core.batch import Batch
from mmcl.core.model import VLM
from mmcl.core.output import NO_PROMPTS, Output, Prompts
from mmcl.core.recall import Recall
from mmcl.core.step import begin_task
from mmcl.core.strategy import Strategy
from mmcl.core.task import Task


class Chain(Strategy):
    """Run strategies one after another, in list order, for every hook.

    Prompts are merged, penalties are added; two members that claim the same thing (a prompt
    place, a penalty name, the objective, the recall) raise at their first meeting, by name.

    Args:
        strategies: the members, each a Strategy; a chain in a chain is allowed.

    **Remembers** what its members remember. **Asks of the model** what its members ask.
    """

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        super().__init__()
        if not strategies:
            raise ValueError("strategies is empty: give at least one, or use Finetune")
        self.members = nn.ModuleList(strategies)
        self._list: list[Strategy] = list(strategies)

    def attach(self, model: VLM) -> None:
        """Attach every member."""
        for member in self._list:
            member.attach(model)

    def keep_in(self, folder: Path) -> None:
        """Give every member a folder of its own."""
        for place, member in enumerate(self._list):
            member.keep_in(folder / f"member_{place}")

    def begin_task(self, model: VLM, task: Task) -> None:
        """Begin the task in every member."""
        for member in self._list:
            begin_task(model, member, task)

    def preview(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Give every member that wants it its own look at the task."""
        wanting = [member for member in self._list if member.uses("preview")]
        for member, own in zip(wanting, _shared(batches, len(wanting)), strict=True):
            member.preview(model, task, own)

    def recall(self) -> Recall | None:
        """Return the recall of the one member that has one."""
        found = [(m, recall) for m in self._list if (recall := m.recall()) is not None]
        if len(found) > 1:
            raise ValueError(_clash("recall old samples", [m for m, _ in found]))
        return found[0][1] if found else None

    def replay(self, model: VLM, batch: Batch) -> Batch:
        """Join every member's remembered rows."""
        for member in self._list:
            batch = member.replay(model, batch)
        return batch

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Merge every member's prompts."""
        merged = NO_PROMPTS
        for member in self._list:
            merged = merged.merge(member.prompts(model, batch))
        return merged

    def refine(self, model: VLM, batch: Batch, output: Output) -> Output:
        """Pass the output through every member."""
        for member in self._list:
            output = member.refine(model, batch, output)
        return output

    def objective(self, model: VLM, batch: Batch, output: Output) -> Tensor | None:
        """Return the objective of the one member that has one."""
        found = [(m, o) for m in self._list if (o := m.objective(model, batch, output)) is not None]
        if len(found) > 1:
            raise ValueError(_clash("replace the objective", [m for m, _ in found]))
        return found[0][1] if found else None

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Collect every member's terms."""
        terms: dict[str, Tensor] = {}
        owners: dict[str, Strategy] = {}
        for member in self._list:
            for name, term in member.penalty(model, batch, output).items():
                if name in terms:
                    raise ValueError(_clash(f"add a term '{name}'", [owners[name], member]))
                terms[name], owners[name] = term, member
        return terms

    def project(self, model: VLM) -> None:
        """Let every member edit the gradients."""
        for member in self._list:
            member.project(model)

    def observe(self, model: VLM, batch: Batch, output: Output) -> None:
        """Show the finished step to every member."""
        for member in self._list:
            member.observe(model, batch, output)

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Give every member its own exact pass."""
        for member, own in zip(self._list, _shared(batches, len(self._list)), strict=True):
            member.end_task(model, task, own)

    def folded(self, model: VLM) -> AbstractContextManager[None]:
        """Merge the adapters of every member."""

        @contextmanager
        def all_of_them() -> Iterator[None]:
            with ExitStack() as stack:
                for member in self._list:
                    stack.enter_context(member.folded(model))
                yield

        return all_of_them()

    def uses(self, hook: str) -> bool:
        """Tell whether any member has its own version of a hook."""
        return any(member.uses(hook) for member in self._list)

    def holdings(self) -> Mapping[str, int]:
        """Return every member's stores, named after the member."""
        return {
            f"{type(member).__name__}.{name}": count
            for member in self._list
            for name, count in member.holdings().items()
        }

    def idle(self) -> tuple[str, ...]:
        """Name what did nothing, after the member it belongs to."""
        return tuple(f"{type(m).__name__}: {part}" for m in self._list for part in m.idle())


def _shared(batches: Iterable[Batch], members: int) -> Sequence[Iterable[Batch]]:
    return [batches] * members if hasattr(batches, "__len__") else tee(batches, members)


def _clash(what: str, members: Sequence[Strategy]) -> str:
    names = " and ".join(type(member).__name__ for member in members)
    return f"{names} both {what}: leave one of them out of the chain"
