"""fastlm.data.DataCollatorForLanguageModeling compared with Transformers' collator, in a DataLoader and in Trainer."""

import pickle

import numpy as np
import pytest
import torch
import transformers

import fastlm
from fastlm import ops
from fastlm.data import DataCollatorForLanguageModeling

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, MASK = 0, 4
WORDS = 40  # each "wN" with two continuations, "##aN" and "##bN"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokens = [*SPECIAL, *(f"w{i}x" for i in range(WORDS)), *(f"##{end}" for end in "abcdefghij")]
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return transformers.BertTokenizer(str(directory / "vocab.txt"))


def text(seed, words):
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(WORDS, (words,), generator=draw).tolist()
    ends = torch.randint(3, (words,), generator=draw).tolist()
    return " ".join(f"w{i}x{'abcdefghij'[:end]}" for i, end in zip(picks, ends))


def rows(tokenizer, lengths=(6, 2, 11), **options):
    return [dict(tokenizer(text(seed, n), **options)) for seed, n in enumerate(lengths)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("mlm", [True, False])
def test_batches_as_transformers(mlm, multiple, side, tokenizer):
    """Keys, shapes, dtypes and padding; with mlm=False also the labels; labels where something is selected."""
    tokenizer.padding_side = side
    arguments = {"tokenizer": tokenizer, "mlm": mlm, "pad_to_multiple_of": multiple}
    examples = rows(tokenizer)
    want = transformers.DataCollatorForLanguageModeling(**arguments)(examples)
    got = DataCollatorForLanguageModeling(**arguments)(examples)
    tokenizer.padding_side = "right"
    assert got.keys() == want.keys()
    for key in want:
        assert (got[key].shape, got[key].dtype) == (want[key].shape, want[key].dtype), key
    assert torch.equal(got["attention_mask"], want["attention_mask"])
    original = torch.where(got["labels"] == -100, got["input_ids"], got["labels"])
    assert torch.equal(original, torch.where(want["labels"] == -100, want["input_ids"], want["labels"]))
    if not mlm:
        assert torch.equal(got["labels"], want["labels"])
    assert set(examples[0]) == {"input_ids", "token_type_ids", "attention_mask"}  # nothing was taken out of them


def test_probabilities(tokenizer):
    """15% of the words' tokens, never a special one; of them 80% [MASK], 10% another, 10% the same."""
    torch.manual_seed(0)
    examples = rows(tokenizer, [60] * 400)
    collate = DataCollatorForLanguageModeling(tokenizer)
    batch = collate(examples)
    original = collate._pad([dict(row) for row in examples])["input_ids"]
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    selected = batch["labels"] != -100
    assert not (selected & special).any()
    assert torch.equal(batch["input_ids"][~selected], original[~selected])
    assert torch.equal(batch["labels"][selected], original[selected])
    n = int((~special).sum())
    assert selected.sum() / n == pytest.approx(0.15, abs=5 * (0.15 * 0.85 / n) ** 0.5)
    ids, count = batch["input_ids"][selected], int(selected.sum())
    masked, same = (ids == MASK).sum() / count, (ids == original[selected]).sum() / count
    assert masked == pytest.approx(0.8, abs=5 * (0.16 / count) ** 0.5)
    assert same == pytest.approx(0.1 + 0.1 / (WORDS + 10), abs=5 * (0.09 / count) ** 0.5)
    assert not torch.isin(ids[ids != MASK], torch.tensor(tokenizer.all_special_ids)).any()


def test_sample_ids_decide(tokenizer):
    """With the column: the op's masks, the same in any batch, order and padding; another epoch or seed, others."""
    examples = [
        {**row, "sample_id": torch.tensor(1000 + i) if i % 2 else 1000 + i}
        for i, row in enumerate(rows(tokenizer, [30, 12, 25, 30]))
    ]
    collate = DataCollatorForLanguageModeling(tokenizer, seed=7)
    whole = collate(examples)
    assert "sample_id" not in whole
    padded = collate._pad([{"input_ids": row["input_ids"]} for row in examples])["input_ids"]
    masked = ops.mlm_mask(
        padded,
        mask_token_id=MASK,
        vocab_size=len(tokenizer),
        special_ids=tokenizer.all_special_ids,
        seed=7,
        sample_ids=torch.arange(1000, 1004),
    )
    assert torch.equal(whole["input_ids"], masked.input_ids)
    assert torch.equal(whole["labels"], masked.labels)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        for pick in ([3, 1], [1], [2, 1, 0]):
            part = collate([examples[i] for i in pick])
            for j, i in enumerate(pick):
                for key in ("input_ids", "labels"):
                    real, there = part["attention_mask"][j].bool(), whole["attention_mask"][i].bool()
                    assert torch.equal(part[key][j][real], whole[key][i][there])
    tokenizer.padding_side = "right"
    collate.set_epoch(1)
    assert not torch.equal(collate(examples)["labels"], whole["labels"])
    collate.set_epoch(0)
    assert torch.equal(collate(examples)["labels"], whole["labels"])
    assert not torch.equal(DataCollatorForLanguageModeling(tokenizer, seed=8)(examples)["labels"], whole["labels"])


def test_drawn_sample_ids(tokenizer):
    """Without the column: other masks at every call, and again the same from the same state of torch's generator."""
    examples, collate = rows(tokenizer, [40, 40]), DataCollatorForLanguageModeling(tokenizer)
    torch.manual_seed(1)
    first, second = collate(examples)["labels"], collate(examples)["labels"]
    torch.manual_seed(1)
    assert torch.equal(collate(examples)["labels"], first)
    assert not torch.equal(first, second)


def test_seed_repeats(tokenizer):
    """Two collators of one seed: the same masks call by call, whatever torch's generator has drawn."""
    examples = rows(tokenizer, [40, 40])
    one, two = (DataCollatorForLanguageModeling(tokenizer, seed=42) for _ in range(2))
    torch.manual_seed(1)
    first = [one(examples) for _ in range(3)]
    torch.manual_seed(2)
    for batch in first:
        again = two(examples)
        assert torch.equal(again["labels"], batch["labels"])
        assert torch.equal(again["input_ids"], batch["input_ids"])
    assert len({tuple(batch["labels"].flatten().tolist()) for batch in first}) == 3
    state = torch.get_rng_state()
    other = DataCollatorForLanguageModeling(tokenizer, seed=43)(examples)["labels"]
    assert not torch.equal(other, first[0]["labels"])
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from it
    assert torch.equal(pickle.loads(pickle.dumps(one))(examples)["labels"], one(examples)["labels"])


@pytest.mark.parametrize("persistent", [False, True])
def test_seed_repeats_in_workers(persistent, tokenizer):
    """Every worker and every pass has other masks; a second collator makes the same ones again."""
    examples = rows(tokenizer, [20] * 2) * 4

    def passes():
        collate = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=64, seed=42)
        loader = torch.utils.data.DataLoader(
            Rows(examples), batch_size=2, collate_fn=collate, num_workers=2, persistent_workers=persistent
        )
        return [batch["labels"] for _ in range(2) for batch in loader]

    first, second = passes(), passes()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(labels.flatten().tolist()) for labels in first}) == 8


