"""What a masked-language model would put in place of a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastlm.models import Bert
from fastlm.pretrained import load_pretrained


@dataclass(frozen=True)
class Candidate:
    """A token for one mask, its probability, and the text with it in that place (other masks stay)."""

    token: str
    probability: float
    text: str


@torch.inference_mode()
def fill_mask(directory, text: str, *, top: int = 5) -> list[list[Candidate]]:
    """For each mask in `text`, the `top` most probable tokens, best first.

    directory   a BERT and its tokenizer in Transformers' layout, as `fastlm pretrain` leaves in OUT/hf

    ValueError for a directory without a model, a text without a mask, or one that is too long.
    """
    model, tokenizer = load_pretrained(directory, (Bert,))
    ids = tokenizer.encode(text)
    places = [place for place, id in enumerate(ids) if id == tokenizer.mask_id]
    mask = tokenizer.decode([tokenizer.mask_id], skip_special_tokens=False)
    if not places:
        raise ValueError(f"text: expected at least one {mask}, got {text!r}")
    longest = model.config.max_position_embeddings
    if len(ids) > longest:
        raise ValueError(f"text: expected at most {longest} tokens, which is the model's length, got {len(ids)}")
    logits = model(
        torch.tensor(ids),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        index=torch.tensor(places),
    )[:, : tokenizer.vocab_size]
    best = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
    filled = []
    for place, probabilities, tokens in zip(places, best.values.tolist(), best.indices.tolist()):
        candidates = []
        for probability, token in zip(probabilities, tokens):
            sentence = [*ids[:place], token, *ids[place + 1 :]]
            sentence = [id for id in sentence if id not in (tokenizer.cls_id, tokenizer.sep_id)]
            word = tokenizer.decode([token], skip_special_tokens=False)
            candidates.append(Candidate(word, probability, tokenizer.decode(sentence, skip_special_tokens=False)))
        filled.append(candidates)
    return filled
