"""A step of generation beside other libraries, on a CPU: the program of benchmarks/bench_generation.py.

Every contender writes the same number of tokens after the same prompts, greedily, with random weights: fastlm and
Transformers here, the others in a process of the Python that has them. The time of a step is
(time for all tokens - time for one) / (tokens - 1), so the prompts do not count. Contenders take turns; the best round
counts, and the bound is of the best of as many reads.

The bound: the weights and the keys and values that a step reads, over the speed of a read of a buffer as large, in the
same run. There is none where the weights fit the last cache, in which the buffer would lie too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlm import _native, models
from fastlm.bench import ceilings, results
from fastlm.bench.generation_peers import word
from fastlm.generate import cpu_decoder, decoders, generate

PROMPT = 32  # tokens, T5's text as many
MODELS: dict[str, Callable[[], models.GPT2 | models.T5]] = {
    "gpt2-124m": lambda: models.GPT2(models.GPT2Config()),
    "t5-small": lambda: models.T5(models.T5Config()),
    "gpt2-tiny": lambda: models.GPT2(models.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2)),
    "t5-tiny": lambda: models.T5(
        models.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    ),
}
Write = Callable[[int], tuple[float, list[list[int]]]]  # tokens -> (seconds, ids)


@dataclass
class Case:
    """One model and batch. `prompts`: ids, without the tokens that end a text."""

    name: str
    model: models.GPT2 | models.T5
    prompts: list[list[int]]
    directory: Path  # the model, in Transformers' layout
    threads: int

    @property
    def family(self) -> str:
        return "t5" if isinstance(self.model, models.T5) else "gpt2"


def write_tokenizer(directory: Path, vocab: int) -> None:
    """One word for each id, which converters ask for."""
    tokens = {word(id): id for id in range(vocab)}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": word(0)},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    special = {"bos_token": word(1), "eos_token": word(1), "unk_token": word(0), "pad_token": word(0)}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )


def fastlm_writer(case: Case, weights: str) -> Write:
    def write(tokens: int):
        cpu_decoder.pack(case.model, weights)  # ahead of the clock: only the form that was used last is kept
        began = time.perf_counter()
        out = generate(case.model, case.prompts, max_new_tokens=tokens, eos_token_id=(), weights=weights)
        return time.perf_counter() - began, [row.ids for row in out]

    return write


def transformers_writer(case: Case) -> Write:
    import transformers

    theirs = getattr(transformers, case.model.architecture).from_pretrained(case.directory).eval()
    prompts = torch.tensor(case.prompts)
    read = prompts.shape[1] if case.family == "gpt2" else 1  # the decoder's first token

    def write(tokens: int):
        began = time.perf_counter()
        with torch.inference_mode():
            out = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - began, out[:, read:].tolist()

    return write


class Peer:
    """A library in a process of its own; see generation_peers.py. RuntimeError where it cannot run."""

    def __init__(self, python: str, library: str, weights: str, case: Case, scratch: Path) -> None:
        spec = {
            "library": library,
            "family": case.family,
            "weights": weights,
            "threads": case.threads,
            "prompts": case.prompts,
            "model": str(case.directory),
            "scratch": str(scratch),
        }
        program = Path(__file__).with_name("generation_peers.py")
        self.process = subprocess.Popen(
            [python, "-I", str(program), json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if "ready" not in (answer := self._answer()):
            self.close()
            raise RuntimeError(answer["missing"])

    def __call__(self, tokens: int):
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["ids"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"missing": f"the process ended with status {self.process.wait()}"}


def cache_bytes(case: Case, tokens: int) -> float:
    """Keys and values that a step reads, on average."""
    c, rows = case.model.config, len(case.prompts)
    if case.family == "t5":
        return 8.0 * rows * c.num_decoder_layers * c.num_heads * c.d_kv * (len(case.prompts[0]) + tokens / 2)
    return 8.0 * rows * c.n_layer * c.n_embd * (len(case.prompts[0]) + tokens / 2)


def core_ms(case: Case, weights: str, steps: int) -> float:
    """Milliseconds of a step's call of C++ alone, with its Python arguments: without the choice of the token."""
    lengths, ids = [len(prompt) for prompt in case.prompts], torch.tensor(case.prompts)
    decoder = decoders.make_decoder(case.model, lengths, steps + 1, weights=weights)
    cu_seqlens = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
    with torch.inference_mode():
        decoder.prefill(ids.flatten(), cu_seqlens, ids.shape[1])
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            decoder.step(ids[:, 0])
            times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def same_tokens(ids: list[list[int]], others: list[list[int]]) -> float:
    """Share of the rows' tokens before the first different one."""
    agreed = 0
    for ours, theirs in zip(ids, others):
        agreed += next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
    return agreed / max(sum(map(len, ids)), sum(map(len, others)))


def measure(case: Case, writers: dict[str, Write], tokens: int, rounds: int) -> dict[str, tuple[float, list]]:
    """Milliseconds of a step, and the ids, of each contender."""
    times: dict[str, tuple[float, list]] = {}
    least: dict[tuple[str, int], float] = {}
    for round in range(rounds + 1):  # the first warms up
        for name, write in writers.items():
            for count in (1, tokens):
                seconds, ids = write(count)
                key = name, count
                if round:
                    least[key] = min(least.get(key, seconds), seconds)
            times[name] = 0.0, ids
    return {
        name: (1e3 * (least[name, tokens] - least[name, 1]) / (tokens - 1), ids) for name, (_, ids) in times.items()
    }