@pytest.mark.parametrize("mlm", [True, False])
def test_numpy(mlm, tokenizer):
    """The same numbers as torch's, of Transformers' keys and dtypes; for the collator, or for one call."""
    examples = [{**row, "sample_id": i} for i, row in enumerate(rows(tokenizer))]
    theirs = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=mlm, return_tensors="np")(rows(tokenizer))
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=mlm)
    if not mlm:
        examples = rows(tokenizer)
    want = collate(examples)
    ours = DataCollatorForLanguageModeling(tokenizer, mlm=mlm, return_tensors="np")
    for got in (ours(examples), collate(examples, return_tensors="np")):
        assert got.keys() == want.keys() == theirs.keys()
        for key, value in got.items():
            assert isinstance(value, np.ndarray)
            assert (value.shape, value.dtype) == (theirs[key].shape, theirs[key].dtype)
            np.testing.assert_array_equal(value, want[key].numpy())
    assert isinstance(ours(examples, return_tensors="pt")["labels"], torch.Tensor)


def test_no_probability_without_masks(tokenizer):
    """mlm=False reads no mlm_probability, as in Transformers."""
    for p in (None, 2.0):
        want = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False, mlm_probability=p)(rows(tokenizer))
        got = DataCollatorForLanguageModeling(tokenizer, mlm=False, mlm_probability=p)(rows(tokenizer))
        assert torch.equal(got["labels"], want["labels"])
    for p in (None, 2.0):
        with pytest.raises(ValueError, match=r"mlm_probability: expected a probability"):
            DataCollatorForLanguageModeling(tokenizer, mlm_probability=p)


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_end_of_text_that_is_the_padding_token(side):
    """A label where the rows' attention_mask says that it is real; without one, as in Transformers, it is none."""
    gpt2 = transformers.GPT2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[], padding_side=side)
    gpt2.pad_token = "<|endoftext|>"
    collate = DataCollatorForLanguageModeling(gpt2, mlm=False)
    ids = [[0, 1, 2], [1, 2, 0, 1, 2]]
    masked = collate([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
    padding = [-100, -100]
    short = [*padding, 0, 1, 2] if side == "left" else [0, 1, 2, *padding]
    assert masked["labels"].tolist() == [short, [1, 2, 0, 1, 2]]
    padded = collate([{"input_ids": [0, 2, 2, 2, 2], "attention_mask": [1, 1, 0, 0, 0]}])
    assert padded["labels"].tolist() == [[0, 2, -100, -100, -100]]
    theirs = transformers.DataCollatorForLanguageModeling(gpt2, mlm=False)
    for bare in (ids, [{"input_ids": row} for row in ids]):
        assert torch.equal(collate(bare)["labels"], theirs(bare)["labels"])


def words_of(row, tokenizer):
    """The words of a row of ids, as lists of columns."""
    out = []
    for column, token in enumerate(tokenizer.convert_ids_to_tokens(row.tolist())):
        if token in SPECIAL:
            continue
        if token.startswith("##"):
            out[-1].append(column)
        else:
            out.append([column])
    return out


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("source", ["vocabulary", "word_ids", "offset_mapping", "encoding"])
def test_whole_words(source, side, tokenizer):
    """All of a word's tokens or none; the same words whoever says where they start; replaced as any token."""
    tokenizer.padding_side = side
    lengths = [30, 45, 9]
    plain = [{**row, "sample_id": i} for i, row in enumerate(rows(tokenizer, lengths))]
    examples = plain
    if source == "offset_mapping":
        examples = rows(tokenizer, lengths, return_offsets_mapping=True)
    elif source in ("word_ids", "encoding"):
        examples = [tokenizer(text(seed, n)) for seed, n in enumerate(lengths)]
    if source == "word_ids":
        examples = [{**example, "word_ids": example.word_ids()} for example in examples]
    if source == "encoding":
        for i, example in enumerate(examples):
            example["sample_id"] = i
    else:
        examples = [{**row, "sample_id": i} for i, row in enumerate(examples)]
    collate = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True, mlm_probability=0.3)
    batch, want = collate(examples), collate(plain)
    tokenizer.padding_side = "right"
    assert batch.keys() == want.keys()
    assert torch.equal(batch["labels"], want["labels"])
    assert torch.equal(batch["input_ids"], want["input_ids"])
    original = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    selected, count = batch["labels"] != -100, 0
    for row, chosen in zip(original, selected):
        for word in words_of(row, tokenizer):
            assert len(set(chosen[word].tolist())) == 1
            count += len(word) > 1
    assert count > 20
    assert selected.any()
    assert (batch["input_ids"][selected] == MASK).float().mean() > 0.5


def test_special_tokens_mask(tokenizer):
    """The column decides what is not selected, and is not in the batch."""
    examples = rows(tokenizer, [20, 30], return_special_tokens_mask=True)
    for row in examples:
        row["special_tokens_mask"][3:] = [1] * (len(row["input_ids"]) - 3)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=1.0)(examples)
    assert "special_tokens_mask" not in batch
    assert (batch["labels"] != -100).nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]


