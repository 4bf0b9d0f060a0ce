"""Several processes, as `torchrun` starts them: who takes which micro-batch, gradients, and ranks that die or hang.

A step's M micro-batches are divided among the ranks in order, so that rank r of W takes the micro-batches r·M/W to
(r+1)·M/W. What is trained on, masks and dropout depend on (seed, step, m) alone: the world size changes none of it.

Gradients are averaged over the ranks by torch (DistributedDataParallel, or fully_shard where train.shard is set). The
optimizer then divides by the predicted tokens of all ranks together: once, after summing.

Every rank counts up a number in torchrun's store every few seconds, from a thread: a long evaluation, checkpoint or
compilation does not stop it. A rank whose number stands still is dead or hangs, and the others end with its name.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

_BEAT = 2.0  # seconds between heartbeats
_SILENT = 30.0  # seconds without one, after which a rank counts as lost
_WAIT = datetime.timedelta(days=7)  # for rank 0 to prepare data; a rank that dies meanwhile is seen by torchrun


class LostRank(RuntimeError):
    """Another process of the run has ended, or does not answer."""


class World:
    """The processes of a run. One process alone is a world of size 1, without torch.distributed.

    rank, size   this process's number, and how many there are
    device       this process's
    """

    def __init__(self, rank: int, size: int, device: torch.device, store=None):
        self.rank, self.size, self.device, self._store = rank, size, device, store

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def micros(self, count: int) -> range:
        """This rank's micro-batches of the `count` of a step. ValueError where the ranks do not divide them."""
        if count % self.size:
            raise ValueError(
                f"train.micro_batch_tokens: expected so few that {self.size} processes divide the micro-batches of a "
                f"step, got {count} of them; halve it until they do, or start another number of processes"
            )
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def wrap(self, model: nn.Module, shard: bool) -> nn.Module:
        """The module to call in training, whose gradients are averaged over the ranks."""
        if self.size == 1:
            return model
        if shard:
            return _shard(model)
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs on rank 0 first, however long that takes, then on the others."""
        if not self.main:
            self._store.wait(["fastlm/main-first"], _WAIT)
        yield
        if self.main and self._store is not None:
            self._store.set("fastlm/main-first", "1")
        self.barrier()


def connect(device: torch.device) -> World:
    """The world that torchrun's environment says; of one process where there is none.

    With several, "cuda" becomes the device of this process's LOCAL_RANK.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ or size == 1:
        return World(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        options = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    return World(dist.get_rank(), size, device, dist.distributed_c10d._get_default_store())


def _shard(model: nn.Module) -> nn.Module:
    """fully_shard (FSDP2): each layer is a group, and the rest one: the word table and the head that it is tied to."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer)
    return fully_shard(model)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; a whole one as it is."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def sync_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward averages gradients over the ranks: only a step's last one need do so."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(on)


class Heartbeat:
    """A context manager: this rank's heartbeat, and the watch on the others'.

    lost     called with a message, in a thread, when a rank is silent; by default it is printed and the process ended
    """

    def __init__(
        self,
        world: World,
        advice: Callable[[], str],
        lost: Callable[[str], None] | None = None,
        beat: float = _BEAT,
        silent: float = _SILENT,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.world, self.advice, self.lost = world, advice, lost or _end
        self.beat, self.silent, self.clock = beat, silent, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastlm-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self.world.size > 1:
            self.world._store.set(f"fastlm/host/{self.world.rank}", f"{socket.gethostname()}, process {os.getpid()}")
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        store = self.world._store.clone()  # a connection of its own: another thread may wait on the first
        seen = {rank: (-1, self.clock()) for rank in range(self.world.size) if rank != self.world.rank}
        while not self._stop.wait(self.beat):
            try:
                store.add(f"fastlm/beat/{self.world.rank}", 1)
                for rank, (count, since) in seen.items():
                    now = store.add(f"fastlm/beat/{rank}", 0)
                    if now != count:
                        seen[rank] = now, self.clock()
                    elif self.clock() - since > self.silent:
                        self.lost(f"{self._name(store, rank)} has not answered for {self.silent:.0f} s; {self.advice()}")
                        return
            except (RuntimeError, dist.DistError) as error:  # the store is gone, and with it the process that held it
                if not self._stop.is_set():
                    self.lost(f"the process that holds torchrun's store does not answer ({error}); {self.advice()}")
                return

    def _name(self, store, rank: int) -> str:
        where = f" ({store.get(f'fastlm/host/{rank}').decode()})" if store.check([f"fastlm/host/{rank}"]) else ""
        return f"rank {rank}{where}"

    def explain(self, error: Exception) -> LostRank:
        """What a failed collective means, with the name of the rank that is gone where the store says so."""
        store, silent = self.world._store.clone(), []
        before = {rank: store.add(f"fastlm/beat/{rank}", 0) for rank in range(self.world.size)}
        time.sleep(2 * self.beat)
        for rank, count in before.items():
            if rank != self.world.rank and store.add(f"fastlm/beat/{rank}", 0) == count:
                silent.append(self._name(store, rank))
        who = " and ".join(silent) or "another rank"
        return LostRank(f"{who} has ended ({error}); {self.advice()}")


def _end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