def last_cache_bytes() -> int:
    """Of the third level, as Linux shows it; Python's os.sysconf does not have it."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if size.exists():
        return int(size.read_text().strip().rstrip("K")) << 10
    return ceilings.cache_bytes(torch.device("cpu"))


def read_ms(size: float, rounds: int, threads: int) -> float:
    buffer = torch.ones(int(size) // 4)
    times = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        _native.cpu().read_memory(data=buffer, bytes=buffer.numel() * 4, threads=threads)
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def goals(rows: dict[str, dict], weights: str) -> list[str]:
    """What fastlm's row with these weights falls short of."""
    row, short = rows[f"fastlm {weights}"], []

    def expect(name: str, factor: float) -> None:
        if name in rows and row["rate"] < factor * rows[name]["rate"]:
            short.append(f"{factor:.2f} x {name} ({factor * rows[name]['rate']:.0f} tokens/s)")

    expect(f"ctranslate2 {weights}", 1.0)
    if weights == "float32":
        if row["bound"] is not None and row["bound"] < 0.8:
            short.append("80% of the bound")
        bound = len(row["ids"]) * 1e3 / row["read_ms"]
        if "transformers" in rows:
            expect("transformers", min(2.0, 0.8 * bound / rows["transformers"]["rate"]))
    else:
        expect("transformers", 2.0)
    return short


def run_case(case: Case, args: argparse.Namespace, scratch: Path) -> list[dict]:
    writers: dict[str, Write] = {f"fastlm {weights}": fastlm_writer(case, weights) for weights in args.weights}
    writers["transformers"] = transformers_writer(case)
    peers, batch = [], len(case.prompts)
    title = f"{case.name}, batch {batch}, prompts of {PROMPT}, {args.tokens} tokens, {case.threads} threads"
    print(f"\n{title}", flush=True)
    if args.peers_python:
        wanted = [("ctranslate2", "float32"), ("ctranslate2", "int8"), ("onnxruntime", "float32")]
        for library, weights in wanted:
            try:
                peers.append(Peer(args.peers_python, library, weights, case, scratch))
                writers[f"{library} {weights}"] = peers[-1]
            except RuntimeError as reason:
                print(f"  {library} {weights}: not run, {reason}")
    try:
        found = measure(case, writers, args.tokens, args.rounds)
    finally:
        for peer in peers:
            peer.close()
    best = max(batch * 1e3 / ms for name, (ms, _) in found.items() if not name.startswith("fastlm"))
    rows: dict[str, dict] = {}
    for name, (ms, ids) in found.items():
        row = {"model": case.name, "batch": batch, "contender": name, "step_ms": ms, "rate": batch * 1e3 / ms}
        row |= {"ids": ids, "same": same_tokens(ids, found["transformers"][1]), "bound": None}
        if name.startswith("fastlm"):
            weights = name.split()[1]
            size = cpu_decoder.pack(case.model, weights).bytes
            total = size + cache_bytes(case, args.tokens)
            row |= {"bytes": total, "read_ms": read_ms(total, args.rounds, case.threads)}
            row["core_ms"] = core_ms(case, weights, args.tokens)
            if size > last_cache_bytes():
                row["bound"] = row["read_ms"] / ms
        rows[name] = row
    for name, row in rows.items():
        bound = "" if row["bound"] is None else f"{row['bound']:5.0%} of the bound"
        line = f"  {name:<20} {row['rate']:8.1f} tokens/s  {row['step_ms']:7.2f} ms a step"
        print(f"{line}  {row['rate'] / best:5.2f}x best peer  {row['same']:4.0%} same tokens  {bound}")
    for weights in args.weights:
        row = rows[f"fastlm {weights}"]
        row["short"] = goals(rows, weights)
        if row["short"]:
            parts = (
                f"a read of {row['bytes'] / 1e6:.0f} MB {row['read_ms']:.2f} ms, the call of C++ {row['core_ms']:.2f}"
            )
            print(f"  {weights} falls short of {', '.join(row['short'])}: {parts}, all {row['step_ms']:.2f}")
    first = rows.get("fastlm float32")
    if first and first["same"] < 0.5:
        print("  WRONG: float32's tokens are not Transformers'")
    for row in rows.values():
        del row["ids"]
    return list(rows.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A step of generation on a CPU beside other libraries.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2-124m", "t5-small"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--weights", nargs="+", choices=cpu_decoder.FORMS, default=list(cpu_decoder.FORMS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers-python", help="a Python with ctranslate2, onnxruntime, transformers and torch")
    parser.add_argument("--onnx-python", help="a Python with torch, onnx and safetensors, which exports GPT-2")
    parser.add_argument("--json", help="a file for the rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "model"
            model.save_pretrained(directory)
            write_tokenizer(directory, model.config.vocab_size)
            if args.onnx_python and isinstance(model, models.GPT2):
                program = Path(__file__).with_name("generation_onnx.py")
                out = Path(scratch) / "onnx" / "step.onnx"
                subprocess.run(
                    [args.onnx_python, "-I", str(program), str(directory), str(out)], check=True, stdout=sys.stderr
                )
            for batch in args.batch:
                draw = torch.Generator().manual_seed(batch)
                ids = torch.randint(2, model.config.vocab_size, (batch, PROMPT), generator=draw).tolist()
                rows += run_case(Case(name, model, ids, directory, args.threads), args, Path(scratch))
    if args.json:
        results.write_json(args.json, rows)
    return 0
