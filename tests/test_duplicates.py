"""Duplicates: similarity beside datasketch and by sets of strings, recall and precision by similarity, files."""

import itertools
import random
import re

import datasketch
import numpy as np
import pytest

from fastlm.data import duplicates
from fastlm.data.duplicates import Signatures, exact_digest, jaccard, near_duplicates, signature, words


def make(rng, count, vocabulary):
    return [rng.choice(vocabulary) for _ in range(count)]


def shingle_set(text):
    """The definition, in plain Python."""
    found = words(text)
    size = min(5, len(found))
    return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)} if found else set()


def true_jaccard(a, b):
    a, b = shingle_set(a), shingle_set(b)
    return len(a & b) / len(a | b)


def near_pair(rng, vocabulary, length, edits):
    """Two texts that differ in `edits` runs of words: more edits, less similarity."""
    a = make(rng, length, vocabulary)
    b = list(a)
    for _ in range(edits):
        b[rng.randrange(length)] = rng.choice(vocabulary)
    return " ".join(a), " ".join(b)


@pytest.fixture(scope="module")
def pairs():
    """2 x 600 texts, the pair (2i, 2i + 1) of a similarity from 0.2 to 1; texts of different pairs share nothing."""
    rng, texts = random.Random(0), []
    vocabulary = [f"w{i}" for i in range(20_000)]
    for _ in range(600):
        length = rng.randint(60, 300)
        texts += near_pair(rng, vocabulary, length, rng.choice((1, 1, 2, 3, length // 20, length // 10, length // 6)))
    return texts


def test_words():
    assert words("The Café, e-mail_2\nИ да! 你好 abc") == ["the", "café", "e", "mail_2", "и", "да", "你", "好", "abc"]
    ascii_text = "".join(map(chr, range(128))) + " Some-words, here_too 3.14"
    assert words(ascii_text) == re.findall(r"\w+", ascii_text.lower())


def test_similarities_are_those_of_the_sets(pairs):
    made = signature(pairs)
    for i in range(0, len(pairs), 2):
        a, b = (made.shingles[made.offsets[j] : made.offsets[j + 1]] for j in (i, i + 1))
        assert jaccard(a, b) == pytest.approx(true_jaccard(pairs[i], pairs[i + 1]), abs=1e-12)


def test_minima_estimate_as_well_as_datasketchs(pairs):
    made = signature(pairs[:400])
    ours, theirs, true = [], [], []
    for i in range(0, 400, 2):
        ours.append((made.minima[i] == made.minima[i + 1]).mean())
        sketches = [datasketch.MinHash(duplicates.MINIMA) for _ in range(2)]
        for sketch, text in zip(sketches, pairs[i : i + 2]):
            sketch.update_batch([" ".join(shingle).encode() for shingle in shingle_set(text)])
        theirs.append(sketches[0].jaccard(sketches[1]))
        true.append(true_jaccard(pairs[i], pairs[i + 1]))
    # The deviation of 128 minima is sqrt(s (1 - s) / 128), at most 0.044.
    ours, theirs, true = map(np.array, (ours, theirs, true))
    error, peer = np.sqrt(((ours - true) ** 2).mean()), np.sqrt(((theirs - true) ** 2).mean())
    assert error <= 1.25 * peer, (error, peer)
    assert abs((ours - true).mean()) < 0.01
    assert np.abs(ours - theirs).max() < 6 * 0.044


def test_similar_pairs_are_found_and_others_stay(pairs):
    true = np.array([true_jaccard(pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2)])
    result = near_duplicates(signature(pairs), threshold=0.8)
    removed = result.partner[1::2] >= 0
    assert (result.partner[::2] == -1).all()
    assert (true >= 0.9).sum() > 150
    assert (true <= 0.5).sum() > 150
    assert removed[true >= 0.9].mean() >= 0.99
    assert removed[true <= 0.5].mean() <= 0.001
    assert not removed[true < 0.8].any()
    assert result.partner[1::2][removed].tolist() == np.arange(0, len(pairs), 2)[removed].tolist()
    assert result.similarity[1::2][removed] == pytest.approx(true[removed], abs=1e-6)


def test_candidates_include_datasketchs(pairs):
    """The pairs that datasketch's index with as many bands finds and that are similar enough are found here too."""
    lsh = datasketch.MinHashLSH(num_perm=128, params=(duplicates.BANDS, duplicates.MINIMA // duplicates.BANDS))
    removed = near_duplicates(signature(pairs[:600])).partner[1::2] >= 0
    theirs = []
    for i, text in enumerate(pairs[:600]):
        sketch = datasketch.MinHash(128)
        sketch.update_batch([" ".join(shingle).encode() for shingle in shingle_set(text)])
        if i % 2:
            theirs.append(i - 1 in lsh.query(sketch) and true_jaccard(pairs[i - 1], text) >= 0.8)
        lsh.insert(i, sketch)
    assert (removed & theirs).sum() >= 0.98 * sum(theirs)


def test_the_first_of_a_cluster_stays_and_no_removal_lacks_a_partner():
    rng = random.Random(1)
    vocabulary = [f"w{i}" for i in range(5000)]
    base = make(rng, 200, vocabulary)
    chain = [list(base)]
    for i in range(8):  # each 0.93 similar to the one before, the last hardly to the first
        following = list(chain[-1])
        for j in range(2):
            following[10 + 20 * i + 8 * j] = f"new{i}{j}"
        chain.append(following)
    texts = [" ".join(chain[0])] * 40 + [" ".join(text) for text in chain[1:]]
    order = list(range(len(texts)))
    rng.shuffle(order)
    texts = [texts[i] for i in order] + ["", "", "short text", "short text"]
    result = near_duplicates(signature(texts))
    for i, partner in enumerate(result.partner):
        if partner >= 0:
            assert partner < i
            assert result.partner[partner] == -1
            assert true_jaccard(texts[i], texts[partner]) >= 0.8
    kept = np.flatnonzero(result.kept)
    assert kept[0] == 0
    assert all(true_jaccard(texts[i], texts[j]) < 0.8 for i in kept for j in kept if i < j and texts[i] and texts[j])
    assert result.partner[-4:].tolist() == [-1, -1, -1, len(texts) - 2]  # documents without words are no duplicates


def test_parts_on_disk_give_what_one_pass_gives(tmp_path, pairs):
    texts = pairs[:200] + [""] + pairs[100:150]
    whole = near_duplicates(signature(texts))
    cuts = (0, 0, 70, 71, 201, len(texts))
    for i, (low, high) in enumerate(itertools.pairwise(cuts)):
        signature(texts[low:high]).save(tmp_path / str(i))
    parts = [Signatures.open(tmp_path / str(i)) for i in range(len(cuts) - 1)]
    assert isinstance(parts[1].shingles, np.memmap)
    result = near_duplicates(parts)
    assert result.partner.tolist() == whole.partner.tolist()
    assert result.similarity.tolist() == whole.similarity.tolist()
    (tmp_path / "other").write_bytes(b"no signatures")
    with pytest.raises(ValueError, match=r"signatures: expected a file that Signatures.save wrote"):
        Signatures.open(tmp_path / "other")


def test_a_crowd_is_not_quadratic():
    texts = [f"the same boilerplate page of a dozen words or so for every visitor {i % 3}" for i in range(3000)]
    result = near_duplicates(signature(texts), threshold=0.5)
    assert result.kept.sum() == 1
    assert result.candidates <= 2 * len(texts)


def test_exact():
    assert exact_digest("a") == exact_digest("a") != exact_digest("b")
    assert len(exact_digest("")) == 16
    with pytest.raises(ValueError, match=r"threshold: expected a similarity from 0.5 to 1, got 0.2"):
        near_duplicates([], threshold=0.2)
    assert len(near_duplicates([]).partner) == 0
