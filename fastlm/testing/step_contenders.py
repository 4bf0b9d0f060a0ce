"""Who takes part in a comparison of training steps, and the process that each runs in.

    fastlm                         fastlm's model and step, packed, allocator tuned
    transformers                   the model with its head, AdamW and clipping as they come, allocator too
    transformers sdpa              SDPA named, fused AdamW, allocator tuned
    transformers compiled          the same under torch.compile
    transformers tuned             as an expert writes it: also BERT's head on the masked tokens only
    transformers tuned compiled    the expert's under torch.compile
    transformers packed            the expert's with several texts in a row, kept apart by a mask: where rows are padded
    transformers patched           fastlm.patch(model), fused AdamW, allocator tuned

Masks are made beforehand: the others get theirs for nothing, and the packing too. A padded batch comes with its
attention_mask, a full one without. Packed is what torch alone can do: a block-diagonal mask to SDPA; the kernels of
flash_attn, which take offsets, are another package's.

Any other name is "module:name", a Contender that lies elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

import fastlm
from fastlm import _malloc, models, ops
from fastlm.tasks import Micro, TrainTable
from fastlm.testing.steps import BATCHES, Batch, is_padded
from fastlm.train.optimizer import make_optimizer, train_step

MATMUL = "matmul"  # the worker of the bound
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns
TENSORS = "input_ids", "labels", "lengths"


class NotRun(Exception):
    """Why a contender has no part in a step."""


@dataclass(frozen=True)
class Job:
    """cls: of fastlm.models; table: the optimizer's, dtype's; weights: a directory that both sides read."""

    cls: type
    table: TrainTable
    weights: Path
    batches: list[Batch]
    device: torch.device

    def autocast(self):
        dtype = getattr(torch, self.table.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)


Loss = Callable[[], float]
Step = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """load: the model on its device; prepare: (the loss of batch 0 without dropout, what does training step `number`).

    Steps count from 0 and take the batches in turn.

    What `load` leaves in memory is not the step's; everything later is. tuned: the allocator.
    """

    load: Callable[[Job], torch.nn.Module]
    prepare: Callable[[Job, torch.nn.Module], tuple[Loss, Step]]
    tuned: bool = True


# ---- fastlm's


def _pack(name: str, rows: torch.Tensor, lengths: torch.Tensor, prefix: str = "") -> dict:
    """The first lengths (rows,) of rows (rows, length), each a sequence, as packed arguments of a model."""
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        name: rows[_real(rows, lengths)], f"{prefix}cu_seqlens": offsets, f"{prefix}max_seqlen": int(lengths.max())
    }  # fmt: skip


def _real(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(rows, length), bool."""
    return torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]


def _micro(cls, table, input_ids, labels, lengths) -> Micro:
    """A batch as `cls`, one of fastlm.models, takes it, of step 0."""
    device, real = input_ids.device, _real(input_ids, lengths)
    inputs = {**_pack("input_ids", input_ids, lengths), "rng": torch.tensor([table.seed, 0], device=device)}
    predicted = labels.numel()
    if cls is models.T5:
        inputs |= _pack("labels", labels, torch.full_like(lengths, labels.shape[1]), "decoder_")
    else:
        inputs["positions"] = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)[real]
    if cls is models.GPT2:
        inputs["labels"] = labels[real]
        predicted = len(inputs["labels"]) - len(labels)
    if cls is models.Bert:
        index = _predicted(labels[real])
        inputs["index"], inputs["targets"], predicted = index, labels[real][index], len(index)
    return Micro({**inputs, "reduction": "sum"}, counts=models.Counts(predicted=predicted))


def _predicted(labels: torch.Tensor) -> torch.Tensor:
    return labels.flatten().ne(ops.IGNORE_INDEX).nonzero().flatten()


def _load_fastlm(job: Job):
    return job.cls.from_pretrained(job.weights).to(job.device)


