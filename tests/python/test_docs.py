"""The documentation is true: its code runs, its links lead somewhere, its words come from the glossary.

Every ```python block of a page runs, in order, in one namespace. A page on which some block says ```python ranks=N runs on N real
Gloo ranks, all of it on each; the default process group is there already. Other code is fenced as bash or text.
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import pytest
import ranks

import compressed_ddp

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PAGES_WITH_CODE = [page for page in PAGES if page.name == "README.md" or page.parent.name == "docs"]
OURS = (".py", ".pyi", ".h", ".cpp", ".md", ".toml", ".json", ".yaml", ".txt", ".cmake")
NOT_OURS = {"build", "dist", "data", "runs", "checkpoints", "shared", "node_modules"}

Block = tuple[int, str, str]  # line of the opening fence, info string, code


def _files(*folders: str) -> list[pathlib.Path]:
    """Text files of the repository below these folders (default: all)."""
    found = []
    for folder in folders or (".",):
        for path in (ROOT / folder).rglob("*"):
            parts = path.relative_to(ROOT).parts
            if (
                path.suffix in OURS
                and parts[0] not in NOT_OURS
                and not any(p[0] == "." or p == "__pycache__" for p in parts)
            ):
                found.append(path)
    return found


def _blocks(text: str) -> list[Block]:
    matches = re.finditer(r"^```([^\n`]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start()) + 1, m[1].strip(), m[2]) for m in matches]


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _python_blocks(page: pathlib.Path) -> list[Block]:
    return [block for block in _blocks(page.read_text()) if block[1].split(" ")[0] == "python"]


def _name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- code


def _run(page: pathlib.Path, folder: str) -> None:
    os.chdir(folder)  # whatever the page writes
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for line, _, code in _python_blocks(page):
        # Line numbers of the page in tracebacks.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def _run_on_rank(rank: int, world_size: int, page: pathlib.Path, folder: str) -> None:
    _run(page, folder)


@pytest.mark.parametrize(
    "page", [page for page in PAGES_WITH_CODE if _python_blocks(page)], ids=_name
)
def test_code_runs(
    page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {
        int(number)
        for _, info, _ in _python_blocks(page)
        for number in re.findall(r"ranks=(\d+)", info)
    }
    assert len(wanted) <= 1, f"{page.name}: one page runs on one number of ranks"
    if wanted:
        ranks.run(wanted.pop(), _run_on_rank, page, str(tmp_path))
    else:
        monkeypatch.chdir(tmp_path)  # restores the folder afterwards
        _run(page, str(tmp_path))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_fences_say_their_language(page: pathlib.Path) -> None:
    text = page.read_text()
    assert text.count("\n```") % 2 == 0, "a fence is not closed"
    known = {"python", "bash", "text", "forbidden"}
    assert {info.split(" ")[0] for _, info, _ in _blocks(text)} <= known


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


# ---- links and names


def _anchors(page: pathlib.Path) -> set[str]:
    """As GitHub makes them: lower case, punctuation gone, spaces to hyphens."""
    headings = re.findall(r"^#+ +(.+)$", _prose(page.read_text()), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page.read_text())):
        if re.match(r"[a-z]+://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in _anchors(path), (
                f"{page.name} links to {target}, but {path.name} has no such heading"
            )


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_file_names_exist(page: pathlib.Path) -> None:
    names = [_name(path) for path in _files()]
    for mentioned in re.findall(r"`([\w./-]+)`", page.read_text()):
        if mentioned.endswith(OURS) and not mentioned.startswith("."):
            assert any(name == mentioned or name.endswith("/" + mentioned) for name in names), (
                f"{page.name} names {mentioned}"
            )


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_members_of_the_state_exist(page: pathlib.Path) -> None:
    state = compressed_ddp.TopKEFState()
    for member in re.findall(r"(?<![/\w])(?:state|TopKEFState)\.(?!py\b)(\w+)", page.read_text()):
        assert hasattr(state, member), f"{page.name} names TopKEFState.{member}"


def test_readme_names_every_metric() -> None:
    readme = (ROOT / "README.md").read_text()
    for key in compressed_ddp.TopKEFState().metrics():
        assert f"`{key.removeprefix('compressed_ddp/')}`" in readme


def test_readme_results_have_a_source() -> None:
    """<!-- results:NAME --> .. <!-- /results --> holds figures only together with a link to the file they come from."""
    readme = (ROOT / "README.md").read_text()
    sections = re.findall(r"<!-- results:(\w+) -->\n(.*?)<!-- /results -->", readme, re.DOTALL)
    assert [name for name, _ in sections] == ["mnist"]
    assert readme.count("<!-- results:") == readme.count("<!-- /results -->") == len(sections)
    for _, text in sections:
        assert "|" not in text or re.search(r"\]\(benchmarks/results/[\w.-]+\.json\)", text)


def test_headings_of_the_algorithm_are_the_stages() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/algorithm.md").read_text(), re.MULTILINE)
    stages = ["compensate_select_", "encode", "exchange", "decode_apply_", "restore_"]
    assert [heading for heading in headings if heading in stages] == stages


# ---- errors


def test_quoted_messages_are_in_the_source() -> None:
    """The first column of the tables of errors.md quotes messages: each must still be one."""
    source = "\n".join(path.read_text() for path in _files("csrc", "python", "build_backend"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a literal that is broken over lines
    quoted = re.findall(r"^\| `([^`]+)`", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    for message in quoted:
        assert message in source, f"no message says: {message}"


# ---- the example payload


def _golden_payload(value_format: str) -> bytes:
    text = (ROOT / f"tests/cpp/data/payload_v3_{value_format}.txt").read_text()
    return bytes.fromhex("".join(line for line in text.splitlines() if not line.startswith("#")))


def test_payloads_on_the_page_are_the_golden_ones() -> None:
    page = (ROOT / "docs/wire_format.md").read_text()
    rows = re.findall(r'^    " *(\d+)  ([0-9a-f ]+)",$', page, re.MULTILINE)
    offsets = [int(offset) for offset, _ in rows]
    assert offsets == [*range(0, 48, 8), *range(16, 48, 8)]
    on_page = [bytes.fromhex(row) for _, row in rows]
    assert b"".join(on_page[:6]) == _golden_payload("bf16")
    assert b"".join(on_page[6:]) == _golden_payload("sign")[16:]


# ---- words


def _forbidden() -> list[tuple[str, str]]:
    (text,) = [
        code
        for _, info, code in _blocks((ROOT / "docs/glossary.md").read_text())
        if info == "forbidden"
    ]
    pairs = [line.split("->") for line in text.splitlines()]
    return [(wrong.strip(), right.strip()) for wrong, right in pairs]


def test_no_forbidden_spellings() -> None:
    forbidden = _forbidden()
    assert len(forbidden) > 10
    found = []
    for path in _files("python", "csrc", "docs", "examples"):
        if path.name == "glossary.md":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for wrong, right in forbidden:
                if re.search(rf"(?<![A-Za-z0-9]){re.escape(wrong)}(?![A-Za-z0-9])", line):
                    found.append(f"{_name(path)}:{number}: {wrong}, say {right}")
    assert not found, "\n".join(found)


def test_no_machine_paths() -> None:
    """A folder of somebody's machine means nothing elsewhere."""
    a_machine = re.compile(r"(?<![\w./:-])/(?:root|home|work|Users|mnt)/\w|\b[A-Z]:\\\\?\w")
    found = []
    for path in [*_files(), *(ROOT / name for name in ("Makefile", ".ci/run", "LICENSE"))]:
        if path.exists():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if a_machine.search(line):
                    found.append(f"{_name(path)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
