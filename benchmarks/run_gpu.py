"""Builds, tests and measures fastlm on a rented CUDA machine without a network: two commands, six minutes each.

    benchmarks/run_gpu.sh first --out DIR     install, tests, ops, attention, bert
    benchmarks/run_gpu.sh second --out DIR    install, sanitizer, long, peers, gpt2, t5, profile
    benchmarks/run_gpu.sh ops bert --out DIR  install, then these parts, which share the six minutes
    benchmarks/run_gpu.sh --dry-run --out DIR prints both plans and checks the imports; needs no GPU, writes nothing
    --wheel FILE ...                          wheels to install; with one of fastlm nothing is built
    --cache FILE.tar.gz                       a Triton cache, unpacked into TRITON_CACHE_DIR (default ~/.triton/cache)

The machine needs torch, triton, pytest, numpy and what else fastlm imports; to build, setuptools, pybind11 and nvcc
too. pip gets --no-index and --no-deps. The build is for sm_90 alone, unless FASTLM_CUDA_ARCHS says otherwise. A wheel
built ahead: `FASTLM_CUDA_ARCHS=90 pip wheel --no-deps --no-build-isolation .`, for the machine's Python version.

**Time.** A part has its seconds and those that the parts before it left. Its process group gets SIGTERM at the end of
them and SIGKILL three seconds later. A part that fails or runs out of its time does not stop the rest.

**Files.** A part writes as it goes to a directory under the temporary directory. After each part DIR/<run>.tar.gz is
replaced by a new archive of that directory, then DIR/summary.json. A run that is killed leaves the parts before the
current one; after SIGTERM, SIGINT or SIGHUP the current one too. DIR holds at most 8 files of 16 MiB, 64 MiB
together. To stay below, an archive leaves out files, the largest first, and the summary names them. DIR may have two
other files when a run begins, a log of its output for example. The JSON files of the archives belong into
benchmarks/results/<gpu>/, where benchmarks/report.py reads ops.json and train.json.

**A Triton cache warmed ahead.** The key of a kernel is a hash of Triton's own compiler, backend and language files
with libtriton.so, the version of ptxas, the architecture (90), the options (warps, stages, contents of the device
libraries), Triton's environment variables, and the kernel: its source, that of the functions it calls, its line
number, its signature with the constants and the divisibility of arguments. Triton 3.6 and 3.7 therefore never share
an entry, nor do two builds of one version, and any edit above a kernel in its file misses. Launchers are shared
objects for one Python version; another compiles its own. So a cache is of use with the same Triton build and the same
commit, with the launchers for the same Python too. The surest one is from the machine itself, since it has the
signatures of the run: `tar -czf cache.tar.gz -C ~/.triton/cache .`. An entry that does not match costs nothing but
its size.
"""

import argparse
import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 360  # seconds of a run
PLANNED = 345  # of them for the parts; the rest is for archives and the last part's end
GRACE = 3  # seconds from SIGTERM to SIGKILL
WHEEL_SECONDS = 30  # to install a wheel of fastlm
MIB = 2**20
FILES = 8
TOGETHER = 64 * MIB
# The three archives, the one that replaces one of them, and two summaries are below 64 MiB together.
ARCHIVE = 15 * MIB
SUMMARY = MIB
LARGEST = 128 * MIB  # a larger file is left out without being compressed, which takes seconds
NAMES = 100  # of files left out, in the summary
OTHERS = 2  # files in DIR that are not of a run

# The ops of fastlm/testing/cases and those of fastlm/bench/ops.py. fastlm is not built yet when a plan is made.
CASES = (
    "attention",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "rms_norm",
    "linear_cross_entropy",
    "mlm_mask",
    "silu",
)
BENCHMARKS = (*CASES[1:], "call overhead")
MODELS = ("test_bert.py", "test_gpt2.py", "test_t5.py")
IMPORTS = (
    "torch",
    "triton",
    "setuptools",
    "pybind11",
    "pytest",
    "fastlm.ops",
    "fastlm.models",
    "fastlm.train",
    "fastlm.bench.ops",
    "fastlm.bench.training",
    "fastlm.bench.profile",
    "fastlm.bench.report",
)


