"""The memory of a training step, known before anything of it is allocated.

    peak = waste · (the storages that are alive at once in forward and backward, weights and gradients among them
                    + AdamW's two moments + a chunk of the head's logits)
           + the batches that the host holds

The storages are counted on fake tensors: torch computes shapes, and nothing is allocated. So the estimate follows the
model, the ops and the dtype without a formula for each. LOG.md has estimates beside measured peaks.
"""

from __future__ import annotations

import bisect
import math
import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlm.models import Config
from fastlm.models._size import TRAINED, available, check_memory, layer_parameters, parameter_count
from fastlm.ops._chunks import chunk_rows
from fastlm.run.recipe import Recipe
from fastlm.tasks import Micro, Task, find_task

AHEAD = 3  # global batches that the host holds: one in the step, two made ahead
# On a CPU, for scratch memory and what the allocator wastes: measured peaks are 1.2 (float32) and 1.6 times the rest.
_WASTE = {"cpu": 1.2}
_ROWS = 16  # of the micro-batch that larger ones are scaled from
_LAYERS = 4  # of each kind, that are counted; more are extrapolated
# Bytes for each token, layer and column that no model here exceeds (BERT: 63). Where even this fits into half of the
# memory, nothing is counted: torch takes seconds to import its fake tensors.
_COARSE = 400
_LONG = 1e15  # FLOPs of a run, a quarter of an hour of two cores, for which it is counted all the same


