"""What a person sees of a run: pace, remaining time, MFU, loss spikes, advice when memory runs out, the table."""

import gc
import json
import math
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_clock import FakeClock
from training import corpus, small

from fastlm import chip, cpu_rate, info
from fastlm.data import open_dataset, prepare
from fastlm.data.batches import Batches
from fastlm.data.order import rows_at
from fastlm.run.metrics import _running_median, _shown, plot_loss, read_metrics
from fastlm.run.pace import Pace, due
from fastlm.run.progress import ProgressLine
from fastlm.run.summary import percent, summary_table
from fastlm.tasks.masked_lm import MaskedLM
from fastlm.train import _memory, evaluation, loop, pretrain, watch
from fastlm.train._advice import out_of_memory
from fastlm.train.spikes import Spikes, batch_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    prepare(
        corpus(directory / "corpus.txt"),
        "train:200",
        directory / "rows",
        row_tokens=32,
        documents="line",
        validation_share=0.1,
    )
    return directory / "rows"


@pytest.fixture
def said(monkeypatch):
    """What the progress line was told: fields of each step by name, and the notes."""
    lines, notes = [], []
    monkeypatch.setattr(ProgressLine, "update", lambda self, done, fields: lines.append(fields))
    monkeypatch.setattr(ProgressLine, "note", lambda self, text: notes.append(text))
    return lines, notes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No measurement of this machine kept, and a quick one for runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_rate, "_measured", {})
    monkeypatch.setattr(cpu_rate, "measure", lambda: dict.fromkeys(cpu_rate.BOTH, rate(1e12)))


# ---- pace


def test_neither_an_evaluation_nor_a_slow_step_moves_the_rate():
    clock = FakeClock()
    pace = Pace(clock.now)
    clock.advance(9000)  # the first step of a process is slow
    assert pace.step(100, 1e6) == 9.0
    for number in range(1, 41):
        clock.advance(3000 if number % 10 == 0 else 1000)  # a thread writes a checkpoint meanwhile
        pace.step(100, 1e6)
        if number == 20:
            with pace.apart("evaluation"):
                clock.advance(50_000)
            with pace.apart("checkpoint"):
                clock.advance(4000)
        if number >= 3:
            assert pace.tokens_per_s == 100.0
            assert pace.flops_per_s == 1e6
    assert pace.elsewhere == 54.0
    # The slow steps count in what is left: 44 s of 36 fast and 4 slow ones, without the first.
    assert pace.left(100, evaluation=2, checkpoint=3) == pytest.approx(100 * 48 / 40 + 2 * 50 + 3 * 4)


def test_what_was_not_timed_counts_as_nothing():
    clock = FakeClock()
    pace = Pace(clock.now)
    assert pace.left(5, evaluation=1) == 0
    clock.advance(2000)
    pace.step(10, 1.0)
    assert pace.left(5, evaluation=1) == 10.0


@pytest.mark.parametrize(
    ("step", "last", "every", "count"),
    [(0, 10, 5, 2), (0, 10, 4, 3), (5, 10, 5, 1), (4, 10, 5, 2), (9, 10, 0, 1), (10, 10, 5, 0), (10, 10, 0, 0)],
)
def test_due(step, last, every, count):
    assert due(step, last, every) == count
    assert count == sum(s == last or bool(every and s % every == 0) for s in range(step + 1, last + 1))


STEP, EVALUATION, COPY = 1000, 40_000, 7000  # ms