class Plan(NamedTuple):
    """What the commands of the parts need to know."""

    python: str
    work: Path
    wheels: tuple[Path, ...] = ()

    @property
    def has_fastlm(self) -> bool:
        return any(wheel.name.startswith("fastlm-") for wheel in self.wheels)


def together(work: Path, jobs: dict[str, str]) -> str:
    """All jobs at once, name: command, each with its own <name>.log. Fails where one does, after all have ended."""
    started = [
        f"( {command} ) >{shlex.quote(str(work / name))}.log 2>&1 & jobs+=($!)" for name, command in jobs.items()
    ]
    wait = 'failed=0; for job in "${jobs[@]}"; do wait "$job" || failed=1; done; exit $failed'
    return "\n".join(["jobs=()", *started, wait])


def install(plan: Plan, seconds: int) -> str:
    """The wheels, else a build of the tree; then what `fastlm info` says of the machine."""
    pip = f"{plan.python} -m pip install --quiet --no-index --no-deps --force-reinstall"
    lines = [f"cd {shlex.quote(str(ROOT))}"]
    if plan.wheels:
        lines.append(f"{pip} {' '.join(shlex.quote(str(wheel)) for wheel in plan.wheels)}")
    if not plan.has_fastlm:
        lines.append(f'FASTLM_CUDA_ARCHS="${{FASTLM_CUDA_ARCHS:-90}}" {pip} --no-build-isolation .')
    # From benchmarks/, to import the installed fastlm and not the tree's.
    lines.append(f"cd benchmarks && nvidia-smi && {plan.python} -c 'import fastlm.info; print(fastlm.info.report())'")
    return " && ".join(lines)


def pytest(plan: Plan, arguments: str) -> str:
    """From tests/, to test the installed fastlm. -v: a run that is killed has named the tests that passed."""
    return f"{plan.python} -m pytest --device cuda -v -p no:cacheprovider {arguments}"


def short_tests(plan: Plan, seconds: int) -> str:
    """The error bound of every op in bfloat16, and each model against Transformers; a process each, since compiling
    Triton's kernels takes most of the time."""
    jobs = {f"tests-{op}": pytest(plan, f"test_ops.py -k '[{op} and error_bound and bfloat16'") for op in CASES}
    for model in MODELS:
        chosen = "equals_transformers_in_bfloat16 or padded_equals_packed or training_coincides"
        jobs[f"tests-{model[5:-3]}"] = pytest(plan, f"{model} -k '{chosen}'")
    return f"cd {shlex.quote(str(ROOT / 'tests'))} && {{ {together(plan.work, jobs)}; }}"


def long_tests(plan: Plan, seconds: int) -> str:
    """The tests that `tests` leaves out. A file that fails to import, say without transformers, stops no other."""
    jobs = {f"long-{op}": pytest(plan, f"test_ops.py -k '[{op} and not (error_bound and bfloat16)'") for op in CASES}
    jobs |= {f"long-{model[5:-3]}": pytest(plan, model) for model in MODELS}
    without = " ".join(f"--ignore {name}" for name in ("test_ops.py", *MODELS))
    jobs["long-rest"] = pytest(plan, f"--continue-on-collection-errors {without}")
    return f"cd {shlex.quote(str(ROOT / 'tests'))} && {{ {together(plan.work, jobs)}; }}"


def sanitizer(plan: Plan, seconds: int) -> str:
    """Without torch's caching allocator, so that the tools see where a tensor ends and its first write. racecheck looks
    at fastlm's kernels alone; initcheck needs all."""
    check = "compute-sanitizer --target-processes all --error-exitcode 99 --tool"
    run = pytest(plan, "--backend cuda test_ops.py -k")
    jobs = {
        "sanitizer-memcheck": f"{check} memcheck {run} error_bound",
        "sanitizer-racecheck": f"{check} racecheck --kernel-name kns=fastlm {run} 'error_bound and bfloat16'",
        "sanitizer-initcheck": f"{check} initcheck {run} 'error_bound and bfloat16'",
    }
    tests = shlex.quote(str(ROOT / "tests"))
    return f"cd {tests} && export PYTORCH_NO_CUDA_MEMORY_CACHING=1 && {{ {together(plan.work, jobs)}; }}"


