"""`python -m compressed_ddp.info`: what is installed, how it was built, and whether it works here. Exit code 0 = works.

Each probe is guarded: a failure becomes a value in the report, never a traceback.
"""

import importlib
import platform
import sys
from collections.abc import Callable


def _probe(label: str, value: Callable[[], object]) -> bool:
    try:
        print(f"{label + ':':28}{value()}")
        return True
    except Exception as error:  # the report is the place for it
        print(f"{label + ':':28}FAILED: {type(error).__name__}: {error}")
        return False


def _self_check() -> str:
    import torch

    from . import ops, reference
    from .arguments import VALUE_FORMATS

    generator = torch.Generator().manual_seed(0)
    segments, groups, k = [5000, 100, 3000], [0, -1, 1], [50, 30]
    layout = (segments, groups, k)
    for value_format in VALUE_FORMATS:
        results = []
        for stages in (ops, reference):
            generator.manual_seed(0)
            payloads, residuals = [], []
            for rank in range(2):
                gradient = torch.randn(sum(segments), generator=generator)
                residual = torch.randn(sum(segments), generator=generator)
                values, indices, _ = stages.compensate_select_(gradient, residual, *layout)
                payloads.append(
                    stages.encode(
                        values,
                        indices,
                        gradient,
                        *layout,
                        value_format=value_format,
                        residual=residual,
                        rank=rank,
                    )
                )
                residuals.append(residual)
            bucket = torch.empty(sum(segments))
            stages.decode_apply_(bucket, torch.stack(payloads), *layout, value_format=value_format)
            results.append([*payloads, *residuals, bucket])
        if not all(map(torch.equal, *results)):
            raise RuntimeError(
                f"the native stages and reference.py differ on a bucket of two ranks ({value_format})"
            )
    *names, last = VALUE_FORMATS
    return f"passed: two ranks, one bucket, values as {', '.join(names)} and {last}: native == reference.py bit for bit"


def _engine() -> str:
    import torch

    from ._native import _C

    elsewhere = (
        "buckets on other devices go through host memory (untested: macOS, Windows, MPS, XPU)"
    )
    if not _C.built_with_cuda:
        return f"CPU, built without the CUDA stages; {elsewhere}"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    unfit = [str(device) for device in devices if not _C.has_cuda_stages(device)]
    if unfit:
        return f"CPU and CUDA, but not on {', '.join(unfit)}, which cannot run the kernels of this build; {elsewhere}"
    return f"CPU and CUDA; {elsewhere}"


def _build_info(name: str) -> object:
    return getattr(importlib.import_module("._build_info", __package__), name)


def main() -> int:
    print(f"{'python:':28}{sys.version.split()[0]} on {platform.platform()}")
    works = _probe("torch", lambda: importlib.import_module("torch").__version__)
    # Not from the package: where it cannot be imported, it calls this function to say so.
    works &= _probe("compressed_ddp", lambda: _build_info("PACKAGE_VERSION"))
    works &= _probe("built against torch", lambda: _build_info("TORCH_VERSION"))
    works &= _probe(
        "compiled module", lambda: importlib.import_module("._native", __package__)._C.__file__
    )
    if not works:
        return 1

    import torch

    from ._native import _C

    works &= _probe("instruction set", lambda: _C.instruction_set)
    works &= _probe("wire format version", lambda: _C.wire_version)
    _probe("engine", _engine)
    _probe("threads", torch.get_num_threads)
    _probe(
        "torch.distributed",
        lambda: "available" if torch.distributed.is_available() else "not available",
    )
    _probe(
        "Gloo", lambda: "available" if torch.distributed.is_gloo_available() else "not available"
    )
    _probe(
        "NCCL",
        lambda: (
            ".".join(map(str, torch.cuda.nccl.version()))
            if torch.distributed.is_nccl_available()
            else "not available"
        ),
    )
    _probe("CUDA of torch", lambda: torch.version.cuda)
    _probe("CUDA devices", lambda: torch.cuda.device_count())
    works &= _probe("self check", _self_check)
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