def fastlm_step(model, table: TrainTable, batches: list[Batch]) -> tuple[Loss, Step]:
    """As Contender.prepare, of a model of ours."""
    device, dtype = next(model.parameters()).device, getattr(torch, table.dtype)
    micros = [_micro(type(model), table, *batch) for batch in batches]
    optimizer = make_optimizer(model.train(), table)

    def loss():
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            total = model.eval()(**micros[0].inputs).item()
        model.train()
        return total / micros[0].counts.predicted

    def step(number):
        micro = micros[number % len(micros)]
        micro.inputs["rng"][1].fill_(number)  # other dropout when the batch comes round again
        arguments = {"lr": table.lr, "grad_clip": table.grad_clip, "dtype": dtype}
        return train_step(model, optimizer, [micro], **arguments)[0]

    return loss, step


# ---- Transformers'


@dataclass(frozen=True)
class _Form:
    """How Transformers' model is trained. tuned: the allocator; sparse: the head runs on the masked tokens only."""

    attention: str | None = None  # None: what it takes by itself
    fused: bool = True
    tuned: bool = True
    sparse: bool = False
    compiled: bool = False
    packed: bool = False
    patched: bool = False


_FORMS = {
    "transformers": _Form(fused=False, tuned=False),
    "transformers sdpa": _Form("sdpa"),
    "transformers compiled": _Form("sdpa", compiled=True),
    "transformers tuned": _Form("sdpa", sparse=True),
    "transformers tuned compiled": _Form("sdpa", sparse=True, compiled=True),
    "transformers packed": _Form("sdpa", sparse=True, packed=True),
    "transformers patched": _Form(patched=True),
}


def _load_transformers(form: _Form, job: Job):
    import transformers

    load = getattr(transformers, job.cls.architecture).from_pretrained
    model = load(job.weights, attn_implementation=form.attention) if form.attention else load(job.weights)
    if form.patched:
        fastlm.patch(model)
    return model.to(job.device)


def _padded(input_ids, labels, lengths) -> dict:
    """A batch as a collator makes it."""
    mask = {"attention_mask": _real(input_ids, lengths).long()} if is_padded(input_ids, lengths) else {}
    return {"input_ids": input_ids, "labels": labels, **mask}


def _packed(input_ids, labels, lengths) -> dict:
    """The same texts, each into the first row with room for it, the longest first; no row is longer than before."""
    width, room, places = input_ids.shape[1], [], []
    for text in lengths.argsort(descending=True, stable=True).tolist():
        length = int(lengths[text])
        row = next((row for row, left in enumerate(room) if left >= length), len(room))
        room += [width] * (row == len(room))
        places.append((text, row, width - room[row], length))
        room[row] -= length
    shape, device = (len(room), width), input_ids.device
    out_ids, positions, owner = (torch.zeros(shape, dtype=torch.long, device=device) for _ in range(3))
    out_labels = torch.full(shape, ops.IGNORE_INDEX, device=device)
    for text, row, start, length in places:
        span = slice(start, start + length)
        out_ids[row, span], out_labels[row, span] = input_ids[text, :length], labels[text, :length]
        positions[row, span], owner[row, span] = torch.arange(length, device=device), text + 1
    mask = owner[:, None, :, None] == owner[:, None, None, :]  # (rows, 1, width, width); padding sees padding
    return {"input_ids": out_ids, "labels": out_labels, "position_ids": positions, "attention_mask": mask}


