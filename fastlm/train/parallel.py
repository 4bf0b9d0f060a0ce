"""Several processes, as `torchrun` starts them: who takes which micro-batch, gradients, and ranks that die or hang.

A step's M micro-batches are divided among the ranks in order, so that rank r of W takes the micro-batches r·M/W to
(r+1)·M/W. What is trained on, masks and dropout depend on (seed, step, m) alone: the world size changes none of it.

Gradients are averaged over the ranks by torch (DistributedDataParallel, or fully_shard where train.shard is set). The
optimizer then divides by the predicted tokens of all ranks together: once, after summing.

Every rank counts up a number in torchrun's store every few seconds, from a thread: a long evaluation, checkpoint or
compilation does not stop it. A rank whose number stands still is dead or hangs, and the others end with its name.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

_BEAT = 2.0  # seconds between heartbeats
_SILENT = 30.0  # seconds without one, after which a rank counts as lost


# What gloo, which raises bare RuntimeErrors, says of a connection that is gone.
_COLLECTIVE = re.compile("gloo|[Cc]onnection (closed|reset)|Broken pipe")


class LostRank(RuntimeError):
    """Another process of the run has ended, or does not answer."""


class World:
    """The processes of a run. One process alone is a world of size 1, without torch.distributed.

    rank, size   this process's number, and how many there are
    device       this process's
    """

    _runs = itertools.count()

    def __init__(self, rank: int, size: int, device: torch.device, store=None):
        self.rank, self.size, self.device, self._store = rank, size, device, store
        self._prefix = f"fastlm/{next(self._runs)}"  # one process may train several models, one after another

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def micros(self, count: int, setting: str = "train.micro_batch_tokens") -> range:
        """This rank's micro-batches of the `count` of a step. ValueError where the ranks do not divide them.

        setting: the key of the recipe that decides `count`, for the message
        """
        if count % self.size:
            raise ValueError(
                f"{setting}: expected so few that {self.size} processes divide the micro-batches of a "
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

    def tensor(self, numbers: list[float]) -> torch.Tensor:
        """float64 on the device, which the host does not wait for."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def arrive(self, place: str, wait: bool) -> None:
        """Say that this process has come to `place`; `wait`: until all have. From any thread."""
        if self.size == 1:
            return
        store = self._store.clone()
        count = store.add(f"{self._prefix}/at/{place}", 1)
        while wait and count < self.size:
            time.sleep(0.05)
            count = store.add(f"{self._prefix}/at/{place}", 0)

    def agree(self, values: dict[str, object], remedy: str) -> None:
        """ValueError in every process where one of `values` is not the same in all of them."""
        if self.size == 1:
            return
        mine = json.dumps(values)
        self._store.set(f"{self._prefix}/agree/{self.rank}", mine)
        first = json.loads(self._store.get(f"{self._prefix}/agree/0"))
        for rank in range(1, self.size):
            its = json.loads(self._store.get(f"{self._prefix}/agree/{rank}"))
            for what, value in its.items():
                if value != first[what]:
                    raise ValueError(f"{what}: rank {rank} has {value}, rank 0 has {first[what]}; {remedy}")

    def share(self, what: str, choose: Callable[[], object]) -> object:
        """What choose() returns on rank 0, of JSON's types, in every process; the others wait for it."""
        if self.size == 1:
            return choose()
        name = f"{self._prefix}/share/{what}"
        if self.main:
            self._store.set(name, json.dumps(choose()))
        while not self._store.check([name]):
            time.sleep(0.05)
        return json.loads(self._store.get(name))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs on rank 0 first, however long that takes, then on the others."""
        while not self.main and not self._store.check([f"{self._prefix}/main-first"]):
            time.sleep(0.05)
        yield
        if self.main and self._store is not None:
            self._store.set(f"{self._prefix}/main-first", "1")
        self.barrier()


ALONE = World(0, 1, torch.device("cpu"))


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


class Shards:
    """This process's rows of the parameters of a sharded model, as plain parameters for an optimizer.

    They share memory with the model's. Every parameter is divided along its first dimension as torch.chunk does.
    """

    def __init__(self, model: nn.Module, world: World):
        self.world = world
        self._local = {p: nn.Parameter(p.to_local(), requires_grad=p.requires_grad) for p in model.parameters()}
        self._whole = {local: p for p, local in self._local.items()}

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._local[parameter]

    def take_gradients(self) -> None:
        """The optimizer's parameters get this process's part of the gradients."""
        for p, local in self._local.items():
            local.grad = None if p.grad is None else p.grad.to_local()

    def rows(self, local: torch.Tensor) -> int:
        """Rows of the whole tensor."""
        return self._whole[local].shape[0]

    def whole(self, tensor: torch.Tensor, local: nn.Parameter) -> torch.Tensor:
        """The whole of what every process has a part of, divided as the parameter `local` is."""
        from torch.distributed.tensor import DTensor  # a second to import

        p = self._whole[local]
        parts = DTensor.from_local(
            tensor, p.device_mesh, p.placements, shape=p.shape, stride=p.stride(), run_check=False
        )
        return parts.full_tensor()

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's rows."""
        parts = whole.chunk(self.world.size)
        return parts[self.world.rank] if self.world.rank < len(parts) else whole[:0]

    @torch.no_grad()
    def gather(self, model: nn.Module) -> nn.Module:
        """On rank 0 a model like the sharded `model` with whole weights, on the CPU; elsewhere `model`.

        Every process must call it.
        """
        whole = type(model)(model.config) if self.world.main else None
        for name, p in model.named_parameters():
            tensor = p.full_tensor()
            if whole is not None:
                whole.get_parameter(name).copy_(tensor)
        return model if whole is None else whole

    def norm(self, tensor: torch.Tensor) -> torch.Tensor:
        """The 2-norm of a whole tensor, of which this is a part."""
        return self.world.sum(tensor.square().sum()).sqrt()

    def total_norm(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """The 2-norm of all whole tensors together."""
        return self.world.sum(torch.stack([tensor.square().sum() for tensor in tensors]).sum()).sqrt()


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
        self._thread: threading.Thread | None = None  # with one process none: it would hold the run until the next gc

    def __enter__(self) -> Heartbeat:
        if self.world.size > 1:
            self.world._store.set(
                f"{self.world._prefix}/host/{self.world.rank}", f"{socket.gethostname()}, process {os.getpid()}"
            )
            self._thread = threading.Thread(target=self._run, name="fastlm-heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None  # it refers to this object, and this one to the run and its data

    def _run(self) -> None:
        store = self.world._store.clone()  # a connection of its own: another thread may wait on the first
        seen = {rank: (-1, self.clock()) for rank in range(self.world.size) if rank != self.world.rank}
        while not self._stop.wait(self.beat):
            try:
                store.add(f"{self.world._prefix}/beat/{self.world.rank}", 1)
                for rank, (count, since) in seen.items():
                    now = store.add(f"{self.world._prefix}/beat/{rank}", 0)
                    if now != count:
                        seen[rank] = now, self.clock()
                    elif self.clock() - since > self.silent:
                        self.lost(
                            f"{self._name(store, rank)} has not answered for {self.silent:.0f} s; {self.advice()}"
                        )
                        return
            except (RuntimeError, dist.DistError) as error:  # the store is gone, and with it the process that held it
                if not self._stop.is_set():
                    self.lost(f"the process that holds torchrun's store does not answer ({error}); {self.advice()}")
                return

    def _name(self, store, rank: int) -> str:
        key = f"{self.world._prefix}/host/{rank}"
        return f"rank {rank} ({store.get(key).decode()})" if store.check([key]) else f"rank {rank}"

    def explain(self, error: RuntimeError) -> RuntimeError:
        """What a failed collective means, with the name of the rank that is gone where the store says so.

        `error` itself where it is none.
        """
        if self.world.size == 1 or not (isinstance(error, dist.DistError) or _COLLECTIVE.search(str(error))):
            return error
        store, silent = self.world._store.clone(), []
        before = {rank: store.add(f"{self.world._prefix}/beat/{rank}", 0) for rank in range(self.world.size)}
        time.sleep(2 * self.beat)
        for rank, count in before.items():
            if rank != self.world.rank and store.add(f"{self.world._prefix}/beat/{rank}", 0) == count:
                silent.append(self._name(store, rank))
        who = " and ".join(silent) or "another rank"
        return LostRank(f"{who} has ended ({error}); {self.advice()}")


def _end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
