"""Finds the torch to build against, without importing it.

Used by the build backend and, as a script, by CMake (csrc/CMakeLists.txt), so that both judge the
same torch by the same rule. The script prints the folder of torch and its version, one a line; on
failure it prints one line with the remedy to stderr and exits with 1.
"""

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

OLDEST_TORCH = "2.11"

_REMEDY = (
    "install it in the environment that will use compressed_ddp "
    f"(pip install 'torch>={OLDEST_TORCH}'), "
    "then: pip install scikit-build-core cmake ninja && pip install --no-build-isolation ."
)


class UnusableTorchError(RuntimeError):
    """No torch, or a torch that is too old; the message is one line and holds the remedy."""


def _candidate_folders() -> list[Path]:
    folders = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        folders += [Path(folder) for folder in spec.submodule_search_locations]
    # pip hides the environment's packages from an isolated build, but not where they lie.
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    return [folder for folder in folders if (folder / "version.py").is_file()]


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def find_torch() -> tuple[Path, str]:
    """Returns the folder of torch and its version without the local part ("2.15.0").

    Raises:
        UnusableTorchError: torch is missing, older than OLDEST_TORCH, or has no C++ headers.
    """
    folders = _candidate_folders()
    if not folders:
        raise UnusableTorchError(
            f"compressed_ddp is compiled against the installed torch, but {sys.executable} has none; {_REMEDY}"
        )
    folder = folders[0]
    # Read as text: importing torch takes seconds, and pip's isolated environment could not.
    text = (folder / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^__version__\s*(?::[^=]*)?=\s*['\"]([^'\"+]+)", text, re.MULTILINE)
    if match is None:
        raise UnusableTorchError(
            f"compressed_ddp: no version found in {folder}/version.py; {_REMEDY}"
        )
    version = match.group(1)
    if _major_minor(version) < _major_minor(OLDEST_TORCH):
        raise UnusableTorchError(
            f"compressed_ddp needs torch >= {OLDEST_TORCH}, but {folder} is {version}; {_REMEDY}"
        )
    if not (folder / "include" / "torch" / "csrc").is_dir():
        raise UnusableTorchError(
            f"compressed_ddp needs torch's C++ headers, but {folder}/include has none; {_REMEDY}"
        )
    return folder.resolve(), version


if __name__ == "__main__":
    try:
        torch_folder, torch_version = find_torch()
    except UnusableTorchError as error:
        sys.exit(str(error))
    print(torch_folder.as_posix())
    print(torch_version)
