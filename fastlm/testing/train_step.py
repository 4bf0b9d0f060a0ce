"""One training step of fastlm beside the same step of others, interleaved, each contender in a process of its own.

The contenders start from the same weights and take the same rows: (rows, row_tokens) token ids, every row one
sequence; of BERT's about 15% of the tokens are predicted, of GPT-2's all, of T5's a row of labels. Before the clock
starts each says its loss on the first batch, and one that computes something else is an error. Then every round runs
each of them for a few steps, in turn: a slow moment of the machine meets them all, and an allocator's settings are one
process's.

    fastlm                         fastlm's model and step, allocator tuned
    transformers                   the model with its head, AdamW and clipping as they come, allocator too
    transformers sdpa              SDPA named, fused AdamW, allocator tuned
    transformers compiled          the same under torch.compile
    transformers tuned             as an expert writes it: also BERT's head on the masked tokens only
    transformers tuned compiled    the expert's under torch.compile

Masks are made beforehand: the others get theirs for nothing. Beside the contenders a large matrix product is timed, in
the same rounds: a step that did nothing but its matrix products (fastlm/train/flops.py, attention's included), at the
rate of that one, is the bound.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from safetensors.torch import load_file, save_file

from fastlm import _malloc, models
from fastlm.data import Dataset
from fastlm.testing.timing import Timing
from fastlm.train import Recipe, load_recipe, make_model
from fastlm.train.flops import gpt2_flops, peak_flops, recipe_flops, t5_flops
from fastlm.train.objective import MaskedLM, Micro
from fastlm.train.optimizer import make_optimizer, train_step
from fastlm.train.recipe import DataTable, TrainTable


@dataclass(frozen=True)
class _Form:
    """How Transformers' model is trained. tuned: the allocator; sparse: the head runs on the masked tokens only."""

    attention: str | None = None  # None: what it takes by itself
    fused: bool = False
    tuned: bool = False
    sparse: bool = False
    compiled: bool = False


_FORMS = {
    "transformers": _Form(),
    "transformers sdpa": _Form("sdpa", fused=True, tuned=True),
    "transformers compiled": _Form("sdpa", fused=True, tuned=True, compiled=True),
    "transformers tuned": _Form("sdpa", fused=True, tuned=True, sparse=True),
    "transformers tuned compiled": _Form("sdpa", fused=True, tuned=True, sparse=True, compiled=True),
}
CONTENDERS = ("fastlm", "transformers", "transformers tuned")
EVERY = ("fastlm", *_FORMS)
_MATMUL = "matmul"  # the worker of the bound
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns
_BATCHES = 4  # different ones, in turn
_TENSORS = "input_ids", "labels"
_WARMUP = 3  # steps before the clock; the heap settles in as many
_CHECK = {"float32": 1e-4, "bfloat16": 2e-2}  # how far a contender's first loss may be from fastlm's, relatively


@dataclass(frozen=True)
class StepTime:
    """How a contender did: milliseconds a step, median and interquartile range over rounds; or why it did not run."""

    contender: str
    tokens: int = 0  # real ones, in a step
    ms: float = math.nan
    ms_iqr: float = math.nan
    mfu: float | None = None
    of_bound: float = math.nan  # of what the step's matrix products alone allow, at the rate of a large one
    peak_mb: float = math.nan  # CPU: resident memory of the process; CUDA: allocated by torch
    step_mb: float = math.nan  # the same less what there was before the first step: gradients and all that a step holds
    missing: str | None = None
    losses: tuple[float, ...] = ()  # of the first steps, where they were asked for

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.ms * 1e3


@dataclass(frozen=True)
class StepInputs:
    """What all contenders get: the model, and batches of (input_ids, labels), (rows, row_tokens) int64.

    BERT's and GPT-2's labels are like input_ids, T5's (rows, target tokens).
    """

    model: models.Bert | models.GPT2 | models.T5
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    tokens: int  # real ones in a batch, T5's encoder's
    flops: float  # of a step's matrix products

    @property
    def predicted(self) -> int:
        return _predicted_tokens(self.batches)


def _predicted_tokens(batches) -> int:
    return round(sum(int((labels != -100).sum()) for _, labels in batches) / len(batches))


def _masked_inputs(recipe: Recipe, vocab_size: int, pad_id: int, batches, tokens: int) -> StepInputs:
    """BERT's."""
    pairs = tokens * recipe.data.row_tokens
    flops = recipe_flops(recipe, vocab_size, tokens, pairs, _predicted_tokens(batches))
    return StepInputs(make_model(recipe, vocab_size, pad_id), batches, tokens, flops)


