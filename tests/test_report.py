"""fastlm/bench/report.py: pages and README.md are what the recorded results say."""

import json
from pathlib import Path

import pytest

from fastlm.bench import report, results

ROOT = Path(__file__).parent.parent


def op(contender, ms, which="fwd", op="gelu", **more):
    return {
        **{"op": op, "shape": "rows8", "dtype": "float32", "pass": which, "contender": contender},
        **{"ms": ms, "ms_iqr": 0.2, "gbps": 10.0, "tflops": 0.0, "of_ceiling": 0.5, "peak_mb": 1.0},
        **more,
    }


def step(contender, ms, recipe="bert-mini"):
    return {
        **{"op": "training step", "recipe": recipe, "shape": "8x128", "dtype": "float32", "pass": "step", "threads": 2},
        **{"contender": contender, "ms": ms, "ms_iqr": 1.0, "tokens_per_s": 1024e3 / ms, "mfu": None, "of_bound": 0.7},
        **{"peak_mb": 700.0, "step_mb": 400.0},
    }


ROWS = [
    *(op("fastlm:cpu", 3.0), op("fastlm:cpu+malloc", 2.0), op("eager", 8.0), op("eager+malloc", 5.0)),
    *(op("fastlm:cpu", 4.0, shape="rows9"), op("compile", 2.0, shape="rows9")),
]
STEPS = [step("fastlm", 100.0), step("transformers", 250.0)]


def test_the_best_of_each_side_counts():
    pairs = results.against_peers(ROWS)
    assert [(ours["ms"], peer["ms"]) for ours, peer in pairs] == [(2.0, 5.0), (4.0, 2.0)]
    assert "| `gelu` | cpu | 1.12 (0.50 to 2.50) |  |" in report.ops_summary(ROWS)
    table = report.ops_table(ROWS)
    assert "| gelu rows8 | fwd | cpu+malloc | 2.000 ±5% | 10 GB/s | 50% | 2.50 eager+malloc |" in table
    assert "0.50 compile" in table  # a row in which fastlm loses is there like any other


def test_a_gpu_has_the_host_apart_and_marks_what_is_no_graph():
    gpu = {"host_ms": 0.05, "timed": "graph"}
    rows = [op("fastlm:cuda", 2.0, **gpu), op("eager", 5.0, **gpu | {"timed": "launches"})]
    table = report.ops_table(rows)
    assert "| backend | ms | host ms | rate |" in table
    assert "| cuda | 2.000 ±5% | 0.050 | 10 GB/s | 50% | 2.50 eager* |" in table
    assert "5.000* ±2%" in report.contenders_tables(rows)
    assert "host ms" not in report.ops_table(ROWS)


def test_a_forward_that_computes_its_gradient_is_not_a_plain_forward():
    """A loss's forward has a label in the table of rows, and a footnote for its mean."""
    rows = [
        op(name, ms, which, "cross_entropy")
        for which in ("fwd", "fwd+bwd")
        for name, ms in (("fastlm:cpu", 2), ("eager", 3))
    ]
    assert "| cross_entropy rows8 | fwd (with gradient) | cpu | 2.000 ±5% " in report.ops_table(rows)
    summary = report.ops_summary(rows)
    assert "| `cross_entropy` | cpu | ¹ | 1.50 (1.50 to 1.50) |" in summary
    assert "¹ This forward also computes the gradient" in summary
    assert "¹" not in report.ops_summary(ROWS)


def test_the_summary_of_steps_has_a_line_a_step():
    """Beside Transformers as shipped and its fastest tuned form; a patched one runs fastlm's ops: neither."""
    rows = [*STEPS, step("transformers tuned", 150.0), step("transformers tuned compiled", 140.0)]
    rows += [step("transformers patched", 90.0), step("fastlm", 50.0, recipe="t5-small-8x256")]
    lines = report.train_summary(rows).splitlines()[2:]
    assert lines == [
        "| bert-mini 8x128, float32, 2 threads | 10,240 | 2.50 | 1.40 | 70% |",
        "| t5-small-8x256, float32, 2 threads | 20,480 |  |  | 70% |",
    ]
    header, _, *lines = report.train_summary([*rows, step("fastlm float32", 300.0)]).splitlines()
    assert header == "| training step | tokens/s | × as shipped | × tuned | × its float32 | of the bound |"
    assert lines == [
        "| bert-mini 8x128, float32, 2 threads | 10,240 | 2.50 | 1.40 | 3.00 | 70% |",
        "| t5-small-8x256, float32, 2 threads | 20,480 |  |  |  | 70% |",
    ]


