"""Checkpoints: complete or absent, checked, and resumed only by a run that they fit."""

import errno
import fcntl
import json
import os
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from training import corpus, small

from fastlm.data import open_dataset, prepare
from fastlm.run import image
from fastlm.run.checkpoint import load_newest, read_checkpoint, restore, save_checkpoint
from fastlm.run.metrics import read_metrics
from fastlm.run.recipe import Recipe
from fastlm.storage import file_checksum, json_checksum, write_json
from fastlm.train import loop, pretrain


def parts():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(directory, *steps, keep=9):
    for step in steps:
        save_checkpoint(directory, step, *parts(), {"counters": {"step": step}}, keep=keep)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path):
    model, optimizer = parts()
    save_checkpoint(tmp_path, 7, model, optimizer, {"tokens": 5}, keep=1)
    found, skipped = load_newest(tmp_path)
    assert (found.step, found.state, skipped) == (7, {"tokens": 5, "step": 7}, [])
    other, its_optimizer = parts()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    its_optimizer.state.clear()
    restore(found, other, its_optimizer)
    for ours, theirs in zip(model.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)
        assert optimizer.state[ours].keys() == its_optimizer.state[theirs].keys()
        assert all(torch.equal(value, its_optimizer.state[theirs][key]) for key, value in optimizer.state[ours].items())


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 10, 9, 100000000, keep=3)
    assert names(tmp_path) == ["step-00000009", "step-00000010", "step-100000000"]
    assert load_newest(tmp_path)[0].step == 100000000
    save(tmp_path, 20, keep=1)  # behind it, since it was damaged: what was just written stays
    assert names(tmp_path) == ["step-00000020"]


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "model.safetensors does not match"),
        ("optimizer.safetensors", lambda data: data[:-8], "optimizer.safetensors does not match"),
        ("state.json", lambda data: data.replace(b"3", b"4"), "state.json does not match"),
        ("manifest.json", lambda data: data.replace(b'"step": 3', b'"step": 4'), "manifest.json does not match"),
        ("manifest.json", lambda data: data[:40], "step-00000003: "),
        ("manifest.json", lambda data: b"[]", "step-00000003: "),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("manifest.json", None, "manifest.json is missing"),
    ],
)
def test_a_damaged_one_is_skipped_and_said(file, damage, reason, tmp_path):
    save(tmp_path, 2, 3)
    path = tmp_path / "step-00000003" / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    found, skipped = load_newest(tmp_path)
    assert found.step == 2
    assert len(skipped) == 1
    assert "step-00000003" in skipped[0]
    assert reason in skipped[0]


def test_what_a_killed_writer_left_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 2)
    (tmp_path / ".step-00000003.partial-abc").mkdir()
    (tmp_path / "step-00000004").mkdir()
    found, skipped = load_newest(tmp_path)
    assert found.step == 2
    assert "step-00000004: manifest.json is missing" in skipped[0]
    save(tmp_path, 3, 4)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    assert load_newest(tmp_path)[0].step == 4


def test_what_killed_writers_left_of_any_step_is_swept(tmp_path):
    for step in (5, 100000000):
        left = tmp_path / f".step-{step:08d}.partial-abc"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
    alive = tmp_path / ".step-00000006.partial-def"
    alive.mkdir()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        save(tmp_path, 2)
    finally:
        os.close(lock)
    assert names(tmp_path) == [alive.name, "step-00000002"]