def from_dataset(recipe: Recipe, dataset: Dataset) -> StepInputs:
    """The first micro-batches of a run."""
    objective = MaskedLM(recipe, dataset, torch.device("cpu"))
    batches, tokens, shape = [], 0, (-1, recipe.data.row_tokens)
    for step in range(_BATCHES):
        micro = objective.micro(step, 0)
        labels = torch.full_like(micro.inputs["input_ids"], -100)
        labels[micro.inputs["index"]] = micro.inputs["targets"]
        batches.append((micro.inputs["input_ids"].view(shape), labels.view(shape)))
        tokens += micro.tokens
    tokenizer = dataset.tokenizer
    return _masked_inputs(recipe, tokenizer.vocab_size, tokenizer.pad_id, batches, round(tokens / _BATCHES))


def drawn(recipe: Recipe, vocab_size: int) -> StepInputs:
    """Micro-batches of ids drawn with the frequencies of words (Zipf's law), no padding; id 4 is the mask."""
    draw = torch.Generator().manual_seed(recipe.train.seed)
    shape = recipe.micro_batch_tokens // recipe.data.row_tokens, recipe.data.row_tokens
    batches = []
    for _ in range(_BATCHES):
        ids = _draw_ids(shape, vocab_size, draw)
        selected = torch.rand(shape, generator=draw) < recipe.data.mlm_probability
        batches.append((ids.masked_fill(selected, 4), ids.masked_fill(~selected, -100)))
    return _masked_inputs(recipe, vocab_size, 0, batches, recipe.micro_batch_tokens)


def _draw_ids(shape: tuple[int, int], vocab_size: int, draw: torch.Generator) -> torch.Tensor:
    weights = 1.0 / torch.arange(1.0, vocab_size - 4.0)
    return 5 + torch.multinomial(weights, math.prod(shape), replacement=True, generator=draw).view(shape)


def gpt2_step(rows: int = 4, length: int = 256, **sizes) -> tuple[Recipe, StepInputs]:
    """A step of GPT-2 on ids drawn likewise; sizes: of GPT2Config."""
    recipe, draw = _recipe(rows, length), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = models.GPT2(models.GPT2Config(**sizes))
    ids = [_draw_ids((rows, length), model.config.vocab_size, draw) for _ in range(_BATCHES)]
    c = model.config
    flops = gpt2_flops(
        rows * length, rows * length**2, rows * (length - 1),
        layers=c.n_layer, hidden=c.n_embd, inner=c.n_inner or 4 * c.n_embd, vocab=c.vocab_size,
    )  # fmt: skip
    return recipe, StepInputs(model, [(i, i) for i in ids], rows * length, flops)


def t5_step(rows: int = 8, length: int = 256, target: int = 64, **sizes) -> tuple[Recipe, StepInputs]:
    """A step of T5, rows of `length` tokens to rows of `target`; sizes: of T5Config."""
    recipe, draw = _recipe(rows, length), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = models.T5(models.T5Config(**sizes))
    batches = [
        tuple(_draw_ids((rows, n), model.config.vocab_size, draw) for n in (length, target)) for _ in range(_BATCHES)
    ]
    c = model.config
    flops = t5_flops(
        rows * length, rows * target, rows * length**2, rows * target**2, rows * length * target,
        layers=c.num_layers, decoder_layers=c.num_decoder_layers, hidden=c.d_model, heads=c.num_heads * c.d_kv,
        inner=c.d_ff, vocab=c.vocab_size, gated=c.feed_forward_proj == "gated-gelu",
    )  # fmt: skip
    return recipe, StepInputs(model, batches, rows * length, flops)


def _recipe(rows: int, length: int) -> Recipe:
    """Of rows, optimizer and dtype alone; its model table is not read."""
    return Recipe(data=DataTable(row_tokens=length), train=TrainTable(batch_tokens=rows * length))


def bert_step(name: str, rows: int, length: int) -> tuple[Recipe, StepInputs]:
    """A step of a recipe's BERT in float32, with dropout, on rows of BERT's vocabulary."""
    tokens = rows * length
    recipe = load_recipe(name).with_values(
        {
            "model.hidden_dropout_prob": 0.1,
            "model.attention_probs_dropout_prob": 0.1,
            "data.row_tokens": length,
            "train.batch_tokens": tokens,
            "train.micro_batch_tokens": tokens,
            "train.dtype": "float32",
        }
    )
    return recipe, drawn(recipe, 30522)


