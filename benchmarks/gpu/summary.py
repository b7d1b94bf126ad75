"""Write what verify.sh found: the steps of a run, with the machine. Called by verify.sh alone.

    summary.py STEPS OUTPUT COMMAND..

STEPS has a line per step: part, name, status (passed, failed, skipped), seconds, note; with tabs
between. Parts that an earlier run of the same commit, unmodified, on the same GPU left in OUTPUT stay there, unless
they ran again.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import timing

FIELDS = ("name", "driver_version", "memory.total", "compute_cap", "clocks.max.sm", "power.limit")


def output_of(*command: str) -> str | None:
    """Return what a program prints, or None where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def gpus() -> list[dict[str, str]]:
    """Return what nvidia-smi says of each GPU."""
    text = output_of("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader")
    lines = (text or "").splitlines()
    return [dict(zip(FIELDS, (part.strip() for part in line.split(",")))) for line in lines]


def torch_versions() -> dict[str, Any]:
    """Return the versions of torch and of what it brings; None where it cannot be asked."""
    program = (
        "import json, torch; nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None; "
        "print(json.dumps({'torch': torch.__version__, 'torch_cuda': torch.version.cuda, "
        "'nccl': '.'.join(map(str, nccl)) if nccl else None}))"
    )
    text = output_of(sys.executable, "-c", program)
    versions: dict[str, Any] = json.loads(text) if text else {"torch": None}
    return versions


def toolkit() -> str | None:
    """Return the version of nvcc."""
    candidates = [os.environ.get("NVCC", ""), "nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in filter(None, candidates):
        found = re.search(r"release [\d.]+, V([\d.]+)", output_of(candidate, "--version") or "")
        if found:
            return found[1]
    return None


def system(command: list[str]) -> dict[str, Any]:
    """Return the machine, the versions and the commit. No host names and no paths."""
    commit = timing._commit()
    if commit["commit"] is None and os.environ.get("COMMIT"):  # an unpacked archive
        commit["commit"] = os.environ["COMMIT"]
    return {
        "gpus": gpus(),
        "toolkit": toolkit(),
        **torch_versions(),
        "python": platform.python_version(),
        "processor": timing._processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["benchmarks/gpu/verify.sh", *command]),
    }


def parts_of(steps: Path) -> dict[str, dict[str, Any]]:
    """Return status, time and steps by part. A part fails with any of its steps."""
    parts: dict[str, dict[str, Any]] = {}
    for line in steps.read_text(encoding="utf-8").splitlines():
        part, name, status, seconds, note = line.split("\t")
        entry = parts.setdefault(part, {"status": "skipped", "seconds": 0.0, "steps": []})
        step: dict[str, Any] = {"name": name, "status": status, "seconds": float(seconds)}
        entry["steps"].append({**step, "note": note} if note else step)
        entry["seconds"] = round(entry["seconds"] + float(seconds), 1)
        statuses = {step["status"] for step in entry["steps"]}
        entry["status"] = next(s for s in ("failed", "passed", "skipped") if s in statuses)
    return parts


def earlier_parts(output: Path, now: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parts of an earlier run of what is the same code on the same GPU."""
    try:
        earlier = json.loads(output.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_same = all(earlier["system"].get(key) == now[key] for key in ("commit", "gpus", "torch"))
    if not is_same or now["commit"] is None or now["dirty"]:
        return {}
    parts: dict[str, dict[str, Any]] = earlier["parts"]
    return parts


def main() -> int:
    """Write the summary and print it."""
    steps, output, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    now = system(command)
    parts = {**earlier_parts(output, now), **parts_of(steps)}
    passed = bool(parts) and all(part["status"] != "failed" for part in parts.values())
    title = "Verification on a GPU"
    result = {"benchmark": "gpu_verify", "title": title, "system": now, "passed": passed}
    timing.write({**result, "parts": parts}, output)
    for name, part in parts.items():
        print(f"  {name:<10} {part['status']:<8} {part['seconds']:>6.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