def run_on_a_clock(recipe, data, out, monkeypatch, step_ms=lambda step: STEP):
    """A run whose steps, evaluations and copies for checkpoints take the times above.

    (when the progress line was updated, and the end, in seconds; the summary)
    """
    clock, trained, evaluated, copied = FakeClock(), loop.train_step, evaluation.evaluation, loop.snapshot
    steps, shown, update = [], [], ProgressLine.update

    def taking(ms, function):
        def call(*args, **arguments):
            result = function(*args, **arguments)
            clock.advance(ms() if callable(ms) else ms)
            return result

        return call

    def step_time():
        steps.append(len(steps))
        return step_ms(len(steps))

    monkeypatch.setattr(watch, "Pace", lambda: Pace(clock.now))
    monkeypatch.setattr(loop, "train_step", taking(step_time, trained))
    monkeypatch.setattr(evaluation, "evaluation", taking(EVALUATION, evaluated))
    monkeypatch.setattr(loop, "snapshot", taking(COPY, copied))
    monkeypatch.setattr(ProgressLine, "update", lambda self, *what: (shown.append(clock.seconds), update(self, *what)))
    summary = pretrain(recipe, data, out).summary
    return [*shown, clock.seconds], summary


def number(text):
    return float(re.search(r"[\d,.]+", text)[0].replace(",", ""))


def seconds_of(eta):
    text = eta.removeprefix("ETA ").removesuffix(" s")
    return sum(int(part) * 60**i for i, part in enumerate(reversed(text.split(":"))))


def test_a_run_shows_a_steady_rate_and_all_that_is_left(data, tmp_path, monkeypatch, said):
    """Evaluations of 40 steps' time, copies of 7; once each was seen the time left is right, but for a copy now due."""
    recipe = small(train__max_steps=60, train__eval_every=10, train__checkpoint_every=15)
    times, summary = run_on_a_clock(recipe, data, tmp_path, monkeypatch)
    lines, notes = said
    rates = [number(fields[2]) for fields in lines]
    assert max(rates) / min(rates) < 1.1  # rows are not equally full
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["tokens_per_s"] for row in rows] == np.diff([row["tokens"] for row in rows], prepend=0).tolist()
    for step, fields in enumerate(lines, 1):
        if step > 15:
            left = times[-1] - times[step - 1]
            assert seconds_of(fields[3]) == pytest.approx(left, abs=8), (step, fields)
    assert summary["seconds"] == 60.0
    assert summary["other_seconds"] == 6 * EVALUATION / 1e3 + 4 * COPY / 1e3
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / 60, abs=0.1)
    assert not any("to go" in note for note in notes)


def test_a_long_run_says_how_long(data, tmp_path, monkeypatch, said):
    recipe = small(train__max_steps=12, train__eval_every=0)
    run_on_a_clock(recipe, data, tmp_path, monkeypatch, step_ms=lambda step: 600_000)
    assert [note for note in said[1] if "to go" in note] == ["about 20:07 to go, at 0 tokens/s"]


def test_a_writer_that_is_slow_shows_in_no_rate(data, tmp_path, monkeypatch, said):
    """While a thread writes a checkpoint, steps take twice as long for a while."""
    recipe = small(train__max_steps=60, train__checkpoint_every=20, train__eval_every=0)
    slow = {*range(21, 26), *range(41, 46)}
    run_on_a_clock(recipe, data, tmp_path, monkeypatch, lambda step: 2 * STEP if step in slow else STEP)
    rates = [number(fields[2]) for fields in said[0]]
    assert max(rates) / min(rates) < 1.1


# ---- MFU

MEASURE = cpu_rate.measure


class Machine:
    """Products on a clock: of 1024 x 1024 in 32 ms in float32 and 4 in bfloat16, of others by their FLOPs.

    slow: how many times as long a call takes, by its number; bfloat16: in place of the 4 ms; share: of the time, in
    which the threads have their processors
    """

    def __init__(self, slow=lambda call: 1.0, bfloat16=4.0, share=1.0):
        self.clock, self.slow, self.share, self.calls = FakeClock(), slow, share, []
        self.ms = {torch.float32: 32.0, torch.bfloat16: bfloat16}

    def product(self, size, dtype):
        def call():
            self.calls.append((size, dtype))
            self.clock.advance(self.ms[dtype] * (size / 1024) ** 3 * self.slow(len(self.calls)))

        return call

    def measure(self):
        processors = self.share * torch.get_num_threads()
        return MEASURE(self.clock.now, lambda: self.clock.now() * processors, self.product)


