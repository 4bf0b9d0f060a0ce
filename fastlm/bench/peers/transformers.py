"""Transformers: its collator beside mlm_mask, and its training step in nine forms.

Masks are made beforehand, so Transformers' steps get them for free, and so is the packing. A padded batch comes with
its attention_mask, a full one without. "transformers packed" is what torch alone can do: SDPA with a block-diagonal
mask. flash_attn's kernels, which take offsets, are another package.
"""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch

import fastlm
from fastlm import models
from fastlm.bench.job import Contender, Job, Loss, NotRun, Step, predicted_tokens, real_tokens, refuse_float32
from fastlm.bench.peers._peer import Peer, refuse
from fastlm.bench.steps import is_padded
from fastlm.ops import IGNORE_INDEX

# ---- mlm_mask


@functools.cache
def _collator(vocab_size, special_ids, mask_token_id, mlm_probability):
    """With a tokenizer that knows the ids."""
    transformers, tokenizers = import_module("transformers"), import_module("tokenizers")
    words = tokenizers.models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token=str(special_ids[0]))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        mask_token=str(mask_token_id),
        pad_token=str(special_ids[0]),
        extra_special_tokens=[str(i) for i in special_ids[1:]],
    )
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)


def _mlm_mask(
    input_ids,
    *,
    mask_token_id,
    vocab_size,
    special_ids,
    seed,
    epoch=0,
    sample_ids=None,
    positions=None,
    special_tokens_mask=None,
    mlm_probability=0.15,
    word_starts=None,
):
    """Its masking alone, of a batch that is put together; without a special_tokens_mask it asks the tokenizer."""
    refuse(word_starts=word_starts)
    collator = _collator(vocab_size, special_ids, mask_token_id, mlm_probability)
    rows = input_ids.clone().reshape(-1, input_ids.shape[-1])
    return tuple(x.view_as(input_ids) for x in collator.torch_mask_tokens(rows, special_tokens_mask))


PEERS = {"mlm_mask": {"transformers": Peer(_mlm_mask)}}


# ---- the training step


@dataclass(frozen=True)
class _Form:
    """How the model is trained. tuned: the allocator; sparse: BERT's head runs on the masked tokens only.

    pure: weights, gradients and moments are in the step's dtype, beside no float32 ones: less to read, and less exact.
    """

    attention: str | None = None  # None: the model's default
    fused: bool = True
    tuned: bool = True
    sparse: bool = False
    compiled: bool = False
    pure: bool = False
    packed: bool = False
    patched: bool = False


_FORMS = {
    "transformers": _Form(fused=False, tuned=False),
    "transformers sdpa": _Form("sdpa"),
    "transformers compiled": _Form("sdpa", compiled=True),
    "transformers tuned": _Form("sdpa", sparse=True),
    "transformers tuned compiled": _Form("sdpa", sparse=True, compiled=True),
    "transformers pure": _Form("sdpa", sparse=True, pure=True),
    "transformers pure compiled": _Form("sdpa", sparse=True, pure=True, compiled=True),
    "transformers packed": _Form("sdpa", sparse=True, packed=True),
    "transformers patched": _Form(patched=True),
}


def _load(form: _Form, job: Job):
    load = getattr(import_module("transformers"), job.cls.architecture).from_pretrained
    model = load(job.weights, attn_implementation=form.attention) if form.attention else load(job.weights)
    if form.patched:
        fastlm.patch(model)
    return model.to(job.device, getattr(torch, job.table.dtype) if form.pure else None)


def padded(input_ids, labels, lengths) -> dict:
    """A batch as a collator makes it."""
    mask = {"attention_mask": real_tokens(input_ids, lengths).long()} if is_padded(input_ids, lengths) else {}
    return {"input_ids": input_ids, "labels": labels, **mask}


def packed(input_ids, labels, lengths) -> dict:
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
    out_labels = torch.full(shape, IGNORE_INDEX, device=device)
    for text, row, start, length in places:
        span = slice(start, start + length)
        out_ids[row, span], out_labels[row, span] = input_ids[text, :length], labels[text, :length]
        positions[row, span], owner[row, span] = torch.arange(length, device=device), text + 1
    mask = owner[:, None, :, None] == owner[:, None, None, :]  # (rows, 1, width, width); padding sees padding
    return {"input_ids": out_ids, "labels": out_labels, "position_ids": positions, "attention_mask": mask}


def _loss_function(form: _Form, job: Job, model, batches: list[dict]):
    """loss_of(the number of a batch), under autograd."""
    indexes = [predicted_tokens(batch["labels"]) for batch in batches]
    targets = [batch["labels"].flatten()[index] for batch, index in zip(batches, indexes)]
    if form.compiled:  # one number of predicted tokens for all batches
        pad, longest = torch.nn.functional.pad, max(map(len, indexes))
        indexes = [pad(index, (0, longest - len(index))) for index in indexes]
        targets = [pad(target, (0, longest - len(target)), value=IGNORE_INDEX) for target in targets]

    def dense_loss(batch, index, target):
        return model(**batch).loss

    def sparse_loss(batch, index, target):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = model.bert(**inputs).last_hidden_state.flatten(0, 1)[index]
        return torch.nn.functional.cross_entropy(model.cls(hidden).float(), target)

    loss_of = sparse_loss if form.sparse and job.cls is models.Bert else dense_loss
    if form.compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def call(number):
        with nullcontext() if form.pure else job.autocast():
            return loss_of(batches[number], indexes[number], targets[number])

    return call


def _prepare(form: _Form, job: Job, model) -> tuple[Loss, Step]:
    if form.packed and not any(is_padded(ids, lengths) for ids, _, lengths in job.batches):
        raise NotRun("no row is padded: there is nothing to pack")
    if form.pure:
        refuse_float32(job)
    table = job.table
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=table.lr,
        betas=(table.beta1, table.beta2),
        eps=table.eps,
        weight_decay=table.weight_decay,
        fused=True if form.fused else None,
    )
    model.train()  # as fastlm_step has it; from_pretrained leaves it in evaluation
    batches = [(packed if form.packed else padded)(*batch) for batch in job.batches]
    loss_of = _loss_function(form, job, model, batches)

    def loss():
        with torch.no_grad():
            model.eval()
            value = loss_of(0).item()
            model.train()
        return value

    def step(number):
        loss = loss_of(number % len(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), table.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return loss, step


STEPS = {name: Contender(partial(_load, form), partial(_prepare, form), form.tuned) for name, form in _FORMS.items()}