# Fixed steps, and those of models that no recipe trains yet, by the names that benchmarks know them by.
STEPS: dict[str, Callable[[], tuple[Recipe, StepInputs]]] = {
    "bert-mini-16x128": lambda: bert_step("bert-mini", 16, 128),
    "bert-small-8x128": lambda: bert_step("bert-small", 8, 128),
    "bert-small-32x128": lambda: bert_step("bert-small", 32, 128),
    "bert-base-4x128": lambda: bert_step("bert-base", 4, 128),
    "gpt2-small4x512": lambda: gpt2_step(n_embd=512, n_layer=4, n_head=8),
    "t5-small": t5_step,
}


def find_step(name: str, settings: Sequence[str] = (), vocab_size: int = 30522) -> tuple[Recipe, StepInputs]:
    """The step of a recipe, `drawn`, or of STEPS. ValueError for an unknown one, or settings that it does not take."""
    if name not in STEPS:
        recipe = load_recipe(name).with_settings(settings)
        return recipe, drawn(recipe, vocab_size)
    made, inputs = STEPS[name]()
    recipe = replace(made.with_settings(settings), name=name)
    if (recipe.model, recipe.data, recipe.micro_batch_tokens) != (made.model, made.data, made.micro_batch_tokens):
        raise ValueError(f"--set: {name} has its own model and batches; expected other keys of train alone")
    return recipe, inputs


def compare_steps(
    recipe: Recipe,
    inputs: StepInputs,
    *,
    device: str = "cpu",
    contenders: Sequence[str] = CONTENDERS,
    rounds: int = 7,
    seconds: float = 1.0,
    threads: int | None = None,
    curve: int = 0,
) -> list[StepTime]:
    """Times a step of `recipe`, one micro-batch, `rounds` times for each contender, each at least `seconds` long.

    threads: of torch and of fastlm's kernels, on a CPU (default torch's). curve: so many steps before the clock, whose
    losses are kept. RuntimeError where a contender's loss is not the first one's, or its process fails.
    """
    with tempfile.TemporaryDirectory(prefix="fastlm-step-") as name:
        directory = Path(name)
        _write_inputs(recipe, inputs, directory, device, threads)
        workers = {}
        try:
            for contender in (*contenders, _MATMUL):
                workers[contender] = _Worker(contender, directory)
            answers = {contender: worker.read() for contender, worker in workers.items()}
            missing = {contender: answer["missing"] for contender, answer in answers.items() if "missing" in answer}
            running = [contender for contender in contenders if contender not in missing]
            losses = {contender: answers[contender]["loss"] for contender in running}
            _same_losses(losses, _CHECK[recipe.train.dtype])
            curves = {contender: workers[contender].run(curve, "losses")["losses"] for contender in running if curve}
            running.append(_MATMUL)
            steps = {c: max(1, math.ceil(seconds / workers[c].run(_WARMUP)["seconds"])) for c in running}
            times = {contender: [] for contender in running}
            for _ in range(rounds):
                for contender in running:
                    answer = workers[contender].run(steps[contender])
                    times[contender].append(answer["seconds"] * 1e3)
                    answers[contender] = answer
        finally:
            for worker in workers.values():
                worker.close()
    peak = peak_flops(torch.device(device), getattr(torch, recipe.train.dtype))
    flops = inputs.flops
    bound_ms = flops / (2 * _MATMUL_SIZE[torch.device(device).type] ** 3) * Timing.of(times[_MATMUL]).ms
    out = []
    for contender in contenders:
        if contender in missing:
            out.append(StepTime(contender, missing=missing[contender]))
            continue
        timing, answer = Timing.of(times[contender]), answers[contender]
        out.append(
            StepTime(
                contender,
                inputs.tokens,
                timing.ms,
                timing.iqr,
                mfu=None if peak is None else flops / (timing.ms / 1e3 * peak),
                of_bound=bound_ms / timing.ms,
                peak_mb=answer["peak_mb"],
                step_mb=answer["step_mb"],
                losses=tuple(curves.get(contender, ())),
            )
        )
    return out


