"""Training loops that take turns: a block of steps each, in one process, one at a time.

A shared machine is slow for a second and fast for the next, so two runs one after the other cannot
be compared to a few per cent. Here every loop has a thread and waits in its data loader while the
others run their block; the blocks of one turn lie within milliseconds and are compared pairwise.
"""

import gc
import threading
import time
import warnings
from dataclasses import dataclass

import torch


@dataclass
class Timing:
    """Microseconds a step, one entry for each timed block."""

    wall: torch.Tensor
    cpu: torch.Tensor


class Relay:
    """Run loops in turn.

    Args:
        batches: are given to every loop, over and over.
        block: steps of a turn.
        blocks: timed turns.
        warm: turns before them.
    """

    def __init__(self, batches, *, block, blocks, warm=1):
        self.batches, self.block, self.warm = batches, block, warm
        self.steps = block * (warm + blocks) + 1  # of the last turn only the start is seen
        self._failure = None

    def run(self, loops):
        """Run the loops, in this order in every turn.

        Args:
            loops: name -> function of a loader; it trains on all of it and returns.

        Returns:
            name -> Timing.
        """
        legs = {name: Leg(self) for name in loops}
        order = list(legs.values())
        for leg, following in zip(order, order[1:] + order[:1], strict=True):
            leg.following = following
        threads = [
            threading.Thread(target=self._run, args=(loops[name], legs[name])) for name in loops
        ]
        gc.collect()
        gc.disable()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # filters are not safe to change in threads
                for thread in threads:
                    thread.start()
                order[0].turn.release()
                for thread in threads:
                    thread.join()
        finally:
            gc.enable()
        if self._failure is not None:
            raise self._failure
        return {name: leg.timing(self.warm) for name, leg in legs.items()}

    def _run(self, loop, leg):
        torch.set_num_threads(1)  # counts for the thread that asks
        leg.turn.acquire()
        try:
            if self._failure is None:
                loop(leg)
        except BaseException as failure:
            self._failure = self._failure or failure
        leg.following.turn.release()


class Leg:
    """The loader of one loop; between blocks it lets the others run."""

    def __init__(self, relay):
        self.relay = relay
        self.turn = threading.Semaphore(0)
        self.following = self
        self._stamps = []

    def __len__(self):
        return self.relay.steps

    def __iter__(self):
        relay = self.relay
        for place in range(relay.steps):
            if place % relay.block == 0:
                stop = (time.perf_counter(), time.process_time())
                self.following.turn.release()
                self.turn.acquire()
                if relay._failure is not None:
                    raise RuntimeError("another loop of the relay failed")
                self._stamps.append((stop, (time.perf_counter(), time.process_time())))
            yield relay.batches[place % len(relay.batches)]

    def timing(self, warm):
        """Return what the blocks after the warm ones took."""
        spans = torch.tensor(
            [
                [stop - start for stop, start in zip(after[0], before[1], strict=True)]
                for before, after in zip(self._stamps, self._stamps[1:], strict=False)
            ],
            dtype=torch.float64,
        )[warm:]
        micro = 1e6 * spans / self.relay.block
        return Timing(micro[:, 0], micro[:, 1])