def _prepare_transformers(form: _Form, job: Job, model) -> tuple[Loss, Step]:
    if form.packed and not any(is_padded(ids, lengths) for ids, _, lengths in job.batches):
        raise NotRun("no row is padded: there is nothing to pack")
    table = job.table
    settings = {"lr": table.lr, "weight_decay": table.weight_decay, "betas": (table.beta1, table.beta2)}
    optimizer = torch.optim.AdamW(model.parameters(), eps=table.eps, fused=True if form.fused else None, **settings)
    model.train()  # as fastlm_step has it; loaded, it is in evaluation
    batches = [(_packed if form.packed else _padded)(*batch) for batch in job.batches]
    indexes = [_predicted(batch["labels"]) for batch in batches]
    targets = [batch["labels"].flatten()[index] for batch, index in zip(batches, indexes)]
    if form.compiled:  # one number of predicted tokens for all batches
        longest = max(map(len, indexes))
        indexes = [torch.nn.functional.pad(index, (0, longest - len(index))) for index in indexes]
        targets = [
            torch.nn.functional.pad(target, (0, longest - len(target)), value=ops.IGNORE_INDEX) for target in targets
        ]

    def dense_loss(batch, index, target):
        return model(**batch).loss

    def sparse_loss(batch, index, target):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = model.bert(**inputs).last_hidden_state.flatten(0, 1)[index]
        return torch.nn.functional.cross_entropy(model.cls(hidden).float(), target)

    loss_of = sparse_loss if form.sparse and job.cls is models.Bert else dense_loss
    if form.compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def forward(number):
        with job.autocast():
            return loss_of(batches[number], indexes[number], targets[number])

    def loss():
        with torch.no_grad():
            model.eval()
            value = forward(0).item()
            model.train()
        return value

    def step(number):
        loss = forward(number % len(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), table.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return loss, step


# ---- the bound's


def _prepare_matmul(job: Job, model) -> tuple[Loss, Step]:
    """A step that is one large matrix product."""
    size = MATMUL_SIZE[job.device.type]
    a, b = torch.randn(2, size, size, device=job.device, dtype=getattr(torch, job.table.dtype))
    out = torch.empty_like(a)
    return lambda: math.nan, lambda number: torch.matmul(a, b, out=out)


FASTLM = Contender(_load_fastlm, lambda job, model: fastlm_step(model, job.table, job.batches))
CONTENDERS: dict[str, Contender] = {
    "fastlm": FASTLM,
    **{
        name: Contender(partial(_load_transformers, form), partial(_prepare_transformers, form), form.tuned)
        for name, form in _FORMS.items()
    },
}


def _find(name: str) -> Contender:
    if name == MATMUL:
        return Contender(lambda job: None, _prepare_matmul)
    if name in CONTENDERS:
        return CONTENDERS[name]
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


# ---- the process


def work(name: str, directory: Path) -> None:
    """Answers {"loss"} at once, then every line of stdin, "time N" or "losses N", after N steps.

    "time" takes one step more, before its clock. {"missing"} or {"failed"}, with why, is the last answer of one that
    cannot run, or not any longer.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        _serve(name, directory, answer)
    except ModuleNotFoundError as error:
        answer(missing=f"{error.name} is not installed")
    except NotRun as reason:
        answer(missing=str(reason))
    except Exception as error:  # whatever it is, this one is named and the others run
        traceback.print_exc()
        answer(failed=f"{type(error).__name__}: {error}".partition("\n")[0])


def _serve(name: str, directory: Path, answer: Callable[..., None]) -> None:
    contender = _find(name)
    if contender.tuned:
        _malloc.tune()
    spec = json.loads((directory / "spec.json").read_text())
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    device = torch.device(spec["device"])
    tensors = {key: value.to(device) for key, value in load_file(directory / "batches.safetensors").items()}
    batches = [tuple(tensors[f"{key}.{i}"] for key in TENSORS) for i in range(BATCHES)]
    job = Job(getattr(models, spec["model"]), TrainTable(**spec["train"]), directory / "weights", batches, device)
    model = contender.load(job)
    before = _memory_mb(device)
    first_loss, step = contender.prepare(job, model)
    answer(loss=first_loss())
    done = 0
    for line in sys.stdin:
        what, steps = line.split()
        losses = []
        if what == "time":
            # Caches and TLBs hold what the other processes ran, and on CUDA memory was given back for them.
            step(done)
            done += 1
        _wait(device)
        began = time.perf_counter()
        for _ in range(int(steps)):
            loss = step(done)
            if what == "losses":
                losses.append(float(loss))
            done += 1
        _wait(device)
        seconds = time.perf_counter() - began
        if what == "losses":
            answer(losses=losses)
        else:
            peak = _peak_mb(device)
            answer(seconds=seconds / int(steps), peak_mb=peak, step_mb=peak - before)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not getrusage's maximum where there is another: that one starts with the memory of the process that started us.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, kilobytes here


def _memory_mb(device: torch.device) -> float:
    """What is in use now, where _peak_mb says the most so far; elsewhere than on Linux, the most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return _peak_mb(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # a tuned allocator keeps what loading freed, and the step would use it
    return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    from fastlm.testing import step_contenders  # one NotRun and one Contender, also for a module that imports them

    step_contenders.work(sys.argv[1], Path(sys.argv[2]))