def bench_ops(name: str, arguments: str) -> Callable[[Plan, int], str]:
    """The first shapes of all ops come first; none begins in the last 25 seconds."""

    def command(plan: Plan, seconds: int) -> str:
        return (
            f"{plan.python} {shlex.quote(str(ROOT / 'benchmarks' / 'bench_ops.py'))} --device cuda {arguments} "
            f"--rounds 5 --min-ms 10 --seconds {max(5, seconds - 25)} --json {shlex.quote(str(plan.work / name))}.json"
        )

    return command


def bench_train(name: str, recipe: str, contenders: str) -> Callable[[Plan, int], str]:
    """A step's contenders, few steps each; the JSON is written after each."""

    def command(plan: Plan, seconds: int) -> str:
        return (
            f"{plan.python} {shlex.quote(str(ROOT / 'benchmarks' / 'bench_train.py'))} --device cuda --recipe {recipe} "
            f"--contenders {contenders} --rounds 3 --seconds 0.5 --json {shlex.quote(str(plan.work / name))}.json"
        )

    return command


def profile(plan: Plan, seconds: int) -> str:
    """torch's tables and trace; then nsys and ncu where they are installed, else their command lines."""
    benchmarks, out = shlex.quote(str(ROOT / "benchmarks")), shlex.quote(str(plan.work / "profile"))
    return f"cd {benchmarks} && {plan.python} -m fastlm profile bert-base --device cuda --steps 2 --out {out}"


class Part(NamedTuple):
    seconds: int
    command: Callable[[Plan, int], str]
    needs: str = ""  # a program, without which the part is left out


PARTS = {
    "install": Part(110, install),
    "tests": Part(60, short_tests),
    "ops": Part(75, bench_ops("ops", f"--op '{','.join(BENCHMARKS)}' --vs eager")),
    "attention": Part(45, bench_ops("attention", "--op attention --vs sdpa")),
    "bert": Part(55, bench_train("train", "bert-base", "fastlm 'transformers sdpa'")),
    "sanitizer": Part(70, sanitizer, needs="compute-sanitizer"),
    "long": Part(45, long_tests),
    "peers": Part(35, bench_ops("peers", "--op all --quick")),
    "gpt2": Part(28, bench_train("gpt2", "gpt2-124m-16x1024", "fastlm 'transformers sdpa'")),
    "t5": Part(28, bench_train("t5", "t5-base-32x512", "fastlm transformers")),
    "profile": Part(29, profile),
}
RUNS = {
    "first": ("install", "tests", "ops", "attention", "bert"),
    "second": ("install", "sanitizer", "long", "peers", "gpt2", "t5", "profile"),
}


