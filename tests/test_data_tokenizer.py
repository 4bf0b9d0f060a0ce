"""The tokenizer: training is deterministic, and Transformers can read the saved files."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from fastlm.data import Tokenizer, prepare
from fastlm.data.layouts import SpanRows
from fastlm.data.packing import PADDING_SAMPLE
from fastlm.data.sample import Sample
from fastlm.data.tokenizer import parse
from fastlm.run.data_report import report
from fastlm.tasks import DataTable

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Foxes are quick; dogs are lazy. Café naïve 你好 Ελληνικά — 3.14 [MASK] [SEP] ##a",
    "def quick(fox):\n    return fox + 1  # jumps, over and over and over",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(lambda: TEXTS, 300)


def test_layout(tokenizer):
    assert tokenizer.decode(range(5), skip_special_tokens=False) == "[PAD] [UNK] [CLS] [SEP] [MASK]"
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 3, 4)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    vocab = tokenizer.backend.get_vocab()
    assert sorted(vocab.values()) == list(range(tokenizer.vocab_size))
    assert tokenizer.vocab_size < 300, "a tiny corpus has no 300 tokens to give"
    assert "quick" in vocab
    assert "The" not in vocab


def test_vocab_size_is_a_bound():
    for size in (16, 40, 100):
        assert Tokenizer.train(lambda: TEXTS, size).vocab_size <= size


def test_training_is_deterministic(tokenizer):
    # Without a fixed alphabet the trainer numbers inner letters by a randomly seeded hash map: four runs, four orders.
    hashes = {Tokenizer.train(lambda: TEXTS, 300).hash for _ in range(4)}
    assert hashes == {tokenizer.hash}
    assert Tokenizer.train(lambda: TEXTS[:1] * 2, 300).hash != tokenizer.hash


def test_any_text_encodes(tokenizer):
    for text in ("", "\x00\x01", "\U0001f600 \u202e \uffff", "x" * 1000, "\u0e01\u0301" * 50):
        ids = tokenizer.encode(text)
        assert (ids[0], ids[-1]) == (2, 3)
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


def test_special_tokens_in_a_corpus_are_text(tokenizer):
    (ids,) = tokenizer.encode_batch(["a [MASK] dog"])
    assert tokenizer.mask_id not in ids
    assert len(ids) > 4
    assert tokenizer.encode("a [MASK] dog").count(tokenizer.mask_id) == 1
    assert tokenizer.encode_batch([]) == []


def test_a_unigram_model_cannot_smuggle_special_tokens_in():
    """Its vocabulary holds "<mask>" as a piece, as XLM-RoBERTa's does, whatever encode_special_tokens says."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [(token, 0.0) for token in specials] + [(piece, -3.0) for piece in "\u2581abms"]
    roles = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    config = dict(zip(roles, specials))
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.add_special_tokens(specials)
    assert Tokenizer(backend, config).encode_batch(["a <mask> b", "ab"]) == [[5, 6, 5, 3, 5, 7], [5, 6, 7]]
    del config["unk_token"]
    assert Tokenizer(backend, config).encode_batch(["a<s>b"]) == [[5, 6, 7]]