class _Peak(TorchDispatchMode):
    """Adds up the storages that ops make, and keeps the largest sum, `most`."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = weakref.WeakSet()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and importing dynamo takes two seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:  # a sparse one's values are counted
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


def check_size(recipe: Recipe, device: torch.device, vocab_size: int) -> None:
    """ValueError where the model does not fit: its weights into the host's memory, and its training into `device`'s."""
    cls = find_task(recipe.task).model_class(recipe.model.model_type)
    config = replace(recipe.model, vocab_size=vocab_size, pad_token_id=None)
    if device.type != "cpu":
        check_memory(cls, config, torch.device("cpu"), 4, "weights")
    check_memory(cls, config, device, TRAINED, "weights, gradients and AdamW moments")


def check_step(task: Task, config: Config) -> str:
    """The memory of a step of `task` with a model of `config`, for the headline of a run.

    ValueError where it is more than there is, with the numbers, and the largest micro-batch that fits.
    """
    recipe, device = task.recipe, task.device
    there, host = available(device), available(torch.device("cpu"))
    if there is None or host is None:
        return f"n/a, the free memory of {device} is not known"
    coarse = _coarse(task, config, recipe.micro_batch_tokens)
    if coarse < min(there, host) / 2 and _flops(task, config) < _LONG:
        return f"less than {_gigabytes(coarse)} of the {_gigabytes(there)} that are free on {device}"
    step = _Step(task, config)
    waiting = AHEAD * step.batch_bytes(recipe.batch_rows)
    if waiting > host:
        raise ValueError(
            f"{recipe.train.batch_key}: expected a global batch that fits into memory, got {recipe.batch_tokens}: the "
            f"{AHEAD} batches that wait on the host take {waiting / 1e9:,.1f} GB of the {host / 1e9:,.1f} GB that are "
            "free; choose a smaller one"
        )
    if device.type == "cpu":
        there -= waiting
    need = step.peak(recipe.micro_rows)
    if need <= there:
        return f"about {_gigabytes(need)} of the {_gigabytes(there)} that are free on {device}"
    sizes = [n for n in range(1, recipe.batch_rows + 1) if recipe.batch_rows % n == 0]
    fits = bisect.bisect_right(sizes, there, key=step.peak)  # so many of them fit
    if fits:
        setting = recipe.train.micro_setting(sizes[fits - 1], recipe.data.row_tokens)
        remedy = f"set {setting}, which trains the same"
    else:
        remedy = f"choose a smaller model, or a machine with more memory: one row takes {step.peak(1) / 1e9:,.1f} GB"
    raise ValueError(
        f"{recipe.train.micro_key}: expected a step that fits into the memory of {device}, got "
        f"{recipe.micro_batch_tokens} tokens in one forward, which take about {need / 1e9:,.1f} GB of the "
        f"{max(0, there) / 1e9:,.1f} GB that are free; {remedy}"
    )


def fitting(task: Task, config: Config, sizes: list[int]) -> list[int]:
    """Those of `sizes`, rows of a micro-batch in rising order, with which a step fits into memory.

    The first is among them in any case: check_step says what is wrong where that one does not fit.
    """
    device, row = task.device, task.recipe.data.row_tokens
    there, host = available(device), available(torch.device("cpu"))
    if there is None or host is None or _coarse(task, config, sizes[-1] * row) < min(there, host) / 2:
        return sizes
    step = _Step(task, config)
    if device.type == "cpu":
        there -= AHEAD * step.batch_bytes(task.recipe.batch_rows)
    return sizes[: max(1, bisect.bisect_right(sizes, there, key=step.peak))]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def _flops(task: Task, config: Config) -> float:
    """Of a whole run, by its parameters: 6 a token and parameter."""
    recipe, parameters = task.recipe, parameter_count(task.model_class(config.model_type), config)
    return 6.0 * recipe.train.max_steps * recipe.batch_tokens * parameters


def _coarse(task: Task, config: Config, tokens: int) -> float:
    """Bytes that are more than a step takes with `tokens` in a forward."""
    recipe, cls = task.recipe, task.model_class(config.model_type)
    width = math.sqrt(layer_parameters(cls, config) / 12)
    depth = sum(getattr(config, name) for name in config.depths)
    layers = tokens * depth * width * _COARSE
    head = 4 * config.vocab_size * 1024
    return TRAINED * parameter_count(cls, config) + layers + head + _COARSE * recipe.batch_tokens


class _Step:
    """The memory of a step, by the rows of its micro-batch."""

    def __init__(self, task: Task, config: Config):
        self.task, self.config = task, config
        self.cls = task.model_class(config.model_type)
        self.dtype = getattr(torch, task.recipe.train.dtype)
        rows = min(_ROWS, task.recipe.batch_rows)
        self.few, self.many = self._micro(max(1, rows // 2)), self._micro(rows)

    def _micro(self, rows: int) -> tuple[int, Micro]:
        recipe = self.task.recipe
        small = recipe.with_values(recipe.train.sizes(rows, recipe.data.row_tokens))
        return rows, type(self.task)(small, self.task.dataset, self.task.device).largest()

    def _scaled(self, few: int, many: int, rows: int) -> int:
        """What is `few` for self.few's rows and `many` for self.many's, for `rows` rows."""
        apart = self.many[0] - self.few[0]
        return many if not apart else max(1, many + (many - few) * (rows - self.many[0]) // apart)

    def batch_bytes(self, rows: int) -> int:
        """Of the inputs of micro-batches of `rows` rows together."""
        few, many = (
            sum(x.untyped_storage().nbytes() for x in micro.inputs.values() if isinstance(x, torch.Tensor))
            for _, micro in (self.few, self.many)
        )
        return self._scaled(few, many, rows)

    def peak(self, rows: int) -> int:
        """Bytes of a step on the device with micro-batches of `rows` rows."""
        depths = {name: min(_LAYERS, getattr(self.config, name)) for name in self.config.depths}
        most = shallow = self._peak(rows, depths)
        for name, depth in depths.items():
            if getattr(self.config, name) > depth:
                layer = shallow - self._peak(rows, {**depths, name: depth - 1})
                most += layer * (getattr(self.config, name) - depth)
        predicted = self._scaled(self.few[1].counts.predicted, self.many[1].counts.predicted, rows)
        chunk = chunk_rows(predicted, self.dtype, self.task.device.type) * self.config.vocab_size * self.dtype.itemsize
        waste = _WASTE.get(self.task.device.type, 1.0)
        return int(waste * (most + 8 * parameter_count(self.cls, self.config) + chunk))

    def _peak(self, rows: int, depths: dict[str, int]) -> int:
        """Of weights, activations and gradients, with that many layers."""
        from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

        device = self.task.device

        def fake(few, many):
            if not isinstance(many, torch.Tensor):
                return many
            shape = [self._scaled(a, b, rows) for a, b in zip(few.shape, many.shape)]
            return torch.empty(shape, dtype=many.dtype, device=device)

        with FakeTensorMode(), _Peak() as peak:
            model = self.cls(replace(self.config, **depths), device=device).train()
            inputs = {name: fake(self.few[1].inputs[name], x) for name, x in self.many[1].inputs.items()}
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = model(**inputs)
            loss.backward()
        return peak.most
