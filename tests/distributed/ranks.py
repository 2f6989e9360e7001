"""Runs on two processes, forked as ``torchrun`` would start them, each noting what it saw."""

import copy
import os
import signal
import socket

import torch

from tests.behaviour.kill_runs import arm, command, in_process

WORLD = 2
_SECONDS_TO_FOLLOW = 60
"""Left to the other ranks when rank 0 has ended."""


def on_ranks(words, folder, kill=None, world=WORLD, way="ddp"):
    """Give a command line on several ranks; what each saw lies under ``folder``.

    Args:
        words: the command line; that there are several devices is added to it.
        folder: gets ``output_<rank>`` and, from a run that ends, ``seen_<rank>.pt``.
        kill: (moment, count) at which rank 0 dies; the others are killed after it.
        world: number of ranks.
        way: how several devices are used, ``trainer.strategy``.

    Returns:
        the exit status of every rank.
    """
    folder.mkdir(exist_ok=True)
    if world > 1:
        words = [*words, f"--trainer.devices={world}", f"--trainer.strategy={way}"]
    port = free_port()
    started = [
        in_process(_one_rank, rank, world, port, words, folder, kill, wait=False)
        for rank in range(world)
    ]
    started[0].join()
    for process in started[1:]:
        process.join(0 if kill else _SECONDS_TO_FOLLOW)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def seen(folder, rank=0):
    """What a rank noted: ``batches`` as (task, entries), and ``states``, one after each task."""
    return torch.load(folder / f"seen_{rank}.pt", weights_only=True)


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]


def stand_among(rank, world, port):
    """Make this process one of several, as its environment says it under ``torchrun``."""
    from pytorch_lightning.utilities import rank_zero_only

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(world), "NODE_RANK": "0", "LOCAL_RANK": str(rank),
    }  # fmt: skip
    rank_zero_only.rank = rank  # which Lightning reads from the environment at its import


def _one_rank(rank, world, port, words, folder, kill):
    if world > 1:
        stand_among(rank, world, port)
    if kill is not None and rank == 0:
        arm(*kill)
    _note_what_is_seen(folder / f"seen_{rank}.pt")
    command(words, folder / f"output_{rank}")


def _note_what_is_seen(file):
    from mmcl.lightning.task_callback import TaskCallback

    batches, states = [], []
    batch_end, train_end = TaskCallback.on_train_batch_end, TaskCallback.on_train_end

    def note_batch(hooks, trainer, module, outputs, batch, batch_idx):
        entries = torch.stack([batch.task_ids, batch.sample_ids], 1)
        batches.append((hooks.task.index, entries))
        batch_end(hooks, trainer, module, outputs, batch, batch_idx)

    def note_state(hooks, trainer, module):
        train_end(hooks, trainer, module)
        states.append(copy.deepcopy(dict(module.trainable_state_dict())))  # of now: weights move on
        torch.save({"batches": batches, "states": states}, file)

    TaskCallback.on_train_batch_end, TaskCallback.on_train_end = note_batch, note_state


def call_on_ranks(function, folder, *args, world=WORLD):
    """Call a function of (rank, world, *args) on several processes of one group.

    Returns:
        what it returned on each rank: plain values and tensors.
    """
    folder.mkdir(exist_ok=True)
    started = [
        in_process(_call_on_rank, rank, world, function, folder, args, wait=False)
        for rank in range(world)
    ]
    for process in started:
        process.join(_SECONDS_TO_FOLLOW)
    return [torch.load(folder / f"result_{rank}.pt", weights_only=True) for rank in range(world)]


def _call_on_rank(rank, world, function, folder, args):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/door", rank=rank, world_size=world
    )
    try:
        torch.save(function(rank, world, *args), folder / f"result_{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