def table(times: Sequence[StepTime], *, title: str):
    """The result as a rich table, at most 80 columns wide: a row a contender. Who did not run is named below.

    fastlm: how many times as many tokens/s as the contender's. MFU only where the chip's peak is known.
    """
    notes = [
        "ms: of a step, median ± interquartile range; MB: peak",
        "bound: ms of the step's matrix products alone, 3 x forward,",
        "attention's too, at a large product's rate in this run, over ms",
        *(f"not run: {t.contender}: {t.missing}" for t in times if t.missing),
    ]
    out = Table(
        title=title, title_justify="left", caption="\n".join(notes), caption_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=0, min_width=74,
    )  # fmt: skip
    out.add_column("contender", no_wrap=True)
    has_mfu = any(t.mfu is not None for t in times)
    for column in ("tokens/s", "ms", *(("MFU",) if has_mfu else ()), "bound", "MB", "fastlm"):
        out.add_column(column, justify="right", no_wrap=True)
    ours = next((t.tokens_per_s for t in times if t.contender == "fastlm"), math.nan)
    for t in times:
        if not t.missing:
            mfu = ("n/a" if t.mfu is None else f"{t.mfu:.1%}",) if has_mfu else ()
            out.add_row(
                t.contender, f"{t.tokens_per_s:,.0f}", f"{t.ms:.1f} ± {t.ms_iqr:.1f}", *mfu, f"{t.of_bound:.0%}",
                f"{t.peak_mb:,.0f}", "" if t.contender == "fastlm" else f"{ours / t.tokens_per_s:.2f}x",
            )  # fmt: skip
    return out


# ---- the parent's side


def _write_inputs(recipe: Recipe, inputs: StepInputs, directory: Path, device: str, threads: int | None) -> None:
    """Weights, batches and what to do with them, for the workers."""
    inputs.model.save_pretrained(directory / "weights")
    tensors = {
        f"{name}.{i}": batch[j].clone()  # GPT-2's labels are its input_ids
        for i, batch in enumerate(inputs.batches)
        for j, name in enumerate(_TENSORS)
    }
    save_file(tensors, directory / "batches.safetensors")
    model = type(inputs.model).__name__
    spec = {"model": model, "train": asdict(recipe.train), "device": device, "threads": threads}
    (directory / "spec.json").write_text(json.dumps(spec))


def _same_losses(losses: dict[str, float], tolerance: float) -> None:
    first, expected = next(iter(losses.items()))
    for contender, loss in losses.items():
        if not abs(loss - expected) <= tolerance * abs(expected):
            raise RuntimeError(f"{contender} computes a loss of {loss:.6f} where {first} computes {expected:.6f}")


class _Worker:
    """A contender's process; it runs a round when it is told to, and is idle otherwise."""

    def __init__(self, contender: str, directory: Path):
        self.contender = contender
        environment = {k: v for k, v in os.environ.items() if k not in _malloc.VARIABLES}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastlm.testing.train_step", contender, str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip

    def read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self.contender} failed:\n{self._errors.read()[-2000:]}")
        return json.loads(line)

    def run(self, steps: int, what: str = "time") -> dict:
        """Runs so many steps: {"seconds": a step, "peak_mb", "step_mb"}; what="losses": {"losses": of each}."""
        self._process.stdin.write(f"{what} {steps}\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


# ---- the worker's side


def _work(contender: str, directory: Path) -> None:
    """Answers {"loss"} or {"missing"} at once, then every line of stdin, "time N" or "losses N", after N steps."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    form = _FORMS.get(contender)
    if form is None or form.tuned:
        _malloc.tune()
    spec = json.loads((directory / "spec.json").read_text())
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    cls, table, device = getattr(models, spec["model"]), TrainTable(**spec["train"]), torch.device(spec["device"])
    tensors = {name: value.to(device) for name, value in load_file(directory / "batches.safetensors").items()}
    batches = [tuple(tensors[f"{name}.{i}"] for name in _TENSORS) for i in range(_BATCHES)]
    try:
        if contender == _MATMUL:
            first_loss, step = math.nan, _build_matmul(table, device)
        elif form is None:
            model = cls.from_pretrained(directory / "weights").to(device)
            first_loss, step = fastlm_step(model, table, batches)
        else:
            first_loss, step = _build_transformers(cls, table, directory, batches, device, form)
    except ImportError as error:
        answer(missing=f"{error.name} is not installed")
        return
    before = _memory_mb(device)
    answer(loss=first_loss)
    done = 0
    for line in sys.stdin:
        what, steps = line.split()
        losses = []
        _wait(device)
        began = time.perf_counter()
        for _ in range(int(steps)):
            loss = step(done % _BATCHES)
            if what == "losses":
                losses.append(float(loss))
            done += 1
        _wait(device)
        seconds = time.perf_counter() - began
        if what == "losses":
            answer(losses=losses)
        else:
            peak = _peak_mb(device)
            answer(seconds=seconds / int(steps), peak_mb=peak, step_mb=peak - before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, kilobytes here


def _memory_mb(device: torch.device) -> float:
    """What is in use now, where _peak_mb says the most so far; elsewhere than on Linux, the most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20 if statm.exists() else _peak_mb(device)


def _build_matmul(table, device):
    """A step that is one large matrix product."""
    size = _MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, table.dtype))
    out = torch.empty_like(a)
    return lambda number: torch.matmul(a, b, out=out)