def test_transformers_reads_what_we_write(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.mask_token_id == tokenizer.mask_id
    assert sorted(theirs.all_special_ids) == list(tokenizer.special_ids)
    for text in TEXTS[:3]:
        assert theirs(text).input_ids == tokenizer.encode(text)
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == tokenizer.decode(
            tokenizer.encode(text)
        )
    assert theirs("a dog", "a fox").token_type_ids == [0] * 4 + [1] * 3
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash

    theirs.save_pretrained(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (again.mask_id, again.special_ids) == (tokenizer.mask_id, tokenizer.special_ids)


def test_a_vocab_txt_alone_is_a_bert(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert Tokenizer.load(tmp_path).encode("THE")[1] != tokenizer.encode("THE")[1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "DistilBertTokenizerFast"}))
    assert Tokenizer.load(tmp_path).encode("THE") == tokenizer.encode("THE")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    with pytest.raises(
        ValueError, match=r"expected a tokenizer\.json for the BertJapaneseTokenizer in .* save_pretrained"
    ):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is not UTF-8"):
        Tokenizer.load(tmp_path)


def test_a_lone_tokenizer_json_with_truncation(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    backend["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_bad_tokenizers(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: expected `train:8192` or a tokenizer's directory, got .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"tokenizer: expected a tokenizer\.json or a vocab\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(
        ValueError, match="tokenizer: expected one with a mask_token for masked rows, found none; train one with"
    ):
        Tokenizer.load(tmp_path).check("masked")
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="vocab_size: expected an integer from 16 to 16777216, got 3"):
        Tokenizer.train(lambda: TEXTS, 3)


# ---- text that becomes [UNK], and memory


def letters(count, seed=0):
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=count))


def test_words_that_are_too_long_teach_nothing():
    """A run of 101 characters or more is [UNK]; with punctuation or Chinese in it, it is words."""
    words = "the quick brown fox, " * 30
    long = letters(5000)
    assert Tokenizer.train(lambda: [words + long], 200).hash == Tokenizer.train(lambda: [words + long + long], 200).hash
    joined = ",".join(["quick", "brown"] * 30) + "漢字" * 60
    learned = Tokenizer.train(lambda: [joined], 60)
    assert {"quick", "brown", "漢"} <= set(learned.backend.get_vocab())


def test_the_sample_is_bounded_and_the_same_each_time(monkeypatch):
    """Words that are first seen after the limit are left out with a warning; those before it count everywhere."""
    monkeypatch.setattr("fastlm.data.tokenizer._DISTINCT", 40)
    early = ["hello world hello world"] * 3
    late = ["zebra zebra quagga quagga " + " ".join(letters(9, seed=i) for i in range(20))] * 5
    with pytest.warns(UserWarning, match=r"learns from the first 2 distinct words of the text"):
        first = Tokenizer.train(lambda: early + late, 200)
    with pytest.warns(UserWarning, match="left out"):
        assert Tokenizer.train(lambda: early + late, 200).hash == first.hash
    assert "hello" in first.backend.get_vocab()
    assert "zebra" not in first.backend.get_vocab()


TRAIN = """
import sys, torch, warnings
from fastlm.bench.memory import peak_mb  # of this process alone; ru_maxrss counts the one that started it
from fastlm.data import prepare
warnings.simplefilter("ignore")
try:
    prepare(sys.argv[1], "train:8192", sys.argv[2])
except ValueError as error:
    print(error)
print(int(peak_mb(torch.device("cpu")) * 2**20))
"""


