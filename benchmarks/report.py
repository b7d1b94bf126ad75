"""Writes docs/benchmarks.md, and README.md's table, from the results files: every number is one of theirs.

    python benchmarks/report.py            write
    python benchmarks/report.py --check    change nothing; exit code 1 when the page is out of date

Each file of benchmarks/results/ has a block of the page between `<!-- begin NAME -->` and
`<!-- end NAME -->`, NAME being the file's name without `.json`. What stands outside of the blocks is
kept. A new file's block is added at the end of the page; a block without a file is taken out.
In README.md, what stands between `<!-- results:mnist -->` and `<!-- /results -->` is written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = REPOSITORY / "docs" / "benchmarks.md"
README = REPOSITORY / "README.md"
NEW_PAGE = "# Benchmarks\n"
README_TABLE = re.compile(r"(<!-- results:mnist -->\n).*?(<!-- /results -->)", re.DOTALL)
BLOCK = re.compile(r"<!-- begin (\S+) -->\n.*?<!-- end \1 -->\n\n?", re.DOTALL)

Result = Mapping[str, Any]
Rows = list[Mapping[str, Any]]


# ---- the page


def page(text: str, results: Mapping[str, Result], folder: Path = RESULTS) -> str:
    """Return the page `text` with the blocks of `results` (by file name without `.json`)."""
    written = []

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in results:
            return ""
        written.append(name)
        return block(name, results[name], folder) + "\n"

    text = BLOCK.sub(replace, text).rstrip("\n") + "\n"
    for name in sorted(results.keys() - set(written)):
        text = text.rstrip("\n") + "\n\n" + block(name, results[name], folder)
    return text


def block(name: str, result: Result, folder: Path) -> str:
    """Return one results file as Markdown, between its marks."""
    sections = SECTIONS.get(result.get("benchmark", ""), any_result)(result)
    picture = folder / f"{name}.png"
    if picture.is_file():
        sections.append(f"![{name}](../benchmarks/results/{picture.name})")
    parts = [f"## {title(name, result)}", provenance(name, result), *sections]
    return f"<!-- begin {name} -->\n" + "\n\n".join(parts) + f"\n\n<!-- end {name} -->\n"


def title(name: str, result: Result) -> str:
    """Return the heading of a result: what a benchmark calls `title` and a study `study`."""
    text = str(result.get("title") or result.get("study") or name)
    return text[0].upper() + text[1:]


def provenance(name: str, result: Result) -> str:
    """Return what says where and from what the figures come."""
    about = dict(result.get("system") or result.get("provenance") or {})
    commit = str(about.pop("commit", None) or "unknown")
    dirty = about.pop("dirty", False) or commit.endswith("-dirty")
    command = about.pop("command", None)
    line = f"`benchmarks/results/{name}.json`, commit `{commit.removesuffix('-dirty')[:12]}`"
    parts = [line + (" with local changes" if dirty else ""), facts(about)]
    if result.get("settings"):
        parts.append("Settings: " + facts(result["settings"]))
    text = ". ".join(part for part in parts if part) + "."
    return text + (f"\n\n```bash\n{command}\n```" if command else "")


def facts(about: Mapping[str, Any]) -> str:
    """Return keys and values as a phrase, without those that nobody knows."""
    known = {key: value for key, value in about.items() if value is not None}
    return "; ".join(f"{words(key)}: {scalar(value)}" for key, value in known.items())


def readme(text: str, results: Mapping[str, Result]) -> str:
    """Return README.md's `text` with its table: the MNIST study, seed by seed."""
    study = results.get("mnist_simple_cnn")
    if study is None:
        return text
    by_seed: dict[int, dict[str, Result]] = {}
    for run in study["runs"]:
        by_seed.setdefault(run["seed"], {})[run["arm"]] = run
    rows: Rows = [
        {
            "seed": seed,
            "dense, test accuracy": f"{100 * arms['dense']['held_out_accuracy']:.2f} %",
            "compressed": f"{100 * arms['compressed']['held_out_accuracy']:.2f} %",
            "bytes per rank and step, dense": round(arms["compressed"]["dense_bytes_per_step"]),
            "bytes, compressed": round(arms["compressed"]["bytes_sent_per_step"]),
        }
        for seed, arms in by_seed.items()
    ]
    about, found = study["provenance"], study["comparison"]
    low, high = found["interval_95_points"]
    words = (
        f"SimpleCNN ({about['parameters']:,} parameters) on MNIST, {study['processes']} ranks over Gloo, 5 epochs, SGD with "
        f"momentum 0.9, density 0.01. Mean of the paired differences: {found['mean_points']:+.2f} points (95 % interval "
        f"{low:+.2f} .. {high:+.2f}). Dense bytes are those of a ring all-reduce, computed; compressed bytes are counted. "
        f"{about['processor']}, {about['cores']} cores, torch {about['torch']}, commit `{about['commit'][:12]}`; "
        "from [mnist_simple_cnn.json](benchmarks/results/mnist_simple_cnn.json)."
    )
    return README_TABLE.sub(lambda match: f"{match[1]}{table(rows)}\n\n{words}\n{match[2]}", text)


