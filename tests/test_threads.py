"""The command line's threads: as many as the work and the machine's share are worth, and how long they spin."""

import json
import os
import subprocess
import sys

import pytest
import torch
from training import corpus, set_options, small

from fastlm import _cgroup, _threads
from fastlm.train import load_recipe


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No variable of the user's, and the threads as before afterwards."""
    for name in (*_threads.WAITING, *_threads.COUNTS):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def groups(monkeypatch, tmp_path, lines, files):
    """A tree of control groups: /proc/self/cgroup and files below the mount."""
    (tmp_path / "cgroup").write_text(lines)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(_cgroup, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(_cgroup, "_MOUNT", tmp_path / "mount")


@pytest.mark.parametrize(
    ("lines", "files", "want"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),  # a group above
        ("0::/../host\n", {"cpu.max": "50000 100000"}, 0.5),  # a container's own root
        ("0::/\n", {}, None),
        ("0::/a\n", {"a/cpu.max": "max 100000"}, None),
        (
            "4:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "20000", "cpu,cpuacct/a/cpu.cfs_period_us": "10000"},
            2,
        ),
        ("4:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "10000"}, None),
        ("0::/é\n", {"é/cpu.max": "50000 100000"}, 0.5),
        ("\n0\n0:\n::\n0::/a:b\n", {"a:b/cpu.max": "50000 0", "cpu.max": "² 100000"}, None),  # not understood
    ],
)
def test_quota(lines, files, want, monkeypatch, tmp_path):
    groups(monkeypatch, tmp_path, lines, files)
    assert _cgroup.cpu_quota() == want


def test_memory_of_a_group_leaves_out_cached_files(monkeypatch, tmp_path):
    files = {"a/memory.max": "1000", "a/memory.current": "700", "a/memory.stat": "anon 300\ninactive_file 400\n"}
    groups(monkeypatch, tmp_path, "0::/a/b\n", {**files, "a/b/memory.max": "max"})
    assert _cgroup.free_memory() == 700


def test_memory_of_a_group_whose_files_are_not_understood(monkeypatch, tmp_path):
    files = {"a/memory.max": "1000", "a/memory.current": "-", "a/memory.stat": "\nanon\ninactive_file 4 0 0\n"}
    groups(monkeypatch, tmp_path, "0::/a\n", files)
    assert _cgroup.free_memory() == 1000


def test_small_work_takes_one_thread(monkeypatch):
    monkeypatch.setattr(_threads, "cores", lambda: 16.0)
    torch.set_num_threads(16)
    assert _threads.for_work(small().layer_flops()) == 1
    assert "are worth no more" in _threads.state()
    torch.set_num_threads(16)
    assert _threads.for_work(load_recipe("bert-mini").layer_flops()) == 16
    assert load_recipe("bert-mini").layer_flops() == 6 * 1024 * (4 * 256 * 257 + 2 * 256 * 1024 + 1024 + 256 + 4 * 256)


def test_a_quota_bounds_the_threads(monkeypatch):
    torch.set_num_threads(8)
    monkeypatch.setattr(_cgroup, "cpu_quota", lambda: 1.9)
    assert _threads.for_work() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's own number stays
    torch.set_num_threads(5)
    assert _threads.for_work(1.0) == 5


REPORT = """
import json, os, sys
import fastlm._cgroup, fastlm._threads as threads
quota, others = json.loads(sys.argv[1])
fastlm._cgroup.cpu_quota = lambda: quota
threads.others, os.cpu_count, threads.cores = lambda: others, lambda: 4, lambda: min(4.0, quota or 4.0)
text = threads.wait_policy()
print(json.dumps([text, os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules]))
"""


@pytest.mark.parametrize(
    ("quota", "others", "variables", "want"),
    [
        (None, 0, {}, None),
        (None, 2, {}, "0"),  # on a busy machine
        (1.5, 0, {}, "0"),
        (None, 2, {"OMP_WAIT_POLICY": "active"}, None),
        (None, 2, {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_no_spinning_on_shared_cores(quota, others, variables, want):
    command = [sys.executable, "-c", REPORT, json.dumps([quota, others])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=True)
    text, spins, torch_loaded = json.loads(done.stdout)
    assert spins == want
    assert not torch_loaded
    assert ("as the environment says" in text) == bool(variables)


def test_an_import_changes_nothing():
    code = (
        "import os; before = dict(os.environ); import torch; n = torch.get_num_threads(); import fastlm.cli; "
        "from fastlm.train import pretrain; assert dict(os.environ) == before; assert torch.get_num_threads() == n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_after_torch_nothing_is_set():
    assert "torch was loaded before" in _threads.wait_policy()
    assert not set(_threads.WAITING) & set(os.environ)


@pytest.mark.long
def test_a_busy_machine(tmp_path):
    """With every core busy, a tiny run takes at most 1.2 times what one thread takes (best of three, interleaved)."""
    text = corpus(tmp_path / "corpus.txt")
    options = set_options(train__max_steps=150, train__checkpoint_every=0)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    seconds = {"ours": [], "one": []}
    try:
        for attempt in range(3):
            for name, variables in (("ours", {}), ("one", {"OMP_NUM_THREADS": "1"})):
                out = tmp_path / f"{name}{attempt}"
                command = [
                    sys.executable,
                    "-m",
                    "fastlm",
                    "pretrain",
                    "bert-mini",
                    "--data",
                    str(text),
                    "--out",
                    str(out),
                ]
                subprocess.run([*command, *options], check=True, capture_output=True, env={**os.environ, **variables})
                seconds[name].append(json.loads((out / "summary.json").read_text())["seconds"])
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(seconds)
    assert min(seconds["ours"]) <= 1.2 * min(seconds["one"])