def peak_of_training(text, tmp_path):
    """(bytes of the peak, what was printed before) of a process that prepares `text`."""
    path = tmp_path / "text.txt"
    path.write_text(text)
    command = [sys.executable, "-c", TRAIN, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    *lines, peak = done.stdout.splitlines()
    return int(peak), "".join(lines)


def test_space_free_text_is_refused_soon(tmp_path):
    """8 MB took 191 s before, and gave rows of [UNK] alone."""
    peak, error = peak_of_training(letters(500_000), tmp_path)
    assert peak < 0.4e9
    assert re.match(r"data: expected text that the tokenizer can spell, but 100.0% of the tokens are \[UNK\]", error)


@pytest.mark.long
@pytest.mark.parametrize("space", [40_000_000, 80])
def test_forty_megabytes_of_hardly_any_spaces(space, tmp_path):
    text = letters(40_000_000)
    peak, error = peak_of_training(" ".join(text[i : i + space] for i in range(0, len(text), space)), tmp_path)
    print(f"peak {peak / 1e6:.0f} MB")
    assert peak <= 1e9
    assert bool(error) == (space > 100)


# ---- the sample that it is trained on


def test_a_sample_is_chosen_by_a_hash_whatever_the_order(monkeypatch):
    monkeypatch.setattr("fastlm.data.sample._BUCKETS", 14)  # a million are for terabytes
    texts = [f"{i} " + letters(20 + i % 50, seed=i) for i in range(600)]
    sets = []
    for limit in (1 << 30, 9000, 2000):
        chosen = []
        for order in (texts, texts[::-1]):
            with Sample(limit) as sample:
                sample.add(order)
                chosen.append(list(sample.texts()))
                assert sample.size == sum(len(text.encode()) for text in chosen[-1]) <= limit
                assert sample.total == sum(len(text.encode()) for text in texts)
        assert chosen[0] == chosen[1][::-1]
        sets.append(set(chosen[0]))
    whole, some, few = sets
    assert few < some < whole == set(texts)
    assert sample.size > 1800  # the next one would have been too many
    numbers = [int(text.split()[0]) for text in some]
    assert 200 < sum(numbers) / len(numbers) < 400, "from everywhere"


def test_a_tokenizer_trained_on_a_sample(tmp_path, monkeypatch):
    """The manifest has its size, and the text prepared in parts has the same sample."""
    monkeypatch.setattr("fastlm.data.sample._BUCKETS", 14)
    (tmp_path / "a.txt").write_text("\n".join(f"{i} " + letters(200, seed=i) for i in range(700)))
    options = {"documents": "line", "row_tokens": 32}
    table = DataTable(tokenizer="bpe:300", tokenizer_sample=1 << 16)
    kind = parse(table.tokenizer, table.tokenizer_sample)
    one = prepare(tmp_path / "a.txt", kind, tmp_path / "one", **options)
    trained = one.manifest["tokenizer"]["trained_on"]
    assert 60_000 < trained["bytes"] <= 1 << 16 < trained["of"] == one.text_bytes
    line = f"tokenizer trained on {trained['bytes']:,} of {trained['of']:,} bytes of its text"
    assert line in list(report(one, 0))
    assert one.manifest["settings"]["tokenizer_sample"] == 1 << 16
    monkeypatch.setattr("fastlm.data.preparation.SMALL", 1000)  # larger text is cleaned into parts first
    parts = prepare(tmp_path / "a.txt", kind, tmp_path / "parts", **options)
    assert parts.manifest == one.manifest
    with pytest.raises(ValueError, match=r"data\.tokenizer_sample is None, was 65536"):
        prepare(tmp_path / "a.txt", "bpe:300", tmp_path / "one", **options)
    with pytest.raises(ValueError, match="tokenizer_sample: expected an integer from 65536 to 2147483647, got 10"):
        parse("bpe:300", 10)
    with pytest.raises(ValueError, match="tokenizer_sample: expected more than 65,536 bytes for 90,000 bytes of text"):
        kind.train(lambda: [letters(30_000)] * 3, "causal")  # equal hashes


def test_bpe_learns_from_a_bounded_number_of_words(monkeypatch):
    monkeypatch.setattr("fastlm.data.tokenizer._DISTINCT", 40)
    early, late = ["hello  world\n"] * 30, ["zebra quagga hello"] * 30
    with pytest.warns(UserWarning, match=r"learns from the first 2 distinct words of the text"):
        learned = Tokenizer.train(lambda: [*early, " ".join(letters(9, seed=i) for i in range(9)), *late], 300, "bpe")
    assert "hello" in learned.backend.get_vocab()
    assert not [token for token in learned.backend.get_vocab() if "zeb" in token]


# ---- Unigram

ROUND = ["  two  spaces\n\n\tand a tab ", "Ελληνικά 五, \U0001f600 é\u0301", "<unk> </s> [MASK] <0x41> ##a", "x" * 300]


@pytest.mark.parametrize("purpose", ["masked", "causal", "span"])
def test_a_trained_unigram(purpose, tmp_path):
    pytest.importorskip("sentencepiece", reason="the package sentencepiece, of the extra unigram")
    texts = [*TEXTS, *(f"Document {i} says that the quick dog is {i * i}." for i in range(200))]
    learned = Tokenizer.train(lambda: texts, 800, "unigram", purpose)
    assert Tokenizer.train(lambda: texts, 800, "unigram", purpose).hash == learned.hash
    learned.check(purpose)
    assert learned.vocab_size <= 800
    assert "▁quick" in learned.backend.get_vocab()
    rows = learned.encode_batch([*texts, *ROUND])
    assert [learned.decode(ids, skip_special_tokens=False) for ids in rows] == [*texts, *ROUND]
    assert not set(learned.special_ids) & {id for ids in rows for id in ids}
    assert sum(map(len, rows[: len(texts)])) < sum(map(len, texts)) / 2
    learned.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == learned.hash
    assert learned.word_starts()[learned.encode_batch([" quick"])[0][0]]
    with pytest.raises(ValueError, match=r"tokenizer: expected at least \d+ tokens for a Unigram of"):
        Tokenizer.train(lambda: texts, 300, "unigram", purpose)


def test_unigram_learns_from_text_without_spaces_and_spells_every_block():
    pytest.importorskip("sentencepiece", reason="the package sentencepiece, of the extra unigram")
    words = ["天地玄黄", "宇宙洪荒", "日月盈昃", "辰宿列张", "寒来暑往", "秋收冬藏"]
    order = np.random.default_rng(0).integers(0, len(words), (60, 50))
    lines = ["".join(words[word] for word in line) for line in order]
    for others in ([], [*TEXTS, "a bar ▅▅ of ▄▅▆ blocks"]):
        learned = Tokenizer.train(lambda others=others: [*lines, *others], 800, "unigram")
        rows = learned.encode_batch([*lines, *others, "▅ and ▅"])
        assert [learned.decode(ids) for ids in rows] == [*lines, *others, "▅ and ▅"]
        assert sum(map(len, rows[:60])) < 60 * 200 / 3  # three characters a token; three tokens a character before


def test_unigram_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"need the package sentencepiece; pip install fastlm\[unigram\]"):
        parse("unigram:8192")


