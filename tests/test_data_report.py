"""`fastlm data`: counts that agree with the rows, and rows as text with their masks."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fastlm import _malloc, _threads, cli
from fastlm.data import open_dataset, prepare
from fastlm.data.contents import cleaning_lines, contents
from fastlm.data.layouts import CausalRows, MaskedRows, SpanRows
from fastlm.data.packing import PADDING_SAMPLE
from fastlm.run.data_report import report
from fastlm.terminal import wrap

TEXT = "\n".join(f"Line {i} says that {i} times {i} is {i * i}, {'and more ' * (i % 9)}and no less." for i in range(80))


@pytest.fixture(params=[MaskedRows, CausalRows, SpanRows], ids=lambda kind: kind.name)
def prepared(request, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT + "\nshort")
    layout = request.param(32)
    size = 150 if request.param is MaskedRows else 500
    return prepare(
        [tmp_path / "a.txt"], f"train:{size}", tmp_path / "out", layout=layout, documents="line", shard_rows=9
    )


def test_counts(prepared):
    found = contents(prepared)
    tokens, counts, pieces = prepared.gather(np.arange(prepared.rows))
    samples = pieces[:, 0]
    assert found.pieces == (samples != PADDING_SAMPLE).sum() == found.lengths.sum()
    assert found.pieces - found.cut == prepared.documents
    assert found.filled.sum() == prepared.rows
    starts = pieces[:, 1] + np.repeat(np.arange(0, tokens.size, prepared.width), counts)
    lengths = np.diff(starts, append=tokens.size)[samples != PADDING_SAMPLE]
    assert (found.lengths * np.arange(prepared.width + 1)).sum() == lengths.sum()
    assert (found.filled * np.arange(prepared.width + 1)).sum() == lengths.sum()
    assert np.array_equal(found.lengths, np.bincount(lengths, minlength=prepared.width + 1))


def test_rows_as_text(prepared):
    lines = list(report(prepared, rows=prepared.rows))
    assert any("set aside: 1 " in line and "a.txt" in line for line in lines)
    assert sum(line.startswith("row ") for line in lines) == prepared.rows
    text = "".join(line for line in lines if line.startswith("  document "))
    assert text.count("⟦") == text.count("⟧")
    assert (text.count("⟦") > 0.3 * prepared.rows) == (prepared.layout != "causal")
    plain = text.replace("⟦", "").replace("⟧", "").lower()
    assert all(word in plain for word in ("line", "says", "times"))


def test_the_command(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastlm", "data", str(prepared.directory), "--rows", "1"])
    monkeypatch.setattr(_malloc, "tune", lambda: "")
    monkeypatch.setattr(_threads, "wait_policy", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out = " ".join(capsys.readouterr().out.split())
    assert f"{open_dataset(prepared.directory).rows:,} {prepared.layout} rows of 32 tokens" in out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_what_cleaning_took_has_a_line_each():
    taken = {"documents": 3, "dropped": 1, "characters": 1, "sample": {"place": "a:1", "text": "b\n", "became": "c"}}
    dropped = {"documents": 1, "dropped": 1, "characters": 2000, "sample": {"place": "a:2", "text": "d"}}
    aside = {"duplicate": {"count": 1, "first": ["a:2"]}, "malformed JSON": {"count": 1000, "first": ["a:3"]}}
    manifest = {"report": {"set_aside": aside}, "cleaning": {"rules": {"repair": taken, "duplicate": dropped}}}
    assert list(cleaning_lines(SimpleNamespace(manifest=manifest))) == [
        "  set aside: 1,000 malformed JSON (first: a:3)",
        '  repair: 1 document dropped, 2 documents changed, 1 character (first: a:1: "b\\n" became "c")',
        '  duplicate: 1 document dropped, 2,000 characters (first: a:2: "d")',
    ]


def test_an_indented_line_goes_on_further_in():
    assert wrap("  set aside: 1 too short\nnot indented: as it is", 14) == (
        "  set aside: 1\n    too short\nnot indented:\nas it is"
    )
