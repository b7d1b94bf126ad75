"""The benchmarks run end to end on small inputs, their arithmetic is right, and docs/benchmarks.md shows what they measured."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import ranks
import torch

import compressed_ddp

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # the benchmarks are scripts, not a package

import bench_stages  # noqa: E402
import count_exchange  # noqa: E402
import exchange_arms  # noqa: E402
import timing  # noqa: E402

# By its path: the examples have a report.py, too, which other tests of this process import.
_spec = importlib.util.spec_from_file_location("benchmarks_report", BENCHMARKS / "report.py")
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)


def run_script(script: str, *arguments: object) -> str:
    """Runs a benchmark as a user would and returns what it printed."""
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- timing


def test_quartiles_are_those_of_the_inclusive_method() -> None:
    assert timing.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "p25": 2.0, "p75": 4.0}
    assert timing.quartiles([7.0]) == {"median": 7.0, "p25": 7.0, "p75": 7.0}


def test_ratios_and_differences_are_paired_by_turn() -> None:
    slow_and_fast_turns = [10.0, 1.0, 10.0, 1.0]
    twice = [20.0, 2.0, 20.0, 2.0]
    assert timing.paired_ratio(twice, slow_and_fast_turns) == {
        "median": 2.0,
        "p25": 2.0,
        "p75": 2.0,
    }
    assert (
        timing.paired_difference(twice, slow_and_fast_turns, slow_and_fast_turns)["median"] == 0.0
    )


def test_arms_take_turns_and_preparation_is_not_timed() -> None:
    calls: list[str] = []

    def prepare(turn: int) -> object:
        calls.append(f"prepare {turn}")
        return lambda: calls.append(f"B {turn}")

    arms = {"A": lambda turn: calls.append(f"A {turn}"), "B": timing.Prepared(prepare)}
    samples = timing.in_turns(arms, repetitions=2, warmup=1)
    assert calls == [
        entry for turn in range(3) for entry in (f"A {turn}", f"prepare {turn}", f"B {turn}")
    ]
    assert {name: len(values) for name, values in samples.items()} == {"A": 2, "B": 2}


def test_the_command_of_a_result_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["/somewhere/bench_stages.py", "--sizes", "25", "/built", "--output", "/elsewhere/a.json"],
    )
    assert timing._command() == "python benchmarks/bench_stages.py --sizes 25 DIR"


# ---- bench_stages


def test_resnet50_layout_is_that_of_the_model() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        parameters = list(models.resnet50().parameters())
    expected = sorted((parameter.numel(), parameter.dim() <= 1) for parameter in parameters)
    assert sorted(bench_stages.resnet50_parameters()) == expected


def test_the_smallest_gpt2_has_its_124_million_entries_and_the_last_parameters_come_first() -> None:
    parameters = bench_stages.gpt2_parameters()
    assert sum(numel for numel, _ in parameters) == 124_439_808
    layout = bench_stages.segmentation("gpt2", 5_000_000, 0.01)
    assert layout.segments[:3] == [768, 768, 768]
    assert layout.groups[:4] == [-1, -1, -1, 0]
    assert sum(layout.segments) == 5_000_000


def test_what_is_counted_is_written_with_the_machine(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "count.json"
    options = {"settings": {"n": 1}, "goals": [], "rows": [{"a": 2}], "left": [3]}
    timing.write_counted("count", "Counted", **options, path=path)
    written = json.loads(path.read_text())
    assert list(written) == ["benchmark", "title", "system", "settings", "goals", "rows", "left"]
    assert (written["settings"], written["rows"]) == ({"n": 1}, [{"a": 2}])
    assert "processor" in written["system"]


def test_the_eager_pipeline_selects_what_the_operator_selects() -> None:
    layout = bench_stages.segmentation("resnet50", 200_000, 0.01)
    gradient, residual = torch.randn(200_000), torch.randn(200_000)
    other_residual = residual.clone()
    values, indices, _ = compressed_ddp.ops.compensate_select_(
        gradient, residual, *layout.arguments
    )
    eager_values, eager_indices = bench_stages.eager_pipeline(gradient, other_residual, layout)
    order = eager_indices.argsort()
    assert torch.equal(eager_indices[order], indices.long())
    assert torch.equal(eager_values[order], values)
    compressed = torch.repeat_interleave(
        torch.tensor(layout.groups) >= 0, torch.tensor(layout.segments)
    )
    assert torch.equal(other_residual[compressed], residual[compressed])


def test_bench_stages_end_to_end(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "stages.json"
    arguments = [
        "--sizes",
        0.25,
        "--densities",
        0.01,
        0.1,
        "--repetitions",
        3,
        "--warmup-steps",
        2,
        "--threads",
        1,
    ]
    run_script("bench_stages.py", *arguments, "--output", output)
    result = json.loads(output.read_text())
    assert len(result["rows"]) == 2 * 2 * 11
    decode = [row for row in result["rows"] if row["stage"] == "decode_apply_"]
    assert {row["payloads"] for row in decode} == {1, 2, 4, 8}
    for row in result["rows"]:
        assert 0 < row["ms"]["p25"] <= row["ms"]["median"] <= row["ms"]["p75"]
    assert {entry["goal"] for entry in result["goals"]} == {
        "time over the stream's",
        "eager pipeline's time over its",
        "8 payloads over a fill",
    }
    assert {"processor", "cores", "torch", "compiler", "commit", "date"} <= result["system"].keys()
    assert str(tmp_path) not in output.read_text()


# ---- bench_hook


def test_bench_hook_end_to_end(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "hook.json"
    run_script("bench_hook.py", "--buckets", 3, "--iterations", 4, "--cpus", 1, "--output", output)
    rows = {row["hook"]: row for row in json.loads(output.read_text())["rows"]}
    assert {"built-in", "C++ entry", "Python entry", "Python all-reduce", "kernels"} <= rows.keys()
    assert "orchestration_us" in rows["C++ entry"]
    assert "over_built_in_us" not in rows["built-in"]


# ---- the exchanges

# ResNet-50's second block of stages, small enough to be quick; all_reduce_ knows no 1-D parameters, so those are the short ones here.
PART_OF_RESNET50 = [(numel, numel < 1024) for numel, _ in bench_stages.resnet50_parameters()[30:75]]
EXCHANGE_BUCKETS = {
    "resnet50": PART_OF_RESNET50,
    "one tensor": [(20_001, False)],
    "fewer units than ranks": [(30, True)],
    "dense at both ends": [(700, True), (5000, False), (1023, True), (1024, False), (64, True)],
}


def bytes_of_all_buckets(rank: int, world_size: int, exchange: str, scope: str) -> dict[str, float]:
    found = {}
    for name, bucket in EXCHANGE_BUCKETS.items():
        state = compressed_ddp.TopKEFState(
            density=0.01, scope=scope, exchange=exchange, dense_steps=0
        )
        segments = [numel for numel, _ in bucket]
        for _ in range(2):  # in the first step the ranks compare themselves
            compressed_ddp.all_reduce_(
                torch.randn(sum(segments)), state, name="w", segments=segments
            )
        found[name] = state.metrics()["compressed_ddp/bytes_sent"]
    return found


@pytest.mark.parametrize("scope", ["tensor", "chunk"])
@pytest.mark.parametrize("exchange", ["allgather", "split"])
@pytest.mark.parametrize("world_size", [2, 3, 5], ids="ranks={}".format)
def test_the_counted_volume_is_that_of_real_ranks(
    world_size: int, exchange: str, scope: str
) -> None:
    by_rank = ranks.run(world_size, bytes_of_all_buckets, exchange, scope)
    for name, bucket in EXCHANGE_BUCKETS.items():
        parts = count_exchange.parts_of(bucket, scope)
        expected = count_exchange.bytes_sent(parts, exchange, world_size)
        assert [found[name] for found in by_rank] == expected, name


def test_the_counted_volume_is_that_of_the_benchmark_on_the_wire() -> None:
    results = report.read_results()
    exchanges = (exchange_arms.ALL_GATHER, exchange_arms.SPLIT)  # those that are counted
    counted = {
        (row["ranks"], exchange): row[f"{exchange}_bytes"]
        for row in results["count_exchange"]["rows"]
        if (row["model"], row["scope"], row["bucket_mib"]) == ("ResNet-50", "tensor", "25")
        for exchange in exchanges
    }
    rows = [row for row in results["bench_wire"]["rows"] if row["arm"] in exchanges]
    assert {row["ranks"] for row in rows} == {2, 4, 8}
    for row in rows:
        assert row["counted_bytes_per_step"] == counted[row["ranks"], row["arm"]]


@pytest.mark.parametrize("scope", ["tensor", "chunk"])
def test_what_split_sends_beyond_two_payloads_adds_up(scope: str) -> None:
    parts = [count_exchange.parts_of(PART_OF_RESNET50, scope)]
    for world_size in (2, 7, 64):
        found = count_exchange.count(parts, world_size)
        causes = ("two_payloads", "header", "k", "index", "alignment", "largest")
        assert abs(sum(found[key] for key in causes) - found["split_bytes"]) <= len(causes)
        every = count_exchange.bytes_sent(parts[0], "split", world_size)
        assert found["split_bytes"] == round(sum(every) / world_size)
        assert found["split_worst_rank_bytes"] == max(every)


def test_power_sgd_sends_two_factors_and_what_it_leaves_alone() -> None:
    shapes = [(64, 3, 7, 7), (64,), (4, 4), (4, 3)]  # the last two: 8 x 2 is not below 16
    assert exchange_arms.power_sgd_numel(shapes) == 64 + 147 + 64 + 16 + 12


@pytest.mark.slow
def test_bench_wire_end_to_end(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "wire.json"
    arguments = ["--network", "loopback", "--layout", "short", "--ranks", 2, "--steps", 2]
    command = [sys.executable, BENCHMARKS / "bench_wire.py", *arguments, "--output", output]
    # The goals may be missed: whatever else uses the loopback counts, too.
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=110, check=False
    )
    assert output.is_file(), done.stdout + done.stderr
    result = json.loads(output.read_text())
    arms = [*exchange_arms.ARMS, exchange_arms.HIERARCHICAL]
    assert [row["arm"] for row in result["rows"]] == arms
    for row in result["rows"]:
        assert row["sent_bytes_per_step"] >= row["counted_bytes_per_step"] > 0
    assert len(result["goals"]) == 3


@pytest.mark.slow
def test_bench_wire_time_end_to_end(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "time.json"
    arguments = ["--network", "loopback", "--layout", "short", "--ranks", 2]
    arguments += ["--turns", 2, "--warm-up", 1, "--rates", "none"]
    run_script("bench_wire_time.py", *arguments, "--output", output)
    result = json.loads(output.read_text())
    assert [row["arm"] for row in result["rows"]] == [*exchange_arms.ARMS]
    assert all(row["ms"]["median"] > 0 for row in result["rows"])
    assert result["goals"] == []  # of a rate that was not asked for


@pytest.mark.slow
def test_bench_auto_end_to_end(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "auto.json"
    arguments = ["--network", "loopback", "--layout", "short", "--ranks", 2, "--turns", 2]
    arguments += ["--warm-up", 1, "--rates", "none", "--densities", 0.1, 0.5]
    run_script("bench_auto.py", *arguments, "--output", output)
    result = json.loads(output.read_text())
    rows = {(row["density"], row["arm"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 6 and len(result["goals"]) == 2
    for density in (0.1, 0.5):
        auto = rows[density, "auto"]
        sparse, buckets = map(int, auto["sparse_buckets"].split(" of "))
        assert 0 <= sparse <= buckets > 0
        assert auto["predicted_sparse_ms"] > 0 and auto["predicted_dense_ms"] > 0
        if sparse in (0, buckets):
            same = rows[density, "allgather" if sparse else "dense"]
            assert auto["bytes_sent"] == pytest.approx(same["bytes_sent"], rel=1e-6)


# ---- report


RESULT = {
    "title": "a benchmark",
    "system": {
        "processor": "P",
        "cores": 2,
        "commit": "0123456789abcdef",
        "dirty": False,
        "command": "python b.py",
    },
    "goals": [{"goal": "fast", "limit": "<= 1", "value": 2.5, "reached": False}],
    "rows": [{"name": "x", "ms": {"median": 1.25, "p25": 1.0, "p75": 2.0}, "curve": [1, 2]}],
}
STUDY = {
    "study": "loss of a model",
    "provenance": {"commit": "fedcba9876543210-dirty", "date": "today", "torch": None},
    "comparison": {"mean_points": -0.125, "best": {"dense": {"loss": 1.5}}},
    "runs": [
        {"arm": "dense", "loss": 1.5, "step_ms": {"median": 3.0, "total": 9.0}},
        {"arm": "compressed", "loss": 1.25, "step_ms": {"median": 4.0}},
    ],
}


def test_report_shows_every_figure_and_where_it_comes_from() -> None:
    text = report.page("# Benchmarks\n\nWords.\n", {"b": RESULT, "s": STUDY})
    for part in (
        "Words.",
        "## A benchmark",
        "`0123456789ab`",
        "processor: P",
        "python b.py",
        "1.25 [1, 2]",
        "**no**",
    ):
        assert part in text
    for part in (
        "## Loss of a model",
        "with local changes",
        "- mean points: -0.125",
        "- best: dense: loss: 1.5",
        "| compressed | 1.25 | 4 |",
    ):
        assert part in text
    assert "curve" not in text


def test_report_changes_only_its_blocks() -> None:
    text = (
        report.page("# Benchmarks\n", {"b": RESULT, "s": STUDY}).replace(
            "<!-- begin s", "Between.\n\n<!-- begin s"
        )
        + "\nAfter.\n"
    )
    assert report.page(text, {"b": RESULT, "s": STUDY}) == text
    changed = report.page(text, {"b": {**RESULT, "title": "renamed"}})
    assert "Between." in changed
    assert "After." in changed
    assert "## Renamed" in changed
    assert "Loss of a model" not in changed


def test_report_check_notices_a_changed_figure(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b.json").write_text(json.dumps(RESULT))
    page = tmp_path / "page.md"
    where = ["--results", str(tmp_path), "--page", str(page)]
    run_script("report.py", *where)
    run_script("report.py", *where, "--check")
    page.write_text(page.read_text().replace("1.25", "1.15"))
    command = [sys.executable, str(BENCHMARKS / "report.py"), *where, "--check"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_the_page_is_what_the_results_give() -> None:
    page = REPOSITORY / "docs" / "benchmarks.md"
    assert report.page(page.read_text("utf-8"), report.read_results()) == page.read_text("utf-8")