def test_any_unigram_directory_prepares_text(tmp_path):
    """One built by hand as T5's is: Metaspace, no bytes, an unknown token."""
    specials = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(20))]
    words = ["▁the", "▁cat", "▁dog", "▁sat", "▁on", "▁a", "▁mat", "ing"]
    pieces = [*((token, 0.0) for token in specials), *((word, -3.0) for word in words)]
    pieces += [(letter, -6.0) for letter in "▁abcdefghijklmnopqrstuvwxyz.,"]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(specials)
    config = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "T5TokenizerFast"}
    Tokenizer(backend, config).save(tmp_path / "t5")
    lines = [f"the cat sat on a mat, {'and on ' * (i % 9)}the dog." for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join([*lines, *lines]))
    layout = SpanRows(32, sentinels=20)
    dataset = prepare(tmp_path / "a.txt", tmp_path / "t5", tmp_path / "rows", layout=layout, documents="line")
    assert dataset.documents == len(set(lines))
    assert dataset.manifest["unknown"]["tokens"] == 0
    tokens, counts, found = dataset.gather(np.arange(dataset.rows))
    ids = dict.fromkeys(found[:, 0].tolist(), tokens[0][:0])
    rows = np.repeat(np.arange(dataset.rows), counts)
    ends = np.append(np.where(rows[1:] == rows[:-1], found[1:, 1], dataset.width), dataset.width)
    for row, (sample, start), end in zip(rows, found, ends):
        ids[int(sample)] = np.append(ids[int(sample)], tokens[row, start:end])
    texts = {}
    for sample in sorted(ids):
        if sample != PADDING_SAMPLE:
            texts[sample >> 24] = [*texts.get(sample >> 24, []), *ids[sample].tolist()]
    assert sorted(dataset.tokenizer.decode(text) for text in texts.values()) == sorted(set(lines))
