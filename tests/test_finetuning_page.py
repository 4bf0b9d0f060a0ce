"""docs/finetuning.md: its commands run as printed, and leave what it says."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from labelled import make_model, reviews, sentences, write_conll, write_csv, write_jsonl

from fastlm import cli
from fastlm.run.directory import REPORTS
from fastlm.run.recipe import Recipe, load_recipe

PAGE = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.strip().splitlines()]


def written(folder):
    rows = reviews(40)
    make_model(folder / "bert", num_hidden_layers=1)
    write_csv(folder / "reviews.csv", rows)
    write_csv(
        folder / "pairs.tsv",
        [(text, "a film", label) for text, label in rows],
        ("premise", "hypothesis", "relation"),
        "\t",
    )
    write_jsonl(folder / "topics.jsonl", [{"text": text, "topics": [label, "all"]} for text, label in rows])
    write_csv(folder / "scores.csv", [(text, len(text)) for text, _ in rows], ("text", "score"))
    write_conll(folder / "entities.conll", sentences(40))
    write_conll(folder / "other.conll", sentences(10, seed=1))
    (folder / "new.txt").write_text("a film is good\nAnna found the song in Rome .\n")


def test_the_commands_run(tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    monkeypatch.setattr(cli._threads, "for_work", lambda *_: None)
    monkeypatch.setattr(cli._threads, "wait_policy", lambda *_: None)
    monkeypatch.setattr(cli._malloc, "tune", lambda *_: None)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # as many as the models are worth
    shown = {}
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert not ended.value.code, (command, err)
        shown[command] = out, err
    for run in ("reviews", "pairs", "topics", "scores", "entities", "early"):
        for name in (*REPORTS, "metrics.jsonl", "hf/config.json"):
            assert (tmp_path / "runs" / run / name).exists() or (run, name) == ("topics", "confusion.png"), (run, name)
    seeds = json.loads((tmp_path / "runs/seeds/metrics.json").read_text())
    assert seeds["runs"] == ["seed-0", "seed-1"]
    assert (tmp_path / "runs/seeds/hf/config.json").exists()
    assert "2: mean ± standard deviation" in shown[COMMANDS[-3]][0]
    predicted = [json.loads(line) for line in shown[COMMANDS[1]][0].splitlines()]
    assert [said["text"] for said in predicted] == (tmp_path / "new.txt").read_text().splitlines()
    assert predicted[0]["probabilities"].keys() == {"neg", "pos"}
    assert "2 rows in" in shown[COMMANDS[1]][1]
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 40
    tagged = [json.loads(line) for line in (tmp_path / "entities.jsonl").read_text().splitlines()]
    assert tagged[1]["tokens"] == ["Anna", "found", "the", "song", "in", "Rome", "."]
    assert "test " in shown[next(command for command in COMMANDS if "--test" in command)][0]


def test_the_page_names_keys_that_there_are():
    keys = set().union(*(Recipe(task)._keys() for task in ("classify", "regress", "tag")))
    named = set(
        re.findall(r"(?:train|data|model)\.\w+", PAGE.replace("metrics.json", "").replace("docs/training.md", ""))
    )
    assert named <= keys | {"training.md"}
    assert {"data.layout", "train.patience", "train.metric"} <= named
    assert load_recipe("classify").to_dict() == Recipe("classify").to_dict()