IDLE = {torch.float32: 2 * 1024**3 / 32e-3, torch.bfloat16: 2 * 1024**3 / 4e-3}


def rate(flops, busy=0.0):
    return cpu_rate.Rate(flops, busy)


def test_rates_are_of_the_fastest_of_products_in_turn():
    """On an idle machine; where some products are slowed down, or all, by work that has the processors meanwhile."""
    machine = Machine()
    assert {dtype: found.flops for dtype, found in machine.measure().items()} == pytest.approx(IDLE)
    assert 0.7 < machine.clock.seconds < 1.0
    # The smallest whose calls take 1.5 ms; the first of each is not timed.
    ladder = [(256, torch.float32), (512, torch.float32), *((size, torch.bfloat16) for size in (256, 512, 1024))]
    assert machine.calls[:20] == [call for call in ladder for _ in range(4)]
    assert set(zip(machine.calls[20::2], machine.calls[21::2])) == {((512, torch.float32), (1024, torch.bfloat16))}
    for slow, share, slower, busy in (
        (lambda call: 1.0 if call % 3 == 0 else 4.0, 1.0, 1.0, 0.75),
        (lambda call: 1.05 if call % 3 else 1.0, 0.9, 1.0, 0.1),
        (lambda call: 1.05 if call % 3 else 1.0, 1.0, 1.0, 0.05 / 1.05),
        (lambda call: 2.0, 0.5, 2.0, 0.5),
        (lambda call: 2.0, 1.0, 2.0, 0.0),
    ):
        found = Machine(slow, share=share).measure()
        for dtype, one in found.items():
            assert one.flops == pytest.approx(IDLE[dtype] / slower)
            assert one.busy == pytest.approx(busy)
            assert one.steady == (busy < 0.2)
    assert cpu_rate._product(64, torch.bfloat16)().shape == (64, 64)


def test_a_pause_chooses_no_smaller_product():
    """Other work pauses a call of 256 x 256, which is too small for the rate of a large product."""
    machine = Machine(lambda call: 100.0 if call in (2, 11) else 1.0)
    assert {dtype: found.flops for dtype, found in machine.measure().items()} == pytest.approx(IDLE)
    assert machine.calls[-2:] == [(512, torch.float32), (1024, torch.bfloat16)]


def test_slow_products_are_not_measured_for_long():
    """bfloat16 without units for it: half a second for 1024 x 1024."""
    machine = Machine(bfloat16=500.0)
    assert machine.measure()[torch.bfloat16].flops == pytest.approx(2 * 1024**3 / 0.5)
    assert machine.clock.seconds < 1.0
    assert max(size for size, dtype in machine.calls if dtype == torch.bfloat16) == 256


def test_a_rate_is_kept_for_the_machine(monkeypatch):
    assert cpu_rate.known(torch.float32) is None
    cpu_rate.remember({torch.float32: rate(5e10)})
    cpu_rate.remember({torch.float32: rate(4e10)})
    assert cpu_rate.known(torch.float32) == rate(5e10)
    monkeypatch.setattr(cpu_rate, "_measured", {})  # as another process
    assert cpu_rate.known(torch.float32) == rate(5e10)
    assert cpu_rate.known(torch.bfloat16) is None
    (key,) = json.loads(cpu_rate.path().read_text())
    name, flags = cpu_rate.cpu_info()
    assert key.startswith(f"{name}; ")
    assert key.endswith(f"; {torch.get_num_threads()} threads; torch {torch.__version__}; float32")
    assert ("; amx_bf16" in key) == ("amx_bf16" in flags)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        assert cpu_rate.known(torch.float32) is None
    # The last is what earlier versions wrote: nothing says how busy the machine was.
    for damaged in ("{", "[1]", '{"a": "b"}', json.dumps({key: {"flops": 5e10}}), json.dumps({key: 5e10})):
        cpu_rate.path().write_text(damaged)
        assert cpu_rate.known(torch.float32) is None
    cpu_rate.remember({torch.float32: rate(3e10, 0.5)})
    assert json.loads(cpu_rate.path().read_text()) == {key: {"flops": 3e10, "busy": 0.5}}


