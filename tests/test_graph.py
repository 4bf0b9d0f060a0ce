"""Micro-batches as a CUDA graph, on a stand-in for torch.cuda.CUDAGraph: a replay runs the captured function again."""

import json
import shutil

import pytest
import torch
from recorded_graph import Recorded
from training import corpus, small

from fastlm.data import open_dataset, prepare
from fastlm.run.metrics import read_metrics
from fastlm.tasks import make_model
from fastlm.tasks.masked_lm import MaskedLM
from fastlm.train import graph as graphs
from fastlm.train import loop, pretrain
from fastlm.train.optimizer import make_optimizer, train_step
from fastlm.train.parallel import World

DROPOUT = {"model__hidden_dropout_prob": 0.1, "model__attention_probs_dropout_prob": 0.1}
DEVICE = World(0, 1, torch.device("cuda"))


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setattr(graphs, "CudaGraph", Recorded)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare(corpus(directory / "corpus.txt"), "train:200", directory / "rows", row_tokens=32, documents="line")
    return open_dataset(directory / "rows")


def parts(data, **settings):
    """Recipe, model, and a task whose micro-batches have one shape, as on a device."""
    recipe = small(train__micro_batch_tokens=128, **DROPOUT, **settings)
    task = MaskedLM(recipe, data, torch.device("cuda"))
    return recipe, make_model(recipe, data.tokenizer.vocab_size, data.tokenizer.pad_id).train(), task


def run(data, dtype, change=None, graph=True, **settings):
    """(loss and norm of five steps, the weights after them, the graph). change(step, model, micros): before a step."""
    recipe, model, task = parts(data, **settings)
    optimizer, results, taken = make_optimizer(model, recipe.train), [], None
    optimizer.low_gradients = False  # as on a device, whose gradients are float32 with and without a graph
    for step in range(5):
        micros = [task.micro(step, m) for m in range(recipe.micro_count)]
        if step == 0 and graph:
            taken = graphs.StepGraph(model, dtype)
            assert taken.choose(micros[0], "auto").taken
            assert all(p.grad is None for p in model.parameters())
        restore = change(step, model, micros) if change else None
        results.append(train_step(model, optimizer, micros, lr=1e-2, grad_clip=1.0, dtype=dtype, graph=taken).tolist())
        if restore:
            restore()
    return results, [p.detach() for p in model.parameters()], taken


def equal(got, expected):
    assert str(got[0]) == str(expected[0])  # so that a NaN equals itself
    assert all(map(torch.equal, got[1], expected[1]))


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_and_weights_are_those_without_a_graph(dtype, micros, data):
    """To the bit, with dropout, accumulation and clipping; each step has other tokens, masks and dropout."""
    settings = {"train__batch_tokens": 128 * micros}
    expected, got = run(data, dtype, graph=False, **settings), run(data, dtype, **settings)
    equal(got, expected)
    assert len({loss for loss, _ in got[0]}) == 5
    graph = got[2]._graph
    assert (graph.warmed, graph.replays) == (3, 1 + 5 * micros)  # one was timed


def test_other_shapes_and_steps_that_are_skipped(data):
    """A micro-batch of other shapes runs by single launches; a step that is not finite changes nothing, as without."""

    def change(step, model, micros):
        if step == 1:  # the head on fewer places
            for name in ("index", "targets"):
                micros[0].inputs[name] = micros[0].inputs[name][:-4]
        if step == 2:
            bias = model.head.bias.detach()
            before = bias.clone()
            bias.fill_(torch.inf)
            return lambda: bias.copy_(before)

    expected, got = run(data, torch.bfloat16, change, graph=False), run(data, torch.bfloat16, change)
    equal(got, expected)
    assert [loss == loss for loss, _ in got[0]] == [True, True, False, True, True]
    assert got[2]._graph.replays == 1 + 5 * 2 - 1


