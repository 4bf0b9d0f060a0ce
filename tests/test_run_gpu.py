"""benchmarks/run_gpu.py on a machine without a GPU: plan, budgets, archives, what a kill leaves, error messages."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression
from fake_clock import FakeClock

from fastlm.bench import ops, steps, training
from fastlm.testing.cases import CASES
from fastlm.train import load_recipe

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
spec = importlib.util.spec_from_file_location("run_gpu", ROOT / "benchmarks" / "run_gpu.py")
run_gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_gpu)
FIRST = ["install", "tests", "ops", "attention", "bert"]
SECOND = ["install", "sanitizer", "long", "peers", "gpt2", "t5", "profile"]


@pytest.fixture(autouse=True)
def sanitizer_is_installed(monkeypatch):
    monkeypatch.setattr(run_gpu.shutil, "which", lambda name: f"/bin/{name}")


class Device:
    """A DIR, and a runner whose parts take a while of a fake clock and write 1000 bytes."""

    def __init__(self, tmp_path, run=("first",), wheels=(), takes=lambda name, limit: 1.0):
        self.out, self.clock, self.takes = tmp_path / "out", FakeClock(), takes
        work = tmp_path / "work"
        work.mkdir()
        self.name, parts = run_gpu.parts_of(run)
        self.plan = run_gpu.Plan("python3", work, wheels)
        self.parts = run_gpu.seconds_of(parts, self.plan)
        self.calls, self.limits, self.archived, self.codes = [], {}, [], {}

    def __call__(self, command, log, limit):
        self.calls.append(log.stem)
        self.limits[log.stem] = limit
        self.archived.append(self.names())
        log.write_text(f"{log.stem}'s output\n")
        (self.plan.work / f"{log.stem}.json").write_bytes(os.urandom(1000))
        self.clock.advance(1e3 * self.takes(log.stem, limit))
        code = self.codes.get(log.stem, 0)
        if isinstance(code, BaseException):
            raise code
        return code

    def names(self):
        path = self.out / f"{self.name}.tar.gz"
        return tarfile.open(path).getnames() if path.exists() else []

    def run(self):
        results = run_gpu.Results(self.out, self.plan.work, self.name)
        about = {"device": "NVIDIA H200", "commit": "abc"}
        return run_gpu.run_parts(self.parts, self.plan, results, about, run=self, now=self.clock.now)

    def summary(self):
        return json.loads((self.out / "summary.json").read_text())[self.name]


@pytest.mark.parametrize(("run", "parts"), [("first", FIRST), ("second", SECOND)])
def test_order_and_an_archive_after_each_part(run, parts, tmp_path):
    device = Device(tmp_path, [run])
    assert device.run() == 0
    assert device.calls == parts
    for done, archived in enumerate(device.archived):
        assert sorted(archived) == sorted(f"{name}.{ext}" for name in parts[:done] for ext in ("json", "log"))
    assert len(device.names()) == 2 * len(parts)
    summary = device.summary()
    assert (summary["device"], summary["commit"], summary["left_out"]) == ("NVIDIA H200", "abc", [])
    assert [(part["part"], part["exit"], part["seconds"]) for part in summary["parts"]] == [(n, 0, 1.0) for n in parts]
    # Another reader than Python's.
    listed = subprocess.run(["tar", "-tzf", device.out / f"{run}.tar.gz"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == device.names()
    assert listed.stderr == ""


@pytest.mark.parametrize("wheels", [(), (Path("fastlm-0.2.0-cp312-cp312-linux_x86_64.whl"),)], ids=["built", "wheel"])
@pytest.mark.parametrize("run", [("first",), ("second",), ("ops",), tuple(run_gpu.PARTS)], ids=lambda run: run[-1])
def test_a_run_takes_no_more_than_six_minutes(run, wheels, tmp_path):
    """Where every part needs SIGKILL, and with a second for each archive."""
    device = Device(tmp_path, run, wheels, lambda name, limit: limit + run_gpu.GRACE + 1)
    device.codes = dict.fromkeys(run_gpu.PARTS, 124)
    assert run_gpu.LIMIT == 360
    assert sum(device.parts.values()) <= 345
    assert min(device.parts.values()) > 5
    assert device.run() == 1
    assert device.clock.now() <= 350
    assert device.summary()["seconds"] <= 350
    assert all(part["exit"] == 124 for part in device.summary()["parts"])


def test_time_that_is_left_passes_on(tmp_path):
    device = Device(tmp_path)
    device.run()
    planned = list(device.parts.values())
    assert device.limits["bert"] == sum(planned) - len(FIRST[:-1]) - run_gpu.GRACE
    (tmp_path / "late").mkdir()
    late = Device(tmp_path / "late", takes=lambda name, limit: {"install": 173.0}.get(name, 1.0))
    late.run()
    # What came late has its own end: 110 + 60 seconds after the start there is none left for the tests.
    assert late.calls == [name for name in FIRST if name != "tests"]
    assert late.summary()["parts"][1]["skipped"] == "no time was left"
    assert late.summary()["parts"][1]["exit"] == 124


def test_a_part_that_fails_stops_no_other(tmp_path, capsys):
    device = Device(tmp_path)
    device.codes = {"tests": 1}
    assert device.run() == 1
    assert device.calls == FIRST
    assert [part["exit"] for part in device.summary()["parts"]] == [0, 1, 0, 0, 0]
    assert "tests's output" in capsys.readouterr().out


def test_a_sanitizer_that_is_missing_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu.shutil, "which", lambda name: None)
    device = Device(tmp_path, ["second"])
    assert device.run() == 0
    assert device.calls == [name for name in SECOND if name != "sanitizer"]
    assert device.summary()["parts"][1]["skipped"] == "compute-sanitizer is not installed"


def test_an_exception_in_a_part_leaves_it_in_the_archive(tmp_path):
    device = Device(tmp_path)
    device.codes = {"ops": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        device.run()
    assert device.calls == FIRST[:3]
    assert sorted(device.names()) == sorted(f"{name}.{ext}" for name in FIRST[:3] for ext in ("json", "log"))
    assert [part["exit"] for part in device.summary()["parts"]] == [0, 0, 130]


def results_of(tmp_path, sizes, run="first"):
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir(exist_ok=True)
    for name, size in sizes.items():
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_bytes(os.urandom(size))
    return out, run_gpu.Results(out, work, run)


def test_the_largest_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu, "ARCHIVE", 100_000)
    out, results = results_of(tmp_path, {"a": 50_000, "profile/b": 60_000, "c": 40_000, "d": 100})
    assert results.archive() == ["profile/b"]
    with tarfile.open(out / "first.tar.gz") as archive:
        assert archive.getnames() == ["a", "c", "d"]
        assert archive.extractfile("c").read() == (tmp_path / "work" / "c").read_bytes()
    # A file that grows is packed anew; one too large for a try is not read.
    monkeypatch.setattr(run_gpu, "LARGEST", 65_000)
    (tmp_path / "work" / "a").write_bytes(b"0" * 60_000)
    (tmp_path / "work" / "profile" / "b").write_bytes(b"0" * 70_000)
    assert results.archive() == ["profile/b"]
    with tarfile.open(out / "first.tar.gz") as archive:
        assert archive.extractfile("a").read() == b"0" * 60_000


def test_the_limits_of_the_directory(tmp_path, monkeypatch):
    """Three runs that fill their archives, beside two other files; what a write needs for a moment is counted."""
    replaced = []

    def replace(self, name, content):
        before = [path.stat().st_size for path in self.directory.iterdir()]
        replaced.append((len(before) + 1, sum(before) + len(content), len(content)))
        plain(self, name, content)

    plain = run_gpu.Results.replace
    monkeypatch.setattr(run_gpu.Results, "replace", replace)
    scale = 256  # 64 KiB a file
    for name in ("ARCHIVE", "TOGETHER", "SUMMARY"):
        monkeypatch.setattr(run_gpu, name, getattr(run_gpu, name) // scale)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "console.log").write_bytes(bytes(20_000))
    (tmp_path / "out" / "notes").write_bytes(b"mine")
    sizes = {f"{part}{index}": 7_000 for part in "abc" for index in range(12)}
    for run in ("first", "second", "parts", "first"):
        out, results = results_of(tmp_path, sizes, run)
        assert len(results.archive()) >= 28
        results.summarise({"left_out": [], "parts": [{"part": "ops"}]})
    names = "console.log first.tar.gz notes parts.tar.gz second.tar.gz summary.json"
    assert sorted(path.name for path in out.iterdir()) == names.split()
    assert json.loads((out / "summary.json").read_text()).keys() == {"first", "second", "parts"}
    most, together, largest = (max(column) for column in zip(*replaced))
    assert most <= 8
    assert together <= 64 * 2**20 // scale
    assert 35_000 < largest <= 16 * 2**20 // scale
    assert 4 * run_gpu.ARCHIVE + 2 * run_gpu.SUMMARY <= run_gpu.TOGETHER
    assert run_gpu.FILES == 8


def test_a_directory_with_other_files_is_refused(tmp_path):
    out, _ = results_of(tmp_path, {})
    (out / ".first.tar.gz.part").write_bytes(b"of a run that was killed")
    for name in "abc":
        (out / name).touch()
    with pytest.raises(ValueError, match="expected at most 2 files of your own, got a b c"):
        results_of(tmp_path, {})
    assert not (out / ".first.tar.gz.part").exists()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_a_part_out_of_time_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu, "GRACE", 0.2)
    log = tmp_path / "log"
    start = time.monotonic()
    assert run_gpu.run_command("trap '' TERM; sleep 50 & echo $!; sleep 50; sleep 50", log, 0.5) == 124
    assert time.monotonic() - start < 10
    # SIGKILL is delivered at the child's next return to user mode, some time after killpg has returned.
    child, deadline = int(log.read_text()), time.monotonic() + 30
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)
    assert run_gpu.run_command("echo out; echo err >&2; exit 3", log, 10) == 3
    assert log.read_text() == "out\nerr\n"


def test_the_commands_are_those_of_the_programs(tmp_path, monkeypatch):
    """The lists that the script writes down, and the arguments that it passes."""
    assert set(run_gpu.CASES) == set(CASES)
    assert {"attention", *run_gpu.BENCHMARKS} == set(ops.BENCHMARKS)
    plan = run_gpu.Plan("python3", tmp_path / "a b")
    parts = {name: part.command(plan, 50) for name, part in run_gpu.PARTS.items()}
    for command in parts.values():
        subprocess.run(["bash", "-n", "-c", command], check=True)
    for name in ("ops", "attention", "peers"):
        ops.parse([word.replace("cuda", "cpu") for word in shlex.split(parts[name])[2:]])
        assert "--seconds 25" in parts[name]
    assert load_recipe("bert-base").data.row_tokens == 512
    monkeypatch.setattr(training, "find_step", lambda name, *_: name)  # it builds a model's config, for seconds
    recipes = [("bert", "train"), ("gpt2", "gpt2"), ("t5", "t5")]
    for name, json_name in recipes:
        args = training.parse([word.replace("cuda", "cpu") for word in shlex.split(parts[name])[2:]])
        assert args.json == plan.work / f"{json_name}.json"
        assert args.contenders[0] == "fastlm"
        assert set(args.recipe) <= {"bert-base", *steps.STEPS}
    # The rest of the long tests are not those of the ops and models once more, one after the other.
    ignored = re.findall("--ignore (\\S+)", parts["long"])
    assert sorted(ignored) == sorted(["test_ops.py", *run_gpu.MODELS])
    assert all(f"cuda -v -p no:cacheprovider {name}" in parts["long"] for name in ignored)
    for expression in re.findall("-k '(.*?)'", parts["tests"] + parts["long"]):
        Expression.compile(expression)
    for model in run_gpu.MODELS:
        (chosen,) = re.findall(f"{model} -k '(.*?)'", parts["tests"])
        for test in chosen.split(" or "):
            assert re.search(f"def test_\\w*{test}\\w*\\(.*device", (ROOT / "tests" / model).read_text())


def test_all_jobs_of_a_part_run_and_one_that_fails_is_told(tmp_path):
    command = run_gpu.together(tmp_path, {"a": "exit 1", "b": "echo b"})
    assert run_gpu.run_command(command, tmp_path / "log", 10) == 1
    assert (tmp_path / "b.log").read_text() == "b\n"
    assert run_gpu.run_command(run_gpu.together(tmp_path, {"a": "true", "b": "true"}), tmp_path / "log", 10) == 0


def test_wheels_are_installed_without_an_index():
    liger, ours = Path("/w/liger_kernel-0.6-py3-none-any.whl"), Path("/w/fastlm-0.2.0-cp312-cp312-linux_x86_64.whl")
    pip = "-m pip install --quiet --no-index --no-deps --force-reinstall"
    built = run_gpu.install(run_gpu.Plan("python3", Path("w"), (liger,)), 100)
    assert f"{pip} {liger} " in built
    assert f'FASTLM_CUDA_ARCHS="${{FASTLM_CUDA_ARCHS:-90}}" python3 {pip} --no-build-isolation .' in built
    plan = run_gpu.Plan("python3", Path("w"), (liger, ours))
    assert f"{pip} {liger} {ours} " in run_gpu.install(plan, 100)
    assert "--no-build-isolation" not in run_gpu.install(plan, 100)
    # What the build would have taken goes to the other parts.
    seconds = run_gpu.seconds_of(FIRST, plan)
    assert seconds["install"] == 30
    assert seconds["ops"] > run_gpu.PARTS["ops"].seconds


def test_a_cache_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "warm" / "KEY").mkdir(parents=True)
    (tmp_path / "warm" / "KEY" / "kernel.cubin").write_bytes(b"cubin")
    subprocess.run(["tar", "-czf", tmp_path / "cache.tar.gz", "-C", tmp_path / "warm", "."], check=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert run_gpu.unpack_cache(tmp_path / "cache.tar.gz") == tmp_path / "triton"
    assert (tmp_path / "triton" / "KEY" / "kernel.cubin").read_bytes() == b"cubin"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "expected first, second or of: install tests ops"),
        (["first", "ops"], "got first"),
        ([], "expected first, second, or names of parts"),
        (["first", "--wheel", "missing.whl"], "--wheel: expected .whl files that exist, got missing.whl"),
        (["first", "--cache", "missing.tar.gz"], "--cache: expected a tar.gz file, got missing.tar.gz"),
    ],
)
def test_argument_errors(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        run_gpu.main([*arguments, "--out", str(tmp_path)])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def run(*arguments, path=ROOT):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(path)}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=200)


def test_dry_run_plans_both_runs_and_checks_the_imports(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("at most 360 s, of which 345 s planned") == 2
    assert re.findall(r"^  (\w+), \d+ s", done.stdout, re.M) == FIRST + SECOND
    for name in ("first.tar.gz, at most 15 MiB", "second.tar.gz, at most 15 MiB", "summary.json, at most 1 MiB"):
        assert f"{tmp_path / 'out'}/{name}" in done.stdout
    assert "at most 8, of 16 MiB, 64 MiB together" in done.stdout
    assert done.stdout.count(": ok") == 12
    assert "fastlm profile bert-base --device cuda" in done.stdout
    assert not (tmp_path / "out").exists()


def test_dry_run_names_a_failing_import(tmp_path, monkeypatch, capfd):
    (tmp_path / "planted.py").write_text("raise ImportError('planted')")
    monkeypatch.setattr(run_gpu, "IMPORTS", ("json", "planted"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_gpu.main(["ops", "--dry-run", "--out", str(tmp_path / "out")]) == 1
    out = capfd.readouterr().out
    assert "json: ok" in out
    assert "planted: ImportError: planted" in out
    assert "bert, " not in out


@pytest.fixture
def machine(tmp_path):
    """A tree, an nvidia-smi, and a PYTHON that notes what it is to do, but sleeps where it is to benchmark."""
    for folder in ("benchmarks", "tests", "bin"):
        (tmp_path / folder).mkdir()
    for script in (SCRIPT, SCRIPT.with_suffix(".py")):
        shutil.copy(script, tmp_path / "benchmarks")
    python = tmp_path / "bin" / "python"
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200'\n")
    python.write_text(
        f'#!/bin/sh\ncase "$1" in *run_gpu.py) exec {sys.executable} "$@" ;; esac\n'
        f'echo "$*" >>{tmp_path}/notes\n'
        f"case \"$*\" in *'[gelu '*) exit 1 ;; *bench_ops*) echo $$ >{tmp_path}/pid ;; *) exit 0 ;; esac\n"
        "echo begun; exec sleep 50\n"
    )
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHON": str(python), "PATH": path, "TMPDIR": str(tmp_path), "FASTLM_COMMIT": "abc"}
    return ["bash", str(tmp_path / "benchmarks" / "run_gpu.sh")], environment


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_leaves_what_came_before(number, machine, tmp_path):
    command, environment = machine
    process = subprocess.Popen([*command, "first", "--out", str(tmp_path / "out")], env=environment)
    try:
        for _ in range(600):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"):
                break
            time.sleep(0.05)
        process.send_signal(number)
        code = process.wait(30)
    finally:
        process.kill()
        child = int((tmp_path / "pid").read_text())
        survived = alive(child)
        if survived:
            os.kill(child, signal.SIGKILL)
    told = number == signal.SIGTERM
    assert code == (143 if told else -9)
    assert survived != told
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["first"]
    assert (summary["device"], summary["commit"]) == ("NVIDIA H200", "abc")
    # gelu's tests fail, and the others have run.
    expected = [("install", 0), ("tests", 1), ("ops", 130)][: 3 if told else 2]
    assert [(part["part"], part["exit"]) for part in summary["parts"]] == expected
    with tarfile.open(tmp_path / "out" / "first.tar.gz") as archive:
        names = set(archive.getnames())
        assert {"install.log", "tests.log", *(f"tests-{op}.log" for op in CASES)} <= names
        assert ("ops.log" in names) == told
        assert not told or archive.extractfile("ops.log").read() == b"begun\n"
    noted = (tmp_path / "notes").read_text()
    assert {name for name in CASES if f"-k [{name} and error_bound" in noted} == set(CASES)


def test_without_a_gpu_nothing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_gpu, "output", lambda *command: "")
    assert run_gpu.main(["first", "--out", str(tmp_path / "out")]) == 1
    assert "nvidia-smi names no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# run_gpu.py runs before fastlm is built.
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if path.name != "run_gpu.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_the_main_of_a_module_and_names_itself(script):
    """The scripts are thin: usage in the docstring, and a main of fastlm/bench."""
    found = runpy.run_path(str(ROOT / "benchmarks" / script))
    assert found["main"].__module__.startswith("fastlm.bench.")
    assert f"python benchmarks/{script}" in found["__doc__"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", str(SCRIPT), str(ROOT / ".ci" / "run")], check=True)
