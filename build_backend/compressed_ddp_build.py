"""Build backend: scikit-build-core, after a look at torch.

Each hook that leads to a compilation first checks that a usable torch is installed and otherwise
stops with one line. `get_requires_for_build_*` is the first hook that an isolated build calls;
`pip install --no-build-isolation` skips it, hence the same check in the hooks that follow.

SystemExit, because front ends print a traceback for any other exception.
"""

import sys
from pathlib import Path
from typing import Any

# Front ends put this folder on the path only while they look for the backend itself.
sys.path.insert(0, str(Path(__file__).parent))
from find_torch import UnusableTorchError, find_torch

ConfigSettings = dict[str, Any] | None


def _backend() -> Any:
    try:
        from scikit_build_core import build
    except ModuleNotFoundError as error:
        if error.name != "scikit_build_core":
            raise
        raise SystemExit(
            "compressed_ddp: --no-build-isolation needs the build tools in this environment; run: pip install scikit-build-core cmake ninja"
        ) from None
    return build


def _checked_backend() -> Any:
    try:
        find_torch()
    except UnusableTorchError as error:
        raise SystemExit(str(error)) from None
    return _backend()


def get_requires_for_build_wheel(config_settings: ConfigSettings = None) -> list[str]:
    return _checked_backend().get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: ConfigSettings = None) -> list[str]:
    return _checked_backend().get_requires_for_build_editable(config_settings)


def get_requires_for_build_sdist(config_settings: ConfigSettings = None) -> list[str]:
    # A source archive compiles nothing, so it needs no torch.
    return _backend().get_requires_for_build_sdist(config_settings)


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: ConfigSettings = None
) -> str:
    return _checked_backend().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: ConfigSettings = None
) -> str:
    return _checked_backend().prepare_metadata_for_build_editable(
        metadata_directory, config_settings
    )


def build_wheel(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    return _checked_backend().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: ConfigSettings = None,
    metadata_directory: str | None = None,
) -> str:
    return _checked_backend().build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: ConfigSettings = None) -> str:
    return _backend().build_sdist(sdist_directory, config_settings)
