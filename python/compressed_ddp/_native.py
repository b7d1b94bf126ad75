"""Imports the compiled module `_C`, or says in one line why it cannot be.

`_C` is bound to the torch that it was compiled against. The versions are compared before `_C` is
loaded: with another torch the loader would only name an undefined C++ symbol, or load and crash.
"""

import importlib.util
import re
import sys

_OLDEST_TORCH = (2, 11)
_REBUILD = "rebuild it in this environment: `pip install --no-build-isolation --force-reinstall --no-deps .` in the source folder"


def _import_torch() -> str:
    """Returns the version of torch without its local part: "2.15.0" for 2.15.0+cu132."""
    oldest = ".".join(map(str, _OLDEST_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"compressed_ddp needs torch >= {oldest}, which is not installed; run `pip install 'torch>={oldest}'`, then {_REBUILD}"
        ) from None
    version = torch.__version__.split("+")[0]
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < _OLDEST_TORCH:
        raise ImportError(
            f"compressed_ddp needs torch >= {oldest}, but torch {version} is installed; "
            f"run `pip install 'torch>={oldest}'`, then {_REBUILD}"
        )
    return version


def _check_build(torch_version: str) -> None:
    not_built = ImportError(
        f"compressed_ddp is not built for Python {sys.version_info.major}."
        f"{sys.version_info.minor}: its compiled module is missing; {_REBUILD}"
    )
    try:
        from ._build_info import TORCH_VERSION
    except ModuleNotFoundError:
        raise not_built from None
    if importlib.util.find_spec(f"{__package__}._C") is None:
        raise not_built
    if torch_version != TORCH_VERSION:
        raise ImportError(
            f"compressed_ddp was built against torch {TORCH_VERSION}, but torch {torch_version} is installed; {_REBUILD}"
        )


_check_build(_import_torch())

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"compressed_ddp could not load its compiled module ({error}); {_REBUILD}"
    ) from error

try:
    # A module compiled with another pybind11 than torch's imports well and then cannot take a
    # process group or a bucket from torch.
    _C.self_test()
except Exception as error:
    raise ImportError(
        f"compressed_ddp's compiled module does not fit this torch ({error}); {_REBUILD}"
    ) from error

__all__ = ["_C"]
