"""What a T5 that was trained by span corruption puts in place of sentinels."""

from __future__ import annotations

from collections.abc import Sequence

from fastlm.generate.api import generate
from fastlm.models import T5


def fill_spans(
    model: T5, ids: Sequence[int], sentinels: Sequence[int], eos_id: int, *, tokens: int = 32
) -> list[list[int]]:
    """The most probable tokens, one after another, for each sentinel in `ids`, in their order; perhaps none.

    ids         the encoder's text, as span corruption has it: sentinels[0], sentinels[1], ... once each, and </s> last
    sentinels   ids of <extra_id_0>, <extra_id_1>, ...
    tokens      the decoder writes at most so many, sentinels included

    ValueError where `ids` has no sentinel, or not the first ones in their order.
    """
    order = {id: place for place, id in enumerate(sentinels)}
    asked = [order[id] for id in ids if id in order]
    if not asked or asked != list(range(len(asked))):
        raise ValueError(f"ids: expected the sentinels 0, 1, ... in this order, got {asked}; number them from 0")
    ends = (eos_id, *sentinels[len(asked) :])
    (written,) = generate(model, [list(ids)], max_new_tokens=tokens, eos_token_id=ends)
    spans, current = [[] for _ in asked], None
    for token in written.ids:
        if token in order:
            current = order[token]
        elif current is not None:
            spans[current].append(token)
    return spans
