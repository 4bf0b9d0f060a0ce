"""The benchmark of generation: what it runs, prints and judges, with models of two layers."""

import json
import sys

import pytest
import torch

from fastlm import _native
from fastlm.bench import generation, generation_peers

pytestmark = pytest.mark.skipif(bool(_native.missing_cpu()), reason=str(_native.missing_cpu()))


def test_contenders_write_the_same_tokens_and_a_missing_library_is_named(tmp_path, capfd):
    threads = torch.get_num_threads()
    command = ["--models", "gpt2-tiny", "--batch", "2", "--tokens", "3", "--rounds", "1", "--threads", "1"]
    command += ["--weights", "float32", "int8", "--json", str(tmp_path / "gen.json")]
    try:
        assert generation.main([*command, "--peers-python", sys.executable]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "gen.json").read_text())["rows"]
    found = {row["contender"]: row for row in rows}
    assert {"fastlm float32", "fastlm int8", "transformers"} <= found.keys()
    assert found["fastlm float32"]["same"] == 1.0
    assert found["fastlm float32"]["bound"] is None  # its weights fit the last cache
    assert found["fastlm int8"]["bytes"] < found["fastlm float32"]["bytes"]
    out = capfd.readouterr().out
    for library in {"ctranslate2", "onnxruntime"}:
        assert f"{library} float32" in out
    assert "onnxruntime float32: not run, " in out


def test_a_row_that_falls_short_says_of_what():
    def row(rate, **more):
        return {"rate": rate, "bound": None, "read_ms": 20.0, "ids": [[1], [2]], **more}

    rows = {"fastlm float32": row(60.0, bound=0.7), "fastlm int8": row(150.0), "transformers": row(40.0)}
    rows |= {"ctranslate2 float32": row(50.0), "ctranslate2 int8": row(160.0)}
    # The bound is 2 rows in 20 ms, 100 tokens/s: 0.8 of it are twice Transformers'.
    assert generation.goals(rows, "float32") == ["80% of the bound", "2.00 x transformers (80 tokens/s)"]
    assert generation.goals(rows, "int8") == ["1.00 x ctranslate2 int8 (160 tokens/s)"]
    rows["fastlm int8"]["rate"], rows["fastlm float32"] = 161.0, row(81.0, bound=0.81)
    assert not generation.goals(rows, "int8") + generation.goals(rows, "float32")


def test_the_share_of_equal_tokens_ends_at_the_first_different_one():
    assert generation.same_tokens([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == pytest.approx(4 / 6)
    assert generation.same_tokens([[1, 2]], [[1, 2, 3, 4]]) == 0.5  # a row that ended early


def test_a_peer_answers_with_seconds_and_ids_or_why_it_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(generation_peers.GENERATORS, "counting", lambda spec: lambda tokens: [list(range(tokens))])
    monkeypatch.setattr(sys, "stdin", iter(["2\n", "3\n"]))
    generation_peers.main({"library": "counting"})
    ready, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready == {"ready": True}
    assert [answer["ids"] for answer in answers] == [[[0, 1]], [[0, 1, 2]]]
    monkeypatch.setattr(sys, "stdin", iter(()))
    generation_peers.main({"library": "onnxruntime", "family": "t5"})
    assert "missing" in json.loads(capsys.readouterr().out)