def test_a_longer_bound_is_another_shape(data):
    _, model, task = parts(data)
    graph, micro = graphs.StepGraph(model, torch.float32), task.micro(0, 0)
    assert not graph.fits(micro)
    graph.capture(micro)
    assert graph.fits(task.micro(3, 1))
    micro.inputs["max_seqlen"] += 1
    assert not graph.fits(micro)


@pytest.mark.parametrize(("times", "taken"), [((2.0, 1.0), True), ((1.0, 0.99), False)])
def test_the_choice_is_written_and_kept(times, taken, data, tmp_path, monkeypatch):
    """A resumed run does as the file says, whatever it would measure."""
    monkeypatch.setattr(Recorded, "times", times)
    _, model, task = parts(data)
    arguments = model, task.micro(0, 0), torch.float32, "auto", tmp_path / "cuda_graph.json"
    graph, choice = graphs.find_graph(*arguments)
    assert (graph is not None) is taken is choice.taken
    assert json.loads(arguments[-1].read_text()) == {
        "taken": taken,
        "eager_ms": 1e3 * times[0],
        "graph_ms": 1e3 * times[1],
        "why": "",
    }
    assert f"{1e3 * times[0]:.2f} ms by single launches" in str(choice)
    monkeypatch.setattr(Recorded, "times", times[::-1])
    assert (graphs.find_graph(*arguments)[0] is not None) is taken


def test_a_capture_that_fails(data, tmp_path, monkeypatch):
    def refuse(self, function):
        function()
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(Recorded, "capture", refuse)
    _, model, task = parts(data)
    path = tmp_path / "cuda_graph.json"
    graph, choice = graphs.find_graph(model, task.micro(0, 0), torch.float32, "auto", path)
    assert graph is None
    assert str(choice) == "not used: the capture failed: CUDA out of memory."
    assert not json.loads(path.read_text())["taken"]
    with pytest.raises(torch.OutOfMemoryError):
        graphs.find_graph(model, task.micro(0, 0), torch.float32, True, path)


def test_a_run(data, tmp_path, monkeypatch, capsys):
    """The loop asks once, before the first step; losses are those of single launches, also after a resume."""
    assert not graphs.possible("auto", World(0, 1, torch.device("cpu")))
    settings = {**DROPOUT, "train__max_steps": 4, "train__checkpoint_every": 2, "train__warmup_steps": 0}
    pretrain(small(**settings), data.directory, tmp_path / "plain")
    assert not (tmp_path / "plain" / "cuda_graph.json").exists()
    monkeypatch.setattr(loop, "possible", lambda setting, world: True)
    made = []
    monkeypatch.setattr(graphs, "CudaGraph", lambda: made.append(Recorded()) or made[-1])
    pretrain(small(**settings), data.directory, tmp_path / "run")
    assert "CUDA graph of a micro-batch used: 1000.00 ms a micro-batch" in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "run" / "cuda_graph.json").read_text())["taken"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    (tmp_path / "run" / "summary.json").unlink()
    pretrain(small(**settings), data.directory, tmp_path / "run")
    assert [graph.replays > 0 for graph in made] == [True, True]
    expected, got = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "run"))
    assert [row["loss"] for row in got] == [row["loss"] for row in expected]


def test_where_there_is_no_graph(data, tmp_path):
    for setting, world in (
        (False, DEVICE),
        ("auto", World(0, 2, torch.device("cuda"))),
        ("auto", World(0, 1, torch.device("cpu"))),
    ):
        assert not graphs.possible(setting, world)
    assert graphs.possible("auto", DEVICE)
    for world in (World(0, 1, torch.device("cpu")), World(0, 2, torch.device("cuda"))):
        with pytest.raises(ValueError, match=r"train.cuda_graph: expected False or \"auto\" with . processes on"):
            graphs.check_setting(True, world)
    with pytest.raises(ValueError, match=r"train\.cuda_graph: expected False"):
        pretrain(small(train__cuda_graph=True), data.directory, tmp_path / "run")
    for wrong in ("yes", 1):
        with pytest.raises(ValueError, match=r"train\.cuda_graph: expected"):
            small(train__cuda_graph=wrong)
