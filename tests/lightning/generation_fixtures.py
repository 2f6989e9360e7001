"""What a run's model answers, in the process that trained it and in another."""

import torch

from tests.behaviour.kill_runs import command


def learn_and_answer(words, file):
    """Run a command line; save the answers of its model, and the keys that it trained on."""
    from mmcl.lightning.continual_run import ContinualRun
    from mmcl.lightning.task_callback import TaskCallback

    visits, kept = [], {}
    run, batch_end = ContinualRun.run, TaskCallback.on_train_batch_end

    def note_visits(hooks, trainer, module, outputs, batch, batch_idx):
        keys = zip(batch.keys, batch.is_replay.tolist(), strict=True)
        new = [key for key, is_replayed in keys if not is_replayed]
        visits.append((hooks.task.index, trainer.current_epoch, new, len(batch)))
        batch_end(hooks, trainer, module, outputs, batch, batch_idx)

    def note_answers(sequence):
        make = sequence.make_module
        sequence.make_module = lambda: kept.setdefault("module", make())
        matrix = run(sequence)
        answers = answers_of(sequence, kept["module"])
        torch.save({**answers, "visits": visits}, file)
        return matrix

    ContinualRun.run, TaskCallback.on_train_batch_end = note_answers, note_visits
    command(words)


def load_and_answer(words, file):
    """Save the answers of a finished run's last checkpoint."""
    from mmcl.evaluation import AccuracyMatrix
    from mmcl.lightning.continual_run import ContinualRun

    def note_answers(sequence):
        module = sequence.load_after(len(sequence.data.stream))
        torch.save(answers_of(sequence, module), file)
        return AccuracyMatrix.read(sequence.folder.path / "matrix.json")

    ContinualRun.run = note_answers
    command(words)


@torch.no_grad()
def answers_of(sequence, module):
    """Logits of all test rows together, one by one, and in another order."""
    from mmcl.core import forward
    from mmcl.data import eval_loader

    module.eval()
    transform = module.model.transform(False)
    sequence.data.task_index = len(sequence.data.stream) - 1
    sequence.data.set_model_classes(module.model)
    rows = None
    for column in range(len(sequence.data.stream)):
        for batch in eval_loader(sequence.data.prepared, column, transform, batch=64):
            rows = batch if rows is None else rows.join(batch)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    alone = [rows.take(torch.tensor([row])) for row in range(len(rows))]

    def answer(batch):
        return forward(module.model, module.strategy, batch).logits

    return {
        "together": answer(rows),
        "alone": torch.cat([answer(row) for row in alone]),
        "order": order,
        "permuted": answer(rows.take(order)),
    }