def test_contenders_of_a_step_in_bfloat16_are_explained(tmp_path, monkeypatch):
    """Beside the table of README.md; and fastlm's two have two colours in the plot."""
    for contenders, said in (
        ((), ".\n"),
        (("fastlm float32",), ". Its float32 is fastlm's own step in float32.\n"),
        (
            ("transformers pure",),
            ". For a step in bfloat16 the tuned forms include those that keep weights and moments",
        ),
    ):
        rows = [*STEPS, *(step(name, 300.0) for name in contenders)]
        (tmp_path / "train.json").write_text(json.dumps({"provenance": {}, "rows": rows}))
        assert f"at the rate of a large product in the same run{said}" in report.summary([tmp_path])
    figures = []
    monkeypatch.setattr(results, "save_figure", lambda figure, path: figures.append(figure))
    names = ("fastlm", "fastlm float32", "transformers", "transformers pure")
    results.plot_steps("x.png", {"bert-mini": dict.fromkeys(names, 1000.0)}, title="steps")
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == list(names)
    assert len({patch.get_facecolor() for patch in legend.get_patches()}) == len(names)


def test_no_row_is_hidden(tmp_path):
    """Every contender's time, spread and memory is on the page, and what did not run, with the reason."""
    missing = [
        {"op": "gelu", "shape": "rows8", "contender": name, "reason": "needs CUDA, the device is cpu"}
        for name in ("liger", "te", "te+malloc")
    ]
    missing += [{"op": "gelu", "shape": f"rows{n}", "contender": "sdpa", "reason": "has no gelu"} for n in range(9)]
    more = {"missing": missing, "left_out": [{"op": "gelu", "shape": "rows77"}]}
    rows = [*ROWS, op("eager", 9.0, peak_mb=None)]
    (tmp_path / "ops.json").write_text(json.dumps({"provenance": more, "rows": rows}))
    page = report.page(tmp_path)
    assert "| shape | dtype | pass | fastlm:cpu | fastlm:cpu+malloc | compile | eager | eager+malloc |" in page
    cells = "3.000 ±3%, 1 MB | 2.000 ±5%, 1 MB |  | 9.000 ±1% | 5.000 ±2%, 1 MB |"
    assert f"| rows8 | float32 | fwd | {cells}" in page
    assert "- not run in gelu rows8: liger, te: needs CUDA, the device is cpu" in page
    assert "- not run in gelu: sdpa: has no gelu" in page
    assert "- left out for want of time: gelu rows77" in page


def test_a_page_of_a_directory(tmp_path):
    provenance = {"cpu": "Some CPU", "cores": 2, "torch": "2.13.0", "commit": "0123456789", "command": "python x.py"}
    for name, rows in (("ops.json", ROWS), ("train.json", STEPS)):
        (tmp_path / name).write_text(json.dumps({"provenance": provenance, "rows": rows}))
    page = report.page(tmp_path)
    assert "Some CPU, 2 cores; torch 2.13.0; commit 0123456" in page
    line = "| bert-mini 8x128 float32, 2 threads | transformers | 4,096 | 250.0 ±0% | n/a | 70% | 700 | 400 | 2.50 |"
    assert line in page
    assert report.summary([tmp_path]).count("commit 0123456") == 1
    other = provenance | {"commit": "abcdef0123"}
    (tmp_path / "ops.json").write_text(json.dumps({"provenance": other, "rows": ROWS}))
    steps, ops = report.summary([tmp_path]).split("commit abcdef0")
    assert "commit 0123456" in steps
    assert "| training step |" in steps
    assert "| `gelu` |" in ops
    report.plots(tmp_path, ROWS, STEPS)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("ops.png", "train.png"))
    assert report.with_summary(f"a\n{report.BEGIN}old\n{report.END}b\n", "new\n").split("\n")[2] == "new"
    with pytest.raises(ValueError, match="expected the lines <!-- results -->"):
        report.with_summary("no such lines", "new")


def test_curves_and_what_did_not_run(tmp_path):
    curve = {"losses": [5.0] * 20, "curve_noise": 0.01}
    rows = [
        {**step("fastlm", 100.0), **curve, "curve_off": 0.0},
        {**step("transformers", 250.0), **curve, "curve_off": 0.004},
    ]
    missing = [{"recipe": "bert-mini", "contender": "transformers packed", "reason": "no row is padded"}]
    (tmp_path / "train.json").write_text(json.dumps({"provenance": {"missing": missing}, "rows": rows}))
    (tmp_path / "curves.png").touch()
    page = report.page(tmp_path)
    assert "Losses of the first 20 steps: at most 0.40% from fastlm's (bert-mini, transformers)." in page
    assert "- not run in bert-mini: transformers packed: no row is padded" in page
    assert "](curves.png)" in page
    assert "learns otherwise" not in page
    rows[1]["curve_off"] = 0.05
    assert "**transformers learns otherwise** in bert-mini: 5.00% off, noise 1.00%." in report.curves_note(rows)


def test_pages_and_readme_are_what_the_results_say(capsys):
    assert report.main(ROOT, ["--check"]) == 0, capsys.readouterr().out + "python benchmarks/report.py writes them"


def test_a_recorded_command_can_be_run_and_names_no_directory_of_this_machine():
    given = ["benchmarks/bench_train.py", "--contenders", "fastlm float32", "--json", "/somewhere/else/train.json"]
    command = results._command(given)
    assert command == "python benchmarks/bench_train.py --contenders 'fastlm float32' --json train.json"