def test_nothing_is_half_written_after_an_error(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, *parts(), {"not JSON": object()}, keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_version_1_is_read(tmp_path):
    """Its checksums were SHA-256."""
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest = {**manifest, "version": 1, "files": {name: file_checksum(path / name) for name in manifest["files"]}}
    del manifest["checksum"]
    write_json(path / "manifest.json", {**manifest, "checksum": json_checksum(manifest)})
    assert load_newest(tmp_path)[0].step == 1
    (path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors does not match its checksum" in load_newest(tmp_path)[1][0]


TENSORS = {
    "a": torch.arange(5, dtype=torch.uint8),
    "b": torch.randn(3, 1500, dtype=torch.float64),
    "c": torch.randn(7).bfloat16(),
    "d": torch.zeros(0, 4),
    "e": torch.tensor(3),
}


@pytest.mark.parametrize("direct", [True, False])
def test_an_image_is_a_safetensors_file(direct, tmp_path, monkeypatch):
    """Also where the file system knows no O_DIRECT, and where a write is short."""
    opened, pwrite, shorts = os.open, os.pwrite, [1000, 4096]

    def open_indirect(path, flags, *rest):
        if flags & image.DIRECT and not direct:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return opened(path, flags, *rest)

    def write_short(file, data, offset):
        return pwrite(file, data[: shorts.pop()] if shorts else data, offset)

    monkeypatch.setattr(os, "open", open_indirect)
    monkeypatch.setattr(os, "pwrite", write_short)
    taken = image.Image(TENSORS)
    checksum = taken.write(tmp_path / "image.safetensors")
    assert shorts == []
    assert image.file_checksum(tmp_path / "image.safetensors") == checksum
    assert taken.size == (tmp_path / "image.safetensors").stat().st_size
    found = load_file(tmp_path / "image.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(found[name].dtype == x.dtype and torch.equal(found[name], x) for name, x in TENSORS.items())


def test_an_image_is_taken_again_in_the_same_memory():
    first = image.Image(TENSORS)
    second = image.Image({name: x + 1 for name, x in TENSORS.items()}, into=first)
    assert torch.equal(second.tensors["b"], TENSORS["b"] + 1)
    assert second.tensors["b"].data_ptr() == first.tensors["b"].data_ptr()
    other = image.Image({"b": TENSORS["b"]}, into=first)
    assert other.tensors["b"].data_ptr() != first.tensors["b"].data_ptr()


def test_another_model_is_refused(tmp_path):
    save(tmp_path, 1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"0.bias is \(4,\), the model's is \(5,\)"):
        restore(load_newest(tmp_path)[0], model, torch.optim.AdamW(model.parameters()))


# ---- resuming a run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture
def run(text, tmp_path):
    """A finished run of twelve steps with the checkpoints 8 and 12, from text."""
    pretrain(small(), text, tmp_path / "run")
    return tmp_path / "run"


def losses(run):
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def test_resume_takes_an_older_one_where_the_newest_is_damaged(run, text):
    before = losses(run)
    newest = run / "checkpoints" / "step-00000012"
    (newest / "model.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="step-00000012: model.safetensors does not match"):
        result = pretrain(small(), text, run)
    assert result.step == 12
    assert losses(run) == before
    assert read_checkpoint(newest).step == 12


def test_resume_refuses_where_every_checkpoint_is_damaged(run, text):
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").unlink()
    before = names(run)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used"):
        pretrain(small(), text, run)
    assert names(run) == before
    assert len(losses(run)) == 12


def test_a_finished_run_is_left_as_it_is(run, text):
    before = (run / "metrics.jsonl").read_bytes(), (run / "summary.json").read_bytes()
    result = pretrain(small(train__checkpoint_every=3), text, run)
    assert result.summary == json.loads(before[1])
    assert ((run / "metrics.jsonl").read_bytes(), (run / "summary.json").read_bytes()) == before


def test_resume_refuses_another_recipe_or_other_data(run, text, tmp_path):
    with pytest.raises(ValueError, match=r"train\.lr is 0\.001, was 0\.005.*--init"):
        pretrain(small(train__lr=1e-3), text, run)
    prepare(corpus(tmp_path / "other.txt", lines=500), "train:200", tmp_path / "other", row_tokens=32, documents="line")
    with pytest.raises(ValueError, match=r"is not what the run was started on: .*its text has 500 documents, had 400"):
        pretrain(small(), tmp_path / "other", run)
    assert len(losses(run)) == 12


def test_refused_data_is_said_in_detail(run, text, tmp_path):
    """Which setting, that the tokenizer or the text is another; and that --init takes the weights to other data."""

    def refused(data, *reasons):
        with pytest.raises(ValueError, match="is not what the run was started on") as raised:
            pretrain(small(), data, run)
        for reason in (*reasons, "start another run: --init with this one's directory"):
            assert re.search(reason, str(raised.value)), raised.value
        assert len(losses(run)) == 12

    options = {"row_tokens": 32, "documents": "line"}
    prepare(text, "train:150", tmp_path / "tokenizer", **options)
    refused(tmp_path / "tokenizer", r"data\.tokenizer is 'train:150', was 'train:200'")
    prepare(text, "train:200", tmp_path / "setting", **options, min_chars=40)
    refused(tmp_path / "setting", r"data\.min_chars is 40, was 8")
    prepare(corpus(tmp_path / "other.txt", lines=500), "train:200", tmp_path / "text", **options)
    refused(tmp_path / "text", r"its text has 500 documents, had 400", r"its tokenizer is another one")
    changed = tmp_path / "changed.txt"
    changed.write_text(text.read_text().replace("apple", "melon"))
    refused(changed, "files of the text were changed, added or removed")


def test_never_refuses_a_directory_with_a_run(run, text, tmp_path):
    with pytest.raises(ValueError, match="holds a run, which `never` would overwrite"):
        pretrain(small(), text, run, resume="never")
    pretrain(small(), run / "data", tmp_path / "fresh", resume="never")
    assert losses(tmp_path / "fresh") == losses(run)


def test_resume_from_a_named_checkpoint_starts_another_run(run, text, tmp_path):
    pretrain(small(), text, tmp_path / "branch", resume=str(run / "checkpoints" / "step-00000008"))
    assert losses(tmp_path / "branch") == losses(run)
    with pytest.raises(ValueError, match=r"holds a run that is not at .*; continue it with --resume auto"):
        pretrain(small(), text, run, resume=str(run / "checkpoints" / "step-00000008"))
    with pytest.raises(ValueError, match="expected auto, never, or a checkpoint's or a run's directory"):
        pretrain(small(), text, tmp_path / "nowhere", resume=str(tmp_path / "missing"))
    with pytest.raises(
        ValueError, match=r"has another recipe: train\.lr is 0\.001.*only train\.checkpoint_every"
    ) as raised:
        pretrain(small(train__lr=1e-3), text, tmp_path / "nowhere", resume=str(run))
    assert "name another directory" not in str(raised.value)  # one was named
    assert re.search(r"by another recipe, give --init \S+ and no --resume$", str(raised.value))
    assert not (tmp_path / "nowhere").exists()


def test_two_processes_cannot_train_in_one_directory(tmp_path, text):
    (tmp_path / "run").mkdir()
    held = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="another process trains in"):
            pretrain(small(), text, tmp_path / "run")
    finally:
        os.close(held)


def test_a_run_without_a_checkpoint_starts_again(tmp_path, text):
    """Killed before the first checkpoint: the same recipe starts anew, another is refused."""
    pretrain(small(), text, tmp_path / "whole")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.json", "metrics.jsonl"):
        (run / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    with pytest.raises(ValueError, match=r"train\.seed is 1, was 0"):
        pretrain(small(train__seed=1), text, run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(small(), text, run)
    assert losses(run) == losses(tmp_path / "whole")


def stop_after(monkeypatch, step):
    """From here on a run is as if killed in the step after `step`."""
    original = loop.train_step

    def step_or_die(model, optimizer, micros, **arguments):
        if int(micros[0].inputs["rng"][1]) >= step:
            raise KeyboardInterrupt
        return original(model, optimizer, micros, **arguments)

    monkeypatch.setattr(loop, "train_step", step_or_die)


@pytest.mark.parametrize("by", ["checkpoint", "run"])
@pytest.mark.parametrize("killed", [4, 6, 10])
def test_the_same_command_goes_on_with_a_run_from_another(by, killed, text, tmp_path, monkeypatch):
    """Also where the other run has gone on and dropped the checkpoint meanwhile, and with --resume auto."""
    recipe = small(train__max_steps=12, train__checkpoint_every=4, train__keep_checkpoints=9)
    pretrain(recipe, text, tmp_path / "whole")
    source = tmp_path / "source"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, text, source)
    origin = source / "checkpoints" / "step-00000004"
    resume, branch = str(origin if by == "checkpoint" else source), tmp_path / "branch"
    with monkeypatch.context() as patch:
        stop_after(patch, killed)
        if killed == 4:  # before it has a checkpoint of its own
            patch.setattr(loop, "write_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, text, branch, resume=resume)
    assert json.loads((branch / "recipe.json").read_text())["origin"] == str(origin)
    assert len(losses(branch)) == killed
    assert (branch / "checkpoints").exists() is (killed > 4)
    pretrain(recipe, text, source)  # on to other checkpoints
    if killed > 4:
        shutil.rmtree(origin)
    with monkeypatch.context() as patch:
        stop_after(patch, 11)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, text, branch, resume="auto")
    with pytest.raises(ValueError, match=r"and was started from .*step-00000004; continue it with --resume auto"):
        pretrain(recipe, text, branch, resume=str(source / "checkpoints" / "step-00000012"))
    result = pretrain(recipe, text, branch, resume=resume)
    assert result.step == 12
    assert losses(branch) == losses(tmp_path / "whole")


def dying(*_, **__):
    raise KeyboardInterrupt


def test_a_run_from_another_that_is_gone(run, text, tmp_path, monkeypatch):
    origin = run / "checkpoints" / "step-00000008"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_checkpoint", dying)
        with pytest.raises(KeyboardInterrupt):
            pretrain(small(), text, tmp_path / "branch", resume=str(origin))
    shutil.rmtree(origin)
    with pytest.raises(ValueError, match=r"no checkpoint of its own yet, .*step-00000008: manifest.json is missing"):
        pretrain(small(), text, tmp_path / "branch")


def test_a_run_from_the_last_checkpoint_of_another(run, text, tmp_path):
    """Nothing is left to train, and the same command finds it finished."""
    for _ in range(2):
        result = pretrain(small(), text, tmp_path / "branch", resume=str(run))
        assert result.step == 12
        assert names(tmp_path / "branch" / "checkpoints") == ["step-00000012"]
    assert losses(tmp_path / "branch") == losses(run)


def test_lost_metrics_are_said(run, text, capsys):
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "metrics.jsonl").unlink()
    pretrain(small(), text, run)
    assert "metrics.jsonl lacks 8 of the 8 steps before" in capsys.readouterr().err
    assert len(losses(run)) == 4


@pytest.mark.parametrize("left", [("hf", "summary.json"), ("hf",), ("summary.json",)])
def test_a_new_run_is_refused_where_a_finished_one_lies(left, run, text):
    """Without a checkpoint there is no saying whose model that is."""
    for name in {"checkpoints", "hf"} - set(left):
        shutil.rmtree(run / name)
    for name in {"metrics.jsonl", "recipe.json", "summary.json", "loss.png"} - set(left):
        (run / name).unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"out: expected no finished run in .*; found {' and '.join(left)}\. Delete"):
        pretrain(small(), text, run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_what_is_trained_again_replaces_the_model_and_the_summary(run, text, monkeypatch):
    weights = (run / "hf" / "model.safetensors").read_bytes()
    (run / "hf" / "model.safetensors").write_bytes(b"of another day")
    pretrain(small(), text, run)
    assert (run / "hf" / "model.safetensors").read_bytes() == b"of another day", "a finished run is left as it is"
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            pretrain(small(), text, run)
    assert not (run / "summary.json").exists()
    pretrain(small(), text, run)
    assert (run / "summary.json").exists()
    assert (run / "hf" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("content", ["", '{"name": "small", "mod', "[]", '{"train": 3}', "\0\0"])
def test_a_damaged_recipe_is_said_with_its_remedy(content, run, text):
    (run / "recipe.json").write_text(content)
    before = names(run)
    with pytest.raises(ValueError, match=r"out: .*recipe\.json is damaged \(.*\); delete it: a run with checkpoints"):
        pretrain(small(), text, run)
    assert names(run) == before
    (run / "recipe.json").unlink()
    assert pretrain(small(), text, run).step == 12


def before_tasks(content):
    """What Recipe.to_dict gave before recipes named their task and a model's whole configuration."""
    model = {key: value for key, value in content["model"].items() if key not in ("hidden_act", "type_vocab_size")}
    return {"model": model, "data": content["data"], "train": content["train"]}


def test_runs_of_recipes_without_a_task_are_continued(text, tmp_path, monkeypatch):
    recipe = small()
    pretrain(recipe, text, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        to_dict = Recipe.to_dict
        patch.setattr(Recipe, "to_dict", lambda self: before_tasks(to_dict(self)))
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, text, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert "task" not in stored
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000004").state["recipe"] == before_tasks(stored)
    with pytest.raises(ValueError, match=r"model\.hidden_act is 'gelu_new', was 'gelu'"):
        pretrain(small(model__hidden_act="gelu_new"), text, tmp_path / "run")
    assert pretrain(recipe, text, tmp_path / "run").step == 12
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_recipe_that_this_version_does_not_read(run, text):
    shutil.rmtree(run / "checkpoints")
    for name in ("hf", "summary.json"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    stored = json.loads((run / "recipe.json").read_text())
    for change, reason in (
        ({"task": "of_tomorrow"}, "task: expected one of .*, got 'of_tomorrow'"),
        ({"train": {**stored["train"], "warp": 1}}, "train.warp: there is no such key"),
    ):
        (run / "recipe.json").write_text(json.dumps({**stored, **change}))
        with pytest.raises(ValueError, match=rf"a recipe that this version of fastlm does not read \({reason}"):
            pretrain(small(), text, run)


@pytest.mark.parametrize("killed_in", ["MetricsFile", "train_step", "plot_loss"])
def test_a_run_inside_its_own_corpus_goes_on(killed_in, text, tmp_path, monkeypatch):
    """What a run writes is no text of it, at whatever point it was stopped."""
    data, run = tmp_path / "data", tmp_path / "data" / "runs" / "one"
    data.mkdir()
    shutil.copy(text, data)

    with monkeypatch.context() as patch:
        patch.setattr(loop, killed_in, dying)
        with pytest.raises(KeyboardInterrupt):
            pretrain(small(), data, run)
    assert (run / "recipe.json").exists()
    before = open_dataset(run / "data").manifest
    assert pretrain(small(), data, run).step == 12
    assert open_dataset(run / "data").manifest == before
    pretrain(small(), data, tmp_path / "data" / "two")
    set_aside = open_dataset(tmp_path / "data" / "two" / "data").manifest["report"]["set_aside"]
    assert set_aside["directory of a run"] == {"count": 1, "first": ["data/runs/one"]}
    assert losses(tmp_path / "data" / "two") == losses(run)
    with pytest.raises(ValueError, match=r"data: expected text, got .*two, which is a run's directory"):
        pretrain(small(), data / "two", data / "two")