def test_a_rate_of_a_busy_machine_is_measured_again(monkeypatch):
    """By the next process that chooses a dtype; one of an idle machine replaces it, and stays."""
    waiting = [
        Machine(lambda call: 4.0 + call % 5 if call % 2 else 1.0),  # in rounds float32 alone is slowed down
        Machine(lambda call: (1.0, 4.0, 8.0)[call % 3]),
        Machine(),
    ]
    due, ratios = [], []
    monkeypatch.setattr(cpu_rate, "measure", lambda: waiting.pop(0).measure())
    for _ in range(4):
        monkeypatch.setattr(cpu_rate, "_measured", {})  # another process
        due.append(cpu_rate.due())
        float32, bfloat16 = cpu_rate.both()
        assert cpu_rate.both() == (float32, bfloat16)  # once in a process
        assert cpu_rate.due() == ""
        ratios.append(bfloat16.flops / float32.flops)
    assert due == ["once", "again, as it was busy before", "again, as it was busy before", ""]
    assert not waiting
    assert ratios[0] > 16
    assert ratios[1:] == pytest.approx([8.0] * 3)
    assert all(cpu_rate.known(dtype).steady for dtype in cpu_rate.BOTH)
    cpu_rate.remember({torch.float32: rate(1e15, 0.5)})  # a busy machine's does not replace it
    assert cpu_rate.known(torch.float32).flops == pytest.approx(IDLE[torch.float32])


def test_a_rate_that_cannot_be_kept_is_this_process_s(tmp_path, monkeypatch):
    """A file is where the directory should be; there is no home directory."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cpu_rate.Path, "home", no_home)
    for flops, cache in ((5e10, str(tmp_path / "file")), (6e10, "")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        cpu_rate.remember({torch.float32: rate(flops)})
        assert cpu_rate.known(torch.float32) == rate(flops)


def test_what_another_process_measured_since_counts(monkeypatch):
    """`fastlm info` beside a notebook whose rate is of a busy machine; the notebook's next run does not undo it."""
    cpu_rate.remember({torch.float32: rate(5e10, 0.5)})
    here = dict(cpu_rate._measured)
    monkeypatch.setattr(cpu_rate, "_measured", {})
    cpu_rate.remember({torch.float32: rate(4e10)})
    monkeypatch.setattr(cpu_rate, "_measured", here)
    assert cpu_rate.known(torch.float32) == rate(4e10)
    cpu_rate.remember({torch.float32: rate(9e10, 0.5)})
    monkeypatch.setattr(cpu_rate, "_measured", {})
    assert cpu_rate.known(torch.float32) == rate(4e10)