def test_bare_rows(tokenizer):
    collate = DataCollatorForLanguageModeling(tokenizer)
    same = collate([[2, 7, 8, 3], [2, 9, 10, 3]])
    assert same.keys() == {"input_ids", "labels"}
    short = collate([torch.tensor([2, 7, 3]), torch.tensor([2, 9, 10, 11, 3])])
    assert short["input_ids"].shape == (2, 5)
    assert short["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_no_advice_about_padding(tokenizer, caplog):
    DataCollatorForLanguageModeling(tokenizer)(rows(tokenizer))
    assert "__call__" not in caplog.text


def test_errors(tokenizer):
    for arguments, message in (
        ({"return_tensors": "tf"}, r'return_tensors: expected "pt" or "np", got \'tf\''),
        ({"mlm": False, "whole_word_mask": True}, "whole_word_mask: expected False with mlm=False"),
        ({"mlm_probability": 1.5}, r"mlm_probability: expected a probability in \[0, 1\], got 1.5"),
        ({"mask_replace_prob": None}, r"mask_replace_prob: expected a probability in \[0, 1\], got None"),
        ({"random_replace_prob": 0.3}, r"expected a sum of at most 1, got 0.8 \+ 0.3"),
        ({"seed": 1.5}, "seed: expected an integer from"),
    ):
        with pytest.raises(ValueError, match=message):
            DataCollatorForLanguageModeling(tokenizer, **arguments)
    collate = DataCollatorForLanguageModeling(tokenizer)
    with pytest.raises(ValueError, match="epoch: expected an integer from 0"):
        collate.set_epoch(-1)
    with pytest.raises(ValueError, match=r'return_tensors: expected "pt" or "np"'):
        collate(rows(tokenizer), return_tensors="jax")
    mixed = rows(tokenizer)
    mixed[0]["sample_id"] = 1
    with pytest.raises(ValueError, match="sample_id: expected in every row or in none, got it in 1 of 3"):
        collate(mixed)
    for wrong in (1.5, "a", 2**63, torch.tensor(1.5)):
        with pytest.raises(ValueError, match="sample_id: expected an integer from"):
            collate([{**row, "sample_id": wrong} for row in rows(tokenizer)])
    with pytest.raises(ValueError, match="examples: expected a column input_ids in every row, got text"):
        collate([{"text": "w1x"}])
    words = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True)
    for name, short in (("word_ids", [None, 0]), ("offset_mapping", [(0, 0), (0, 1)])):
        with pytest.raises(ValueError, match=f"{name}: expected one for each of 4 tokens, got 2"):
            words([{"input_ids": [2, 7, 8, 3], name: short}])
    with pytest.raises(
        ValueError, match=r"input_ids: expected ids in \[0, 55\), the tokenizer's vocabulary, got .* 99"
    ):
        words([[2, 99, 3]])
    gpt2 = transformers.GPT2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[])
    with pytest.raises(ValueError, match=r"tokenizer: expected one with a mask token.*pass mlm=False"):
        DataCollatorForLanguageModeling(gpt2)
    gpt2.mask_token = gpt2.pad_token = "<|endoftext|>"
    words = DataCollatorForLanguageModeling(gpt2, whole_word_mask=True)
    with pytest.raises(ValueError, match=r"expected a column word_ids or offset_mapping.*return_offsets_mapping=True"):
        words([[0, 1]])


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_workers(tokenizer):
    """Two processes: the same masks as one where there are sample ids, also after an epoch; else each its own."""
    examples = [{**row, "sample_id": i} for i, row in enumerate(rows(tokenizer, [20] * 16))]
    collate = DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=64)

    def labels(examples, workers, **options):
        loader = torch.utils.data.DataLoader(
            Rows(examples), batch_size=4, collate_fn=collate, num_workers=workers, **options
        )
        return loader, lambda: torch.cat([batch["labels"] for batch in loader])

    _, alone = labels(examples, 0)
    loader, together = labels(examples, 2, persistent_workers=True)
    first = together()
    assert torch.equal(first, alone())
    collate.set_epoch(1)  # workers that live on see it
    second = together()
    assert torch.equal(second, alone())
    assert not torch.equal(first, second)
    del loader
    torch.manual_seed(0)
    _, drawn = labels(rows(tokenizer, [20] * 2) * 8, 2)
    batches = drawn().view(8, 2, -1)
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 8
    torch.manual_seed(0)
    assert torch.equal(drawn().view(8, 2, -1), batches)


def test_pickle(tokenizer):
    examples = [{**row, "sample_id": i} for i, row in enumerate(rows(tokenizer))]
    collate = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=True)
    assert torch.equal(pickle.loads(pickle.dumps(collate))(examples)["labels"], collate(examples)["labels"])


@pytest.mark.parametrize("sample_ids", [True, False])
def test_trainer(sample_ids, tokenizer, tmp_path):
    """A patched model in Trainer, with two workers, on our collator."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: Transformers' Trainer is not tested")
    examples = [{**row, **({"sample_id": i} if sample_ids else {})} for i, row in enumerate(rows(tokenizer, [20] * 24))]
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    fastlm.patch(model, fused_loss=True)
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
        dataloader_num_workers=2,
        remove_unused_columns=not sample_ids,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(examples), data_collator=collate)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
