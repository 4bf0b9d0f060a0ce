"""The contenders of a training step.

    fastlm                         fastlm's model and step, packed, allocator tuned
    fastlm float32                 the same in float32: what a step in bfloat16 gains; its bound is bfloat16's too
    transformers                   the model with its head, AdamW, clipping and allocator as shipped
    transformers sdpa              SDPA named, fused AdamW, allocator tuned
    transformers compiled          the same under torch.compile
    transformers tuned             as an expert writes it: also BERT's head on the masked tokens only
    transformers tuned compiled    the expert's under torch.compile
    transformers pure              the expert's with weights, gradients and moments in the step's dtype, no autocast
    transformers pure compiled     the same under torch.compile
    transformers packed            the expert's with several texts in a row, kept apart by a mask: where rows are padded
    transformers patched           fastlm.patch(model), fused AdamW, allocator tuned

Transformers' are in peers/transformers.py. Any other name is "module:name", a Contender elsewhere.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import torch

from fastlm import models
from fastlm.bench import ceilings
from fastlm.bench.job import Contender, Job, Loss, Step, predicted_tokens, real_tokens, refuse_float32
from fastlm.bench.peers import STEPS
from fastlm.bench.steps import Batch
from fastlm.tasks import Micro, TrainTable
from fastlm.train.optimizer import make_optimizer, train_step

MATMUL = "matmul"  # a step that is one large matrix product: the rate of the bound


def _pack(name: str, rows: torch.Tensor, lengths: torch.Tensor, prefix: str = "") -> dict:
    """The first lengths (rows,) of rows (rows, length), each a sequence, as packed arguments of a model."""
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    real = rows[real_tokens(rows, lengths)]
    return {name: real, f"{prefix}cu_seqlens": offsets, f"{prefix}max_seqlen": int(lengths.max())}


def _micro(cls, table, input_ids, labels, lengths) -> Micro:
    """A batch as the arguments of `cls`, one of fastlm.models, at step 0."""
    device, real = input_ids.device, real_tokens(input_ids, lengths)
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
        index = predicted_tokens(labels[real])
        inputs["index"], inputs["targets"], predicted = index, labels[real][index], len(index)
    return Micro({**inputs, "reduction": "sum"}, counts=models.Counts(predicted=predicted))


def _load_fastlm(job: Job):
    return job.cls.from_pretrained(job.weights).to(job.device)


def fastlm_step(
    model, table: TrainTable, batches: list[Batch], optimizer: torch.optim.Optimizer | None = None
) -> tuple[Loss, Step]:
    """Contender.prepare for a model of fastlm; by default with an optimizer of its own."""
    device, dtype = next(model.parameters()).device, getattr(torch, table.dtype)
    micros = [_micro(type(model), table, *batch) for batch in batches]
    optimizer = optimizer or make_optimizer(model, table)
    model.train()

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


def _prepare_float32(job: Job, model) -> tuple[Loss, Step]:
    refuse_float32(job)
    return fastlm_step(model, replace(job.table, dtype="float32"), job.batches)


def _prepare_matmul(job: Job, model) -> tuple[Loss, Step]:
    product = ceilings.matmul(job.device, getattr(torch, job.table.dtype))
    return lambda: math.nan, lambda number: product()


FASTLM = Contender(_load_fastlm, lambda job, model: fastlm_step(model, job.table, job.batches))
CONTENDERS: dict[str, Contender] = {
    "fastlm": FASTLM,
    "fastlm float32": Contender(_load_fastlm, _prepare_float32),
    **STEPS,
}


def find(name: str) -> Contender:
    if name == MATMUL:
        return Contender(lambda job: None, _prepare_matmul)
    if name in CONTENDERS:
        return CONTENDERS[name]
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