def test_where_the_peak_comes_from(monkeypatch):
    threads = torch.get_num_threads()
    assert str(chip.find_peak(CPU, torch.bfloat16)) == (
        f"n/a, the rate of this CPU in bfloat16 with {threads} threads was not measured; "
        f"`OMP_NUM_THREADS={threads} fastlm info` does"
    )
    known = f"1.234 TFLOP/s, as measured on this CPU in bfloat16 with {threads} threads"
    cpu_rate.remember({torch.bfloat16: rate(1.234e12, 0.25)})
    again = f"`OMP_NUM_THREADS={threads} fastlm info` measures again"
    assert str(chip.find_peak(CPU, torch.bfloat16)) == f"{known}, which was busy; {again}"
    cpu_rate.remember({torch.bfloat16: rate(1.234e12)})
    assert str(chip.find_peak(CPU, torch.bfloat16)) == known
    gpu = torch.device("cuda")
    for name, text in (
        ("NVIDIA H200", "989 TFLOP/s, the data sheet's in bfloat16"),
        ("NVIDIA A10", "n/a, no peak of NVIDIA A10 in bfloat16 is known"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert str(chip.find_peak(gpu, torch.bfloat16)) == text


def test_info_measures_the_rates_and_shows_their_ratio(monkeypatch):
    rates = {torch.float32: rate(98e9, 0.3), torch.bfloat16: rate(1.058e12, 0.05)}
    monkeypatch.setattr(cpu_rate, "measure", lambda: rates)
    text = "float32 98 GFLOP/s, bfloat16 1,058 GFLOP/s (10.8 times as many) in large matrix products"
    assert info._rates() == f"{text}; other work had up to 30% of the machine, try again"
    rates[torch.float32] = rate(98e9, 0.1)
    assert info._rates() == text
    assert cpu_rate.known(torch.bfloat16) == rates[torch.bfloat16]


def test_a_run_has_an_mfu_and_measures_nothing(data, tmp_path, monkeypatch, said):
    monkeypatch.setattr(cpu_rate, "measure", None)
    cpu_rate.remember({torch.float32: rate(1e9)})
    recipe = small(train__checkpoint_every=0)
    _, summary = run_on_a_clock(recipe, data, tmp_path, monkeypatch)
    dataset = open_dataset(data)
    task = MaskedLM(recipe, dataset, CPU)
    model = loop.make_model(recipe, dataset.tokenizer.vocab_size, dataset.tokenizer.pad_id)
    expected = [model.flops(task.micro(step, 0).counts) / 1e9 for step in range(12)]  # a second each
    assert [row["mfu"] for row in read_metrics(tmp_path / "metrics.jsonl")] == pytest.approx(expected, abs=1e-4)
    assert summary["mfu"] == pytest.approx(sum(expected) / 12, abs=1e-4)
    assert summary["peak_flops"] == 1e9
    assert "peak: 1 GFLOP/s, as measured on this CPU in float32" in said[1][0]
    assert said[0][-1][-2] == f"MFU {percent(summary['mfu'])}"


def test_mfu_of_several_processes_counts_all_their_devices(data, monkeypatch):
    cpu_rate.remember({torch.float32: rate(1e9)})
    task, world = MaskedLM(small(), open_dataset(data), CPU), loop.World(0, 4, CPU)
    assert watch.Watch(task, world, watch.Counters()).mfu(2e9) == 0.5


# ---- spikes


def test_a_loss_far_above_the_noise_is_a_spike():
    draw = torch.Generator().manual_seed(0)
    noise = (5 - 0.001 * torch.arange(400) + 0.1 * torch.randn(400, generator=draw)).tolist()
    spikes = Spikes()
    assert [spikes.add(loss) for loss in noise] == [None] * 400
    median, first = spikes.add(6.0)
    assert (median, first) == (pytest.approx(4.65, abs=0.1), True)
    assert spikes.add(5.9)[1] is False  # the same one
    assert spikes.add(None) is None
    assert spikes.add(4.1) is None
    assert spikes.add(5.9)[1] is True
    assert sum(spikes.add(7.0) is not None for _ in range(100)) <= 50  # the new level
    assert Spikes(noise[:10]).add(100.0) is None  # too few to compare with
    assert Spikes([2.0] * 50).add(2.001) is None
    assert Spikes([2.0] * 50).add(2.1) is not None


def test_rows_of_a_batch(data):
    dataset = open_dataset(data)
    rows = dataset.rows
    _, places = rows_at(range(3 * 8, 4 * 8), rows, 5)
    assert batch_rows(3, 8, dataset, 5) == f"epoch 0: rows {', '.join(map(str, places))}"
    ids = Batches(dataset, batch_rows=8, seed=5).at(3).input_ids.reshape(8, -1)
    assert torch.equal(ids[2], torch.from_numpy(dataset.gather(places[2:3])[0][0].astype("int64")))
    across = batch_rows(0, rows + 2, dataset, 5)  # one batch of an epoch and two rows of the next
    first, second = across.split("; ")
    assert first.startswith("epoch 0: rows ")
    assert first.endswith(f" and {rows - 8} more")
    assert second.startswith("epoch 1: rows ")


def spiking(monkeypatch, *at):
    original, steps = loop.train_step, []

    def step(model, optimizer, micros, **arguments):
        result = original(model, optimizer, micros, **arguments)
        number = int(micros[0].inputs["rng"][1]) + 1
        steps.append(number)
        return result + torch.tensor([30.0, 0.0]) if number in at else result

    monkeypatch.setattr(loop, "train_step", step)
    return steps


def test_spikes_of_a_run(data, tmp_path, monkeypatch, said):
    """Counted, and told once with the data; a resumed run counts as one that was never stopped."""
    recipe = small(train__max_steps=44, train__checkpoint_every=11, train__eval_every=0)
    spiking(monkeypatch, 30, 31, 40)
    assert pretrain(recipe, data, tmp_path / "run").summary["loss_spikes"] == 3
    notes = [note for note in said[1] if "spike" in note]
    rows = batch_rows(29, 8, open_dataset(data), 0)
    assert len(notes) == 2
    assert re.fullmatch(
        rf"step 30: loss spike, 3\d\.\d+ where the median .* is \d\.\d+; gradient norm \S+; trained on {rows}",
        notes[0],
    )
    assert notes[1].startswith("step 40: loss spike")
    for path in (tmp_path / "run" / "checkpoints" / "step-00000044").iterdir():
        path.unlink()
    for name in ("summary.json", "hf/model.safetensors"):
        (tmp_path / "run" / name).unlink()
    with pytest.warns(UserWarning, match="skipped"):
        assert pretrain(recipe, data, tmp_path / "run").summary["loss_spikes"] == 3


# ---- memory


def gpu_error():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


def host_error():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**58)
    return raised.value


@pytest.mark.parametrize(("make", "asked"), [(gpu_error, "2.15 GB"), (host_error, f"{2**60 / 1e9:,.2f} GB")])
def test_a_run_out_of_memory_names_a_micro_batch(make, asked, tmp_path, monkeypatch):
    error, original = make(), loop.train_step

    def step(model, optimizer, micros, **arguments):
        if int(micros[0].inputs["rng"][1]) == 9:
            raise error
        return original(model, optimizer, micros, **arguments)

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(ValueError, match=r"^train.micro_batch_tokens") as raised:
        pretrain(small(), corpus(tmp_path / "text.txt"), tmp_path / "run")
    assert str(raised.value) == (
        "train.micro_batch_tokens: expected a step that fits into the memory of cpu, got 256 tokens in one forward, "
        f"and memory ran out after step 9; torch asked for {asked} more, which cpu does not have; set "
        "train.micro_batch_tokens=128, which trains the same, and start again in another directory, with --init "
        f"{tmp_path / 'run'} from its newest checkpoint"
    )
    monkeypatch.setattr(loop, "train_step", original)
    recipe = small(train__micro_batch_tokens=128)
    assert pretrain(recipe, tmp_path / "text.txt", tmp_path / "next", init=tmp_path / "run").step == 12


def test_advice_for_processes_and_for_one_row():
    recipe = small(train__micro_batch_tokens=64, train__batch_tokens=512)
    where = {"step": 0, "saved": False, "out": Path("run")}
    advice = str(out_of_memory(gpu_error(), recipe, CPU, processes=8, **where))
    assert advice.endswith("train.micro_batch_tokens=32, which trains the same, and start again in another directory")
    recipe = small(train__micro_batch_tokens=32)
    assert "it is one row: choose a smaller model" in str(out_of_memory(gpu_error(), recipe, CPU, **where))
    assert out_of_memory(RuntimeError("shape mismatch"), recipe, CPU, **where) is None


def test_the_headline_has_the_memory(data, tmp_path, monkeypatch, said):
    """A bound where little is needed; for a long run the estimate itself."""
    cpu_rate.remember({torch.float32: rate(1e12)})
    short = small(train__max_steps=1, train__warmup_steps=0)
    pretrain(short, data, tmp_path / "short")
    bound = r"^memory of a step: less than \d+ MB of the [\d.,]+ [MG]B that are free on cpu$"
    assert re.search(bound, said[1][0], re.M)
    monkeypatch.setattr(_memory, "_LONG", 0)
    monkeypatch.setattr(_memory._Step, "peak", lambda self, rows: 1_234_000_000)
    monkeypatch.setattr(_memory, "available", lambda device: 9 * 10**9)
    said[1].clear()
    pretrain(short, data, tmp_path / "long")
    assert "\nmemory of a step: about 1.2 GB of the 9.0 GB that are free on cpu" in said[1][0]


# ---- at the end

SUMMARY = {
    "steps": 1252,
    "first_loss": 9.01,
    "final_loss": 6.0541,
    "val_loss": 5.9311,
    "val_perplexity": 376.6,
    "val_bits_per_byte": 1.9132,
    "unigram_entropy": 6.9,
    "tokens": 5_128_192,
    "seconds": 3725.0,
    "other_seconds": 31.0,
    "tokens_per_s": 31_234.5,
    "mfu": 0.614,
    "skipped_steps": 2,
    "loss_spikes": 3,
    "dropped_predictions": 0,
}


@pytest.mark.parametrize("width", [80, 120, 40, None])
def test_the_table_at_the_end(width):
    lines = summary_table(SUMMARY, Path("runs/mini/hf"), width).split("\n")
    assert width is None or max(map(len, lines)) <= width
    labels = [line[:14].strip() for line in lines]
    assert [label for label in labels if label] == [
        "loss",
        "held-out loss",
        "tokens",
        "speed",
        "time",
        "beware of",
        "model",
    ]
    text = " ".join(line[14:] for line in lines)
    assert text == (
        "9.010 -> 6.054 (unigram entropy 6.900) 5.931, perplexity 376.6, 1.913 bits a byte 5,128,192 in 1,252 steps "
        "31,234 tokens/s, MFU 61% 1:02:05, and 31 s for evaluations and checkpoints "
        "2 steps skipped, without finite gradients, 3 steps with a loss spike runs/mini/hf"
    )


def test_the_table_of_a_run_without_losses():
    summary = {**SUMMARY, "first_loss": None, "final_loss": None, "val_loss": None, "mfu": None, "other_seconds": 0.0}
    text = summary_table(summary, Path("hf"))
    assert "none: no step predicted a token" in text
    assert "held-out" not in text
    assert "MFU 130% (the peak was measured on a busy machine" in summary_table({**SUMMARY, "mfu": 1.3}, Path("hf"))
    assert [percent(mfu) for mfu in (0.614, 0.0064, 1.3)] == ["61%", "0.6%", "130%"]
    assert "MFU n/a\ntime          1:02:05\n" in text


def test_spikes_do_not_flatten_the_plot(tmp_path):
    losses = np.array([2 + math.exp(-i / 50) + 0.1 * (i % 3) for i in range(300)])
    losses[200:202] = 80.0
    _, smooth = _running_median(losses)
    assert smooth.max() < 3.3
    low, high = _shown(losses, [*smooth, 1.5, 4.0])  # a held-out loss, and a level
    assert 1.2 < low < 1.5
    assert 4.0 < high < 4.3
    assert _shown(np.array([1.0]), [1.0])[0] < 1.0
    assert len(_running_median(np.arange(7000.0))[0]) == 500
    plot_loss([], tmp_path / "none.png", levels={}, title="")
    assert (tmp_path / "none.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_holds_neither_model_nor_data(data, tmp_path, monkeypatch):
    """Without a pass of the garbage collector: files of the data would stay open, and the next run lack the memory."""
    models, make = [], loop.make_model

    def made(*args, **arguments):
        model = make(*args, **arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loop, "make_model", made)
    gc.disable()
    try:
        pretrain(small(train__max_steps=1, train__warmup_steps=0), data, tmp_path / "run")
        assert [model() for model in models] == [None]
    finally:
        gc.enable()