def parts_of(run: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """(name of the archive, parts) of `first`, `second` or single parts. ValueError for a mixture."""
    if len(run) == 1 and run[0] in RUNS:
        return run[0], RUNS[run[0]]
    if unknown := [name for name in run if name not in PARTS]:
        raise ValueError(f"expected first, second or of: {' '.join(PARTS)}; got {' '.join(unknown)}")
    return "parts", ("install", *(name for name in dict.fromkeys(run) if name != "install"))


def seconds_of(parts: Sequence[str], plan: Plan) -> dict[str, int]:
    """The seconds of each part, PLANNED at most together. The parts after `install` share in proportion."""
    first = WHEEL_SECONDS if plan.has_fastlm else PARTS["install"].seconds
    asked = sum(PARTS[name].seconds for name in parts if name != "install")
    share = {name: PARTS[name].seconds * (PLANNED - first) // asked for name in parts if name != "install"}
    return {"install": first} | share


def run_command(command: str, log: Path, seconds: float) -> int:
    """The exit code of `command`, 124 where its time ran out. Nothing of its process group stays."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return 124
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Results:
    """DIR: an archive and a summary, each replaced in one step. ValueError where DIR has too much in it already."""

    def __init__(self, directory: Path, work: Path, run: str):
        self.directory, self.work, self.run = directory, work, run
        self.packed: dict[Path, tuple[tuple, bytes]] = {}  # by file: its state, and its member of the archive
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".*.part"):  # of a run that was killed as it wrote
            stale.unlink()
        others = [path for path in directory.iterdir() if path not in self.own()]
        if len(others) > OTHERS or any(path.is_dir() for path in others):
            names = " ".join(sorted(path.name for path in others))
            raise ValueError(
                f"--out {directory}: expected at most {OTHERS} files of your own, got {names}; name another"
            )

    def own(self) -> list[Path]:
        names = [*(f"{run}.tar.gz" for run in (*RUNS, "parts")), "summary.json"]
        return [self.directory / name for name in names]

    def room(self) -> int:
        """Bytes that an archive may have beside the other files, the one it replaces and the summary written twice."""
        taken = sum(path.stat().st_size for path in self.directory.iterdir() if path.name != "summary.json")
        return max(0, min(ARCHIVE, TOGETHER - taken - 2 * SUMMARY))

    def member(self, path: Path) -> bytes | None:
        """The file as a gzip member with a tar header, or None if it is too large to try."""
        state = path.stat()
        if state.st_size > LARGEST:
            return None
        key = (state.st_size, state.st_mtime_ns)
        if self.packed.get(path, ((), b""))[0] != key:
            header = tarfile.TarInfo(path.relative_to(self.work).as_posix())
            content = path.read_bytes()
            header.size, header.mtime = len(content), int(state.st_mtime)
            block = header.tobuf() + content + b"\0" * (-len(content) % tarfile.BLOCKSIZE)
            self.packed[path] = (key, gzip.compress(block, 6))
        return self.packed[path][1]

    def archive(self) -> list[str]:
        """Replaces the archive; the names of what did not fit. Concatenated gzip members are one gzip file."""
        end = gzip.compress(b"\0" * 2 * tarfile.BLOCKSIZE)
        members = {path: self.member(path) for path in sorted(self.work.rglob("*")) if path.is_file()}
        left_out = [path for path, member in members.items() if member is None]
        fitting = {path: member for path, member in members.items() if member is not None}
        size, room = len(end) + sum(map(len, fitting.values())), self.room()
        for path in sorted(fitting, key=lambda path: -len(fitting[path])):
            if size <= room:
                break
            size -= len(fitting.pop(path))
            left_out.append(path)
        self.replace(f"{self.run}.tar.gz", b"".join([*fitting.values(), end]))
        return sorted(path.relative_to(self.work).as_posix() for path in left_out)

    def summarise(self, summary: dict) -> None:
        """Adds the run to summary.json, which keeps the other runs of DIR."""
        path = self.directory / "summary.json"
        try:
            runs = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            runs = {}
        self.replace("summary.json", json.dumps(runs | {self.run: summary}, indent=1).encode())

    def replace(self, name: str, content: bytes) -> None:
        new = self.directory / f".{name}.part"
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.directory / name)


def run_parts(
    parts: dict[str, int],
    plan: Plan,
    results: Results,
    about: dict,
    *,
    run: Callable[[str, Path, float], int] = run_command,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Runs the parts, name: seconds. about: commit and device, for the summary. Exit code 1 where a part failed."""
    began = now()
    end, failed = began, False
    done: list[dict] = []
    for name, seconds in parts.items():
        end += seconds
        part = {"part": name, "planned_s": seconds, "limit_s": int(end - now())}
        log, start = plan.work / f"{name}.log", now()
        needs = PARTS[name].needs
        print(f"== {name}, at most {part['limit_s']} s", flush=True)
        try:
            if needs and shutil.which(needs) is None:
                part["skipped"] = f"{needs} is not installed"
            elif part["limit_s"] < 5:
                part |= {"skipped": "no time was left", "exit": 124}
            else:
                part["exit"] = 130  # where an exception ends it
                command = PARTS[name].command(plan, part["limit_s"] - GRACE)
                part["exit"] = run(command, log, part["limit_s"] - GRACE)
        finally:
            part["seconds"] = round(now() - start, 1)
            failed |= part.get("exit", 0) != 0
            done.append(part)
            left_out = results.archive()
            total = round(now() - began, 1)
            results.summarise(
                about
                | {"seconds": total, "limit_s": LIMIT, "parts": done}
                | {"left_out": left_out[:NAMES], "left_out_files": len(left_out)}
            )
        what = part.get("skipped") or f"exit {part['exit']}"
        print(f"{name}: {what} after {part['seconds']:.0f} s", flush=True)
        if part.get("exit") and log.exists():
            print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), flush=True)
    return int(failed)


def output(*command: str) -> str:
    """The first line that a command prints, nothing where it fails."""
    try:
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return lines.partition("\n")[0].strip()