def _pack(name: str, rows: torch.Tensor, prefix: str = "") -> dict:
    """Rows (rows, length), each a sequence, as packed arguments of a model."""
    count, length = rows.shape
    offsets = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=rows.device)
    return {name: rows.flatten(), f"{prefix}cu_seqlens": offsets, f"{prefix}max_seqlen": length}


def _micro(cls, table, number, input_ids, labels) -> Micro:
    """A batch as `cls`, one of fastlm.models, takes it."""
    (rows, length), device = input_ids.shape, input_ids.device
    inputs = {**_pack("input_ids", input_ids), "rng": torch.tensor([table.seed, number], device=device)}
    predicted = labels.numel()
    if cls is models.T5:
        inputs |= _pack("labels", labels, "decoder_")
    else:
        inputs["positions"] = torch.arange(length, device=device).repeat(rows)
    if cls is models.GPT2:
        inputs["labels"], predicted = labels.flatten(), rows * (length - 1)
    if cls is models.Bert:
        index = _predicted(labels)
        inputs["index"], inputs["targets"], predicted = index, labels.flatten()[index], len(index)
    return Micro({**inputs, "reduction": "sum"}, tokens=0, pairs=0, predicted=predicted, dropped=0)


def fastlm_step(model, table: TrainTable, batches) -> tuple[float, Callable[[int], torch.Tensor]]:
    """(the first loss without dropout, what trains on batch `number` and returns the loss), of a model of ours."""
    device, dtype = next(model.parameters()).device, getattr(torch, table.dtype)
    micros = [_micro(type(model), table, number, *batch) for number, batch in enumerate(batches)]
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = model.eval()(**micros[0].inputs).item() / micros[0].predicted
    optimizer = make_optimizer(model.train(), table)

    def step(number):
        arguments = {"lr": table.lr, "grad_clip": table.grad_clip, "dtype": dtype}
        return train_step(model, optimizer, [micros[number]], **arguments)[0]

    return loss, step


def _build_transformers(cls, table, directory, batches, device, form):
    import transformers

    dtype = getattr(torch, table.dtype)
    load = getattr(transformers, cls.architecture).from_pretrained
    weights = directory / "weights"
    model = (load(weights, attn_implementation=form.attention) if form.attention else load(weights)).to(device)
    settings = {"lr": table.lr, "weight_decay": table.weight_decay, "betas": (table.beta1, table.beta2)}
    optimizer = torch.optim.AdamW(model.parameters(), eps=table.eps, fused=True if form.fused else None, **settings)
    indexes = [_predicted(labels) for _, labels in batches]
    targets = [labels.flatten()[index] for (_, labels), index in zip(batches, indexes)]
    if form.compiled:  # one shape for all batches
        longest = max(map(len, indexes))
        indexes = [torch.nn.functional.pad(index, (0, longest - len(index))) for index in indexes]
        targets = [torch.nn.functional.pad(target, (0, longest - len(target)), value=-100) for target in targets]

    def dense_loss(input_ids, labels, index, target):
        return model(input_ids=input_ids, labels=labels).loss

    def sparse_loss(input_ids, labels, index, target):
        hidden = model.bert(input_ids=input_ids).last_hidden_state.flatten(0, 1)[index]
        return torch.nn.functional.cross_entropy(model.cls(hidden).float(), target)

    loss_of = sparse_loss if form.sparse and cls is models.Bert else dense_loss
    if form.compiled:
        loss_of = torch.compile(loss_of, dynamic=False)

    def forward(number):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return loss_of(*batches[number], indexes[number], targets[number])

    with torch.no_grad():
        model.eval()
        loss = forward(0).item()
        model.train()

    def step(number):
        loss = forward(number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), table.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return loss, step


def _predicted(labels: torch.Tensor) -> torch.Tensor:
    return labels.flatten().ne(-100).nonzero().flatten()


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]))