# ---- the benchmarks


def stages(result: Result) -> list[str]:
    """Return bench_stages: stage 1, stage 4, and the rest."""
    rows: Rows = result["rows"]
    axes = ("size_mib", "segments", "density", "threads")
    places = list(dict.fromkeys(tuple(row[axis] for axis in axes) for row in rows))
    by_place = {(row["stage"], row["payloads"], *(row[axis] for axis in axes)): row for row in rows}
    payloads = sorted({row["payloads"] for row in rows if row["payloads"]})
    first, last, rest = [], [], []
    for place in places:
        here = dict(zip(("MiB", *axes[1:]), place))

        def of(
            stage: str, count: int | None = None, place: tuple[Any, ...] = place
        ) -> Mapping[str, Any]:
            return by_place[stage, count, *place]

        select = of("compensate_select_")
        first.append(
            {
                **here,
                "stream, ms": of("stream")["ms"],
                "compensate_select_, ms": select["ms"],
                "over the stream": select["over_stream"],
                "times faster than eager": select["eager_over_it"],
            }
        )
        decode = {
            f"{count} payloads": of("decode_apply_", count)["over_fill"] for count in payloads
        }
        last.append({**here, "fill, ms": of("fill")["ms"], **decode})
        others = ("encode", "restore_", "set-up", "eager")
        rest.append({**here, **{f"{stage}, ms": of(stage)["ms"] for stage in others}})
    return [
        "Median [quartiles]; a ratio is the median of the ratios inside each turn.",
        "### compensate_select_\n\n" + table(first),
        "### decode_apply_: its time over that of a fill of the output\n\n" + table(last),
        "### encode, restore_, the operator's set-up, and the eager pipeline\n\n" + table(rest),
        *goals(result),
    ]


def hook(result: Result) -> list[str]:
    """Return bench_hook."""
    renamed = {
        "cpus": "CPUs",
        "hook": "hook",
        "us_per_bucket": "us per bucket",
        "over_built_in_us": "over built-in, us",
        "orchestration_us": "orchestration, us",
        "cpu_us_per_bucket": "CPU time, us",
        "orchestration_cpu_us": "orchestration, CPU time, us",
    }
    rows = [{name: row.get(key) for key, name in renamed.items()} for row in result["rows"]]
    return [
        "Median [quartiles]; differences are taken inside each turn.",
        table(rows),
        *goals(result),
    ]