def dry_run(runs: list[Sequence[str]], plan: Plan, out: Path) -> int:
    """Prints the plan of each run and the imports. Exit code 1 where an import fails."""
    for run in runs:
        name, parts = parts_of(run)
        seconds = seconds_of(parts, plan)
        print(f"{' '.join(run)}: at most {LIMIT} s, of which {sum(seconds.values())} s planned")
        for part, planned in seconds.items():
            missing = PARTS[part].needs and shutil.which(PARTS[part].needs) is None
            print(f"  {part}, {planned} s{f', left out: no {PARTS[part].needs} here' if missing else ''}:")
            print("    " + PARTS[part].command(plan, planned - GRACE).replace("\n", "\n    "))
        print(f"  files: {out / name}.tar.gz, at most {ARCHIVE // MIB} MiB; {out / 'summary.json'}, at most 1 MiB")
    print(f"files in {out}: at most {FILES}, of 16 MiB, {TOGETHER // MIB} MiB together")
    for tool in ("nsys", "ncu", "compute-sanitizer", "nvcc"):
        print(f"  {tool}: {'installed' if shutil.which(tool) else 'not installed'}")
    code = (
        "import importlib, sys\nfailed = False\n"
        f"for module in {IMPORTS}:\n"
        "    try:\n        importlib.import_module(module)\n        print(f'  {module}: ok')\n"
        "    except Exception as error:\n"
        "        failed = True\n        print(f'  {module}: {type(error).__name__}: {error}')\n"
        "sys.exit(failed)"
    )
    print(f"imports, with {plan.python}:", flush=True)
    return subprocess.run([plan.python, "-c", code], cwd=ROOT).returncode


def unpack_cache(path: Path) -> Path:
    """A Triton cache into TRITON_CACHE_DIR; the directory."""
    directory = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path) as archive:
        archive.extractall(directory, filter="data")
    return directory


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_gpu.sh", description=__doc__.partition(":")[0])
    parser.add_argument("run", nargs="*", help=f"first, second, or of {', '.join(PARTS)}; --dry-run alone plans both")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets the archives and summary.json")
    parser.add_argument("--wheel", type=Path, nargs="+", default=[], metavar="FILE", help="installed with --no-deps")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="tar.gz of a Triton cache")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    if not args.run and not args.dry_run:
        parser.error("expected first, second, or names of parts")
    args.runs = [args.run] if args.run else [[name] for name in RUNS]
    try:
        args.name, args.parts = parts_of(args.runs[0])
    except ValueError as error:
        parser.error(str(error))
    for wheel in args.wheel:
        if wheel.suffix != ".whl" or not wheel.is_file():
            parser.error(f"--wheel: expected .whl files that exist, got {wheel}")
    if args.cache and not (args.cache.is_file() and tarfile.is_tarfile(args.cache)):
        parser.error(f"--cache: expected a tar.gz file, got {args.cache}")
    return args


def stop(number, frame):
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    python = os.environ.get("PYTHON") or sys.executable
    if "/" in python:
        python = os.path.abspath(python)  # the parts change the directory; a link of a venv stays a link
    wheels, out = tuple(wheel.resolve() for wheel in args.wheel), args.out.resolve()
    if args.dry_run:
        return dry_run(args.runs, Plan(python, Path("$WORK"), wheels), out)
    device = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if not device:
        print("run_gpu.sh: nvidia-smi names no GPU; --dry-run needs none", file=sys.stderr)
        return 1
    about = {"device": device, "commit": output("git", "rev-parse", "HEAD") or os.environ.get("FASTLM_COMMIT", "")}
    os.environ["FASTLM_COMMIT"] = about["commit"]  # for the installed fastlm, which is outside the tree
    os.environ["PYTHONUNBUFFERED"] = "1"  # a part that is killed has its output in its log
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="fastlm-gpu-") as work:
        plan = Plan(python, Path(work), wheels)
        try:
            results = Results(out, plan.work, args.name)
        except ValueError as error:
            print(f"run_gpu.sh: {error}", file=sys.stderr)
            return 2
        if args.cache:
            print(f"{args.cache} is in {unpack_cache(args.cache)}")
        return run_parts(seconds_of(args.parts, plan), plan, results, about)


if __name__ == "__main__":
    sys.exit(main())
