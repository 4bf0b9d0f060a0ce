"""fastlm/bench/data.py: the text is a function of its seed, every stage has a row, times are those of the clock."""

import itertools

import pytest

from fastlm.bench import data, data_scale, made_text


@pytest.fixture(autouse=True)
def few_words(monkeypatch):
    monkeypatch.setattr(made_text, "_VOCABULARY", 300)


def test_the_text_is_a_function_of_the_seed():
    texts = made_text.made_text(150_000, seed=3)
    assert texts == made_text.made_text(150_000, seed=3) != made_text.made_text(150_000, seed=4)
    assert 150_000 <= sum(len(text.encode()) for text in texts) < 400_000
    found = set("".join(texts))
    assert sum(len(found.intersection(letters)) > 15 for letters, _ in made_text._SCRIPTS.values()) >= 5


def test_every_stage_has_a_row():
    texts, now = made_text.made_text(10_000, seed=1), itertools.count(step=0.25)
    rows = {row["stage"]: row for row in data.measure(texts, 1, lambda: next(now))}
    made = {data.LIBRARY, "tokenising, packing", "tokenising, best fit"}
    assert set(rows) == {"read JSONL", "read JSONL, gzip", "read Parquet", *data.STAGES, "all", *made}
    assert set(data.GOALS) <= set(rows)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    assert {row["mb_s"] for row in rows.values()} == {round(megabytes / 0.25, 2)}
    assert rows["read Parquet"]["left"] == rows["read JSONL, gzip"]["left"] == len(texts)
    assert 0 < rows["all"]["left"] <= rows["cleaning"]["left"] <= len(texts)
    assert {rows[name].get("share") for name in made} == {None, 1.0}
    for name in made - {data.LIBRARY}:  # a token more in each document: that which begins it
        assert rows[name]["left"] == rows[data.LIBRARY]["left"] + len(texts)


def test_a_whole_preparation_of_the_made_text(tmp_path, monkeypatch):
    monkeypatch.setattr(data_scale, "library", lambda folder: iter(["A document of the library.", "Another one."]))
    row = data_scale.measure(0.05, 1, folder=tmp_path)
    assert 0.05 <= row["mb"] < 0.2
    assert row["documents"] > 2
    assert {"cleaning", "tokenizer", "tokens", "rows"} <= set(row["stages"])
    assert row["cpu_seconds"] > 0
    assert 30 < row["peak_mb"] < 10_000  # of this process, whatever ran in it before
    assert not list(tmp_path.iterdir())
    assert "1 processes" in data_scale.line(row)