def exchange_counts(result: Result) -> list[str]:
    """Return count_exchange: how the volumes grow, ResNet-50 in full, and what split's consist of."""
    rows: Rows = result["rows"]
    about = ("model", "scope", "bucket_mib", "buckets")
    renamed = {
        "bucket_mib": "bucket, MiB",
        "allgather_bytes": "allgather",
        "split_bytes": "split",
    }

    def pick(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        return {renamed.get(key, words(key)): row[key] for key in keys}

    last = max(row["ranks"] for row in rows)
    default = [row for row in rows if row["model"] == "ResNet-50" and row["bucket_mib"] == "25"]
    volumes = ("allgather_bytes", "split_bytes", "allgather_over_split")
    causes = ("two_payloads", "header", "k", "index", "alignment", "largest")
    return [
        f"### Bytes per rank, {last:,} ranks over 8\n\n"
        + table(pick(row, *about, *list(renamed)[1:]) for row in result["growth"]),
        "### ResNet-50 in buckets of 25 MiB, bytes per rank and step\n\n"
        + table(pick(row, "scope", "ranks", *volumes) for row in default),
        f"### What split sends at {last:,} ranks\n\n"
        "Bytes per rank. `two payloads` is 2 (P - 1) / P payloads of uncut buckets; the causes of the rest add up to `split`.\n\n"
        + table(pick(row, *about, "split_bytes", *causes) for row in rows if row["ranks"] == last),
        *goals(result),
    ]


def any_result(result: Result) -> list[str]:
    """Return any other benchmark or study: its comparison, its goals and its rows."""
    sections = []
    comparison = result.get("comparison") or {}
    if comparison:
        sections.append(
            "\n".join(f"- {words(key)}: {nested(value)}" for key, value in comparison.items())
        )
    rows = list(result.get("rows") or result.get("runs") or [])
    if rows:
        keys = dict.fromkeys(key for row in rows for key in row)  # not every row has all of them
        shown = [key for key in keys if any(is_cell(row.get(key)) for row in rows)]
        sections.append(table([{words(key): row.get(key) for key in shown} for row in rows]))
    return [*sections, *goals(result)]


SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "bench_stages": stages,
    "bench_hook": hook,
    "count_exchange": exchange_counts,
}


def goals(result: Result) -> list[str]:
    """Return the table of goals, if there are any."""
    found = result.get("goals") or []
    rows = []
    for entry in found:
        cells = {words(key): value for key, value in entry.items()}
        cells["reached"] = "yes" if entry["reached"] else "**no**"
        rows.append(cells)
    return ["### Goals\n\n" + table(rows)] if rows else []


# ---- Markdown


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows of equal keys as a table; columns without any value are left out."""
    rows = list(rows)
    names = [name for name in rows[0] if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(scalar(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def is_cell(value: Any) -> bool:
    """Return whether a value fits into a cell: a number, a short text, or quartiles."""
    return is_quartiles(value) or isinstance(value, (bool, int, float, str))


def is_quartiles(value: Any) -> bool:
    """Return whether a value is a median, with quartiles beside it or without."""
    return isinstance(value, Mapping) and "median" in value


def scalar(value: Any) -> str:
    """Return one value as text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if is_quartiles(value):
        text = scalar(value["median"])
        return text + (
            f" [{scalar(value['p25'])}, {scalar(value['p75'])}]" if "p25" in value else ""
        )
    return str(value).replace("|", "\\|")


def nested(value: Any) -> str:
    """Return a value of a study's comparison: numbers, lists and dictionaries, on one line."""
    if isinstance(value, Mapping) and not is_quartiles(value):
        return "; ".join(f"{words(str(key))}: {nested(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(nested(part) for part in value)
    return scalar(value) or "none"


def words(key: str) -> str:
    """Return a key of a results file as words; units keep their spelling."""
    return re.sub(r"\bgib\b", "GiB", re.sub(r"\bmib\b", "MiB", key.replace("_", " ").strip()))


def read_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Return all results files by name."""
    return {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args()
    results = read_results(options.results)
    before = options.page.read_text("utf-8") if options.page.is_file() else ""
    written = {options.page: (before, page(before or NEW_PAGE, results, options.results))}
    before = options.readme.read_text("utf-8")
    written[options.readme] = (before, readme(before, results))
    stale = [path for path, (before, after) in written.items() if before != after]
    for path in stale:
        if options.check:
            print(
                f"{path.name} is not what the results files give; run `python benchmarks/report.py`"
            )
        else:
            path.write_text(written[path][1], encoding="utf-8")
            print(f"written: {path.name}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
