"""fastlm/bench/check.py: what counts as slower than recorded, and what cannot be compared. No clock is read."""

import json
from pathlib import Path

import pytest

from fastlm import info
from fastlm.bench import check

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def op(contender, ms, iqr=0.0, **more):
    row = {"op": "gelu", "shape": "rows8", "dtype": "float32", "pass": "fwd+bwd", "contender": contender}
    return {**row, "ms": ms, "ms_iqr": iqr, **more}


RECORDED = [op("fastlm:cpu", 2.0), op("fastlm:cpu+malloc", 1.0), op("eager", 9.0), op("compile+malloc", 2.0)]


def run(first, second=None):
    """(lines but the heading, whether it is good, what was asked for)."""
    asked, answers = [], iter([(first, {}), (second, {})])

    def measure(names):
        asked.append(names)
        return next(answers)

    lines, bad = check.check(RECORDED, measure)
    return lines[1:], not bad, asked


def test_a_slow_machine_is_no_regression():
    """All of it three times slower, another peer the best by a little, and the floor just kept."""
    lines, good, asked = run([op("fastlm:cpu", 3.2), op("eager", 5.8), op("compile", 6.0)])
    assert good
    assert asked == [None]
    assert "2.00" in lines[0]
    assert "1.81" in lines[0]
    assert "ok" in lines[0]


def test_what_is_slower_once_is_measured_again():
    slow, fine = ([op("fastlm:cpu", ms), op("eager", 4.0)] for ms in (2.5, 2.0))
    lines, good, asked = run(slow, fine)
    assert good
    assert asked == [None, ["gelu"]]
    assert "1.60" in lines[0]
    assert "ok" in lines[0]
    lines, good, _ = run(slow, slow)
    assert not good
    assert "SLOWER" in lines[0]


def test_the_spread_of_both_runs_widens_the_margin():
    noisy = [op("fastlm:cpu", 2.5, iqr=0.25), op("eager", 4.0, iqr=0.4)]  # 10% and 10%: 14% beside the floor
    lines, good, asked = run(noisy)
    assert good
    assert asked == [None]
    assert "24%" in lines[0]


def test_no_row_is_hidden():
    """One that is not recorded is shown as new; one that no longer runs fails, though its shape has other rows."""
    other = [op("fastlm:triton", 1.0), op("eager", 4.0), op("fastlm:cpu", 1.0, op="new"), op("eager", 2.0, op="new")]
    lines, good, _ = run(other, other)
    assert not good
    verdicts = {line.split(" fastlm:")[0].split()[0] + line.split("fastlm:")[1].split()[0]: line for line in lines}
    assert "new" in verdicts["gelutriton"]
    assert "new" in verdicts["newcpu"].split("fastlm:cpu")[1]
    assert "GONE" in verdicts["gelucpu"]
    # Shapes that the quick form leaves out are not missed.
    more = [*RECORDED, op("fastlm:cpu", 1.0, shape="rows9"), op("eager", 1.0, shape="rows9")]
    assert [row.verdict for row in check.compare(more, RECORDED)] == ["ok"]


def test_steps_are_told_apart_by_threads():
    same = {"recipe": "bert-mini-16x128", "shape": "16x128", "dtype": "float32", "ms_iqr": 0.0}
    times = [(1, "fastlm", 2.0), (1, "transformers", 6.0), (2, "fastlm", 1.0), (2, "transformers", 4.0)]
    steps = [{**same, "threads": n, "contender": contender, "ms": ms} for n, contender, ms in times]
    assert sorted(ratio.times for ratio in check.ratios(steps).values()) == [3.0, 4.0]


def test_what_cannot_be_compared_says_why(tmp_path, capsys):
    assert check.main(BENCHMARKS, ["--results", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "ops.json is not there: nothing is recorded yet; record it with `make bench`" in said
    machine = info.machine()
    path = tmp_path / "ops.json"
    path.write_text(json.dumps({"provenance": {**machine, "cpu": "Another CPU"}, "rows": RECORDED}))
    assert check.main(BENCHMARKS, ["--results", str(tmp_path), "--only", "ops"]) == 2
    assert "was recorded with cpu = Another CPU" in capsys.readouterr().out


def test_the_exit_status_says_slower(tmp_path, capsys):
    path = tmp_path / "ops.json"
    path.write_text(json.dumps({"provenance": info.machine(), "rows": RECORDED}))
    for ms, status in ((1.0, 0), (3.0, 1)):
        now = [op("fastlm:cpu", ms), op("eager", 2.0)]
        arguments = ["--results", str(tmp_path), "--only", "ops"]
        assert check.main(BENCHMARKS, arguments, measure_ops=lambda names, now=now: (now, {})) == status
    assert "SLOWER than recorded, twice" in capsys.readouterr().out


@pytest.mark.parametrize("crash", [False, True])
def test_a_wrong_contender_is_named_in_the_table(crash, tmp_path, capsys):
    """bench_ops.py names it in what it writes, with exit status 1; a traceback is still an error."""
    path = tmp_path / "ops.json"
    path.write_text(json.dumps({"provenance": info.machine(), "rows": RECORDED}))
    missing = [{"op": "gelu", "shape": "rows8", "contender": "fastlm:cpu", "reason": "WRONG: output 0 is 1 away"}]
    missing += [{"op": "gelu", "shape": "rows8", "contender": "liger", "reason": "it is not installed"}]
    content = json.dumps({"provenance": {"missing": missing}, "rows": [op("eager", 2.0)]})
    (tmp_path / "wrong.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        f"Path(sys.argv[sys.argv.index('--json') + 1]).write_text({content!r})\n"
        f"{'raise OSError' if crash else 'sys.exit(1)'}\n"
    )

    def measure(names):
        return check.run(tmp_path / "wrong.py")

    arguments = ["--results", str(tmp_path), "--only", "ops"]
    if crash:
        with pytest.raises(RuntimeError, match=r"wrong\.py failed with 1:"):
            check.main(BENCHMARKS, arguments, measure_ops=measure)
        return
    assert check.main(BENCHMARKS, arguments, measure_ops=measure) == 1
    said = capsys.readouterr().out.splitlines()
    assert "gelu rows8 fastlm:cpu  WRONG: output 0 is 1 away" in said
    assert any("GONE" in line and "fastlm:cpu" in line for line in said)
    assert said[-1] == "ops: WRONG results, GONE, twice"
