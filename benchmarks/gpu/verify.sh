#!/usr/bin/env bash
# Everything that needs a GPU, in one command. Needs no network.
#
#   benchmarks/gpu/verify.sh [PART..]        default: all of them, in under ten minutes
#
#   build      the module and the programs, against the torch that $PYTHON finds, in build/gpu; nothing is installed
#   tests      the C++ tests of the CUDA stages and the Python tests that need a GPU
#   sanitizer  compute-sanitizer's memcheck, racecheck and initcheck on a few of them
#   stress     a million tiny launch sequences
#   ranks      the hook beside the CPU's: 2 and 4 Gloo ranks on one GPU, NCCL with one rank and, from 2.30 on, several;
#              the host waits for nothing; CUDA graphs
#   bench      the stages and what they are compared with
#
# Reads: PYTHON (python3)     whose torch is used
#        OUT                  folder of the results; default benchmarks/results
#        GTEST_SOURCE         folder of GoogleTest's sources, unless it is installed or in /usr/src/googletest
#        BUILD_DIR (build/gpu), BUDGET_S (570), STRESS_SEQUENCES (1000000), COMMIT (where there is no git)
#
# Writes gpu_verify.json (every step with its outcome, and the machine) and bench_stages_cuda.json. Exit status: 0 nothing failed,
# 1 some step failed, 2 not run (one line says why). A step that this machine cannot run is "skipped", with its reason.
set -uo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repository="$(cd "$here/../.." && pwd)"
all_parts=(build tests sanitizer stress ranks bench)

refuse() {
  echo "verify.sh: $*" >&2
  exit 2
}

case "${1:-}" in
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${all_parts[@]}")
for part in "${parts[@]}"; do
  case " ${all_parts[*]} " in
    *" $part "*) ;;
    *) refuse "unknown part '$part'; there are: ${all_parts[*]}" ;;
  esac
done

absolute() { (cd "$1" 2>/dev/null && pwd) || refuse "no such folder: $1"; }
if [ -n "${OUT:-}" ]; then mkdir -p -- "$OUT" || refuse "cannot write to OUT=$OUT"; fi
results="$(absolute "${OUT:-$repository/benchmarks/results}")" || exit 2
gtest_source=""
if [ -n "${GTEST_SOURCE:-}" ]; then
  [ -f "$GTEST_SOURCE/CMakeLists.txt" ] || refuse "GTEST_SOURCE=$GTEST_SOURCE holds no GoogleTest (no CMakeLists.txt)"
  gtest_source="$(absolute "$GTEST_SOURCE")"
fi
python="$(command -v "${PYTHON:-python3}")" || refuse "no ${PYTHON:-python3}; name a Python with torch: PYTHON=..."
case "$python" in /*) ;; *) python="$PWD/$python" ;; esac
cd "$repository" || exit 2

# ---- what must be there

"$python" - <<'END' || exit 2
import sys
try:
    import torch
except ImportError as error:
    print(f"verify.sh: {sys.executable} has no torch ({error}); name a Python that has one: PYTHON=...", file=sys.stderr)
    sys.exit(2)
if not torch.cuda.is_available():
    print(f"verify.sh: no GPU: torch {torch.__version__} sees no CUDA device; nothing was run", file=sys.stderr)
    sys.exit(2)
END

mkdir -p "${BUILD_DIR:=build/gpu}" || refuse "cannot write to BUILD_DIR=$BUILD_DIR"
build="$(absolute "$BUILD_DIR")" || exit 2
site="$build/site" # compressed_ddp lies here, for PYTHONPATH
programs="$build/tests/cpp/cuda"
logs="$build/logs"
steps="$build/steps.tsv"

for folder in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
  if [ -n "$folder" ] && [ -d "$folder/bin" ]; then PATH="$PATH:$folder/bin"; fi
done
PATH="$(dirname "$python"):$PATH" # cmake and ninja often lie beside Python
export PATH
export CUDA_DEVICE_ORDER=PCI_BUS_ID PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

is_wanted() { case " ${parts[*]} " in *" $1 "*) return 0 ;; *) return 1 ;; esac }
if is_wanted build; then
  NVCC="$(command -v nvcc)" || refuse "no nvcc in PATH, CUDA_HOME or /usr/local/cuda; install the CUDA toolkit (12.8 or newer)"
  export NVCC
  cmake="$(command -v cmake)" || refuse "no cmake; 3.26 or newer is needed"
  cmake_version="$("$cmake" --version | sed -n '1s/.*version \([0-9.]*\).*/\1/p')"
  [ "$(printf '%s\n' 3.26 "$cmake_version" | sort -V | head -n 1)" = 3.26 ] ||
    refuse "$cmake is $cmake_version; 3.26 or newer is needed, older ones cannot ask nvcc for C++20"
elif [ ! -x "$programs/launch_stress_test_gpu" ] || [ ! -d "$site" ]; then
  refuse "nothing is built in $BUILD_DIR yet; run: benchmarks/gpu/verify.sh build"
fi

# ---- steps

rm -rf "$logs"
mkdir -p "$logs"
: >"$steps"
begin=$SECONDS
failed=0
# The summary is written whatever happens, also when a build fails or Ctrl-C is pressed.
finish() {
  "$python" "$here/summary.py" "$steps" "$results/gpu_verify.json" "${parts[@]}"
  if [ -n "${OUT:-}" ]; then (cd "$logs" && tail -n +1 -- *.log) >"$results/gpu_verify.log" 2>/dev/null; fi
}
trap finish EXIT
trap 'exit 1' INT TERM

note() { printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$(printf '%s' "$5" | tr '\t\n' '  ')" >>"$steps"; }

skip() { # PART NAME REASON
  note "$1" "$2" skipped 0 "$3"
  printf '%-10s %-34s skipped: %s\n' "$1" "$2" "$3"
}

# step PART NAME LIMIT_S COMMAND..: runs it under a time limit. Exit code 77 of the command: this machine cannot run it.
step() {
  local part="$1" name="$2" limit="$3" left=$((${BUDGET_S:-570} - (SECONDS - begin))) start code status reason=""
  shift 3
  local log="$logs/$part-${name//[^A-Za-z0-9_.-]/_}.log"
  if [ "$left" -lt 5 ]; then
    failed=1
    note "$part" "$name" failed 0 "the time was up"
    printf '%-10s %-34s FAILED: the time was up\n' "$part" "$name"
    return 1
  fi
  [ "$limit" -le "$left" ] || limit=$left
  start=$(date +%s.%N)
  timeout -k 5 "$limit" "$@" >"$log" 2>&1
  code=$?
  local seconds
  seconds="$(awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')"
  status=passed
  if [ "$code" -eq 77 ]; then
    status=skipped
    reason="$(tail -n 1 "$log")"
  elif [ "$code" -ne 0 ]; then
    status=failed
    failed=1
    reason="exit code $code"
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then reason="no end after $limit s"; fi
  fi
  note "$part" "$name" "$status" "$seconds" "$reason"
  printf '%-10s %-34s %s %s s%s\n' "$part" "$name" "$([ "$status" = failed ] && echo FAILED || echo "$status")" "$seconds" "${reason:+: $reason}"
  if [ "$status" = failed ]; then tail -n 25 "$log" | sed 's/^/    | /'; fi
  [ "$status" != failed ]
}

# ---- parts

part_build() {
  local architecture generator=() googletest=()
  architecture="$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))')" || return 1
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  if [ -n "$gtest_source" ]; then googletest=(-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST="$gtest_source"); fi
  step build configure 60 "$cmake" -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release \
    -DPython_EXECUTABLE="$python" -DCOMPRESSED_DDP_PYTHON=ON -DCOMPRESSED_DDP_TESTS=ON -DCOMPRESSED_DDP_GPU_TESTS=ON \
    -DCOMPRESSED_DDP_CUDA=ON -DCOMPRESSED_DDP_CUDA_ARCHITECTURES="$architecture" "${googletest[@]}" || return 1
  step build compile 240 "$cmake" --build "$build" --parallel "$(nproc)" --target _C gpu_tests || return 1
  # In place: what an installed package holds, in a folder of its own.
  rm -rf "$site"
  step build place 20 "$cmake" --install "$build" --component python --prefix "$site" || return 1
  cp python/compressed_ddp/*.py "$site/compressed_ddp/" || return 1
  # Python runs this at its start. An editable install of the package would otherwise come before PYTHONPATH.
  cat >"$site/sitecustomize.py" <<'END'
import sys

for finder in list(sys.meta_path):
    if "compressed_ddp" in getattr(finder, "known_source_files", ()):
        sys.meta_path.remove(finder)
END
  step build import 60 env PYTHONPATH="$site" "$python" - "$site" <<'END'
import sys

import compressed_ddp
from compressed_ddp import _native

if not compressed_ddp.__file__.startswith(sys.argv[1]):
    sys.exit(f"another compressed_ddp comes first: {compressed_ddp.__file__}; uninstall it, or use another PYTHON")
print(compressed_ddp.__version__, _native._C.__file__)
END
}

part_tests() {
  step tests "C++ tests on the GPU" 100 ctest --test-dir "$build" -R '_gpu\.' -E '^launch_stress' --no-tests=error --output-on-failure
  if ! "$python" -c 'import pytest' 2>/dev/null; then
    skip tests "Python tests that need a GPU" "no pytest"
    return
  fi
  local files=() options=()
  mapfile -t files < <(grep -l needs_cuda tests/python/test_*.py)
  # The time limits of pyproject.toml need a plugin.
  "$python" -c 'import pytest_timeout' 2>/dev/null || options=(-o addopts=)
  step tests "Python tests that need a GPU" 100 env PYTHONPATH="$site" COMPRESSED_DDP_REQUIRE_CUDA=1 \
    "$python" -m pytest "${options[@]}" -m needs_cuda -p no:cacheprovider -q "${files[@]}"
}

part_sanitizer() {
  local sanitizer tool
  if ! sanitizer="$(command -v compute-sanitizer)"; then
    skip sanitizer "all tools" "no compute-sanitizer"
    return
  fi
  # Of initcheck's: no test that looks at scratch nobody has written.
  local select='CompensateSelectCuda.ManySteps*:CompensateSelectCuda.AWrongGuess*:CompensateSelectCuda.EqualsTheCpuEngineOnOneGroup*'
  local written='CompensateSelectCuda.ManySteps*'
  local decode='DecodeApplyCuda.AFlagged*:DecodeApplyCuda.AnyBytes*:RestoreCuda.*'
  for tool in memcheck racecheck initcheck; do
    [ "$tool" != initcheck ] || select="$written"
    sanitize "$tool" select "$sanitizer" "$programs/compensate_select_cuda_test_gpu" "$select"
    sanitize "$tool" decode "$sanitizer" "$programs/decode_apply_cuda_test_gpu" "$decode"
    sanitize "$tool" shards "$sanitizer" "$programs/shards_cuda_test_gpu" 'PackShardsCuda.*:UnpackShardsCuda.*:MeanOfShardsCuda.Unaligned*'
  done
}
sanitize() { # TOOL NAME SANITIZER PROGRAM FILTER
  step sanitizer "$1, $2" 40 bash -c '
    "$0" --tool "$1" --error-exitcode 86 "$2" --gtest_filter="$3" 2>&1 | tee "$4"
    code=${PIPESTATUS[0]}
    if grep -q "Device not supported" "$4"; then
      echo "compute-sanitizer does not support this device here"
      exit 77
    fi
    exit $code' "$3" "$1" "$4" "$5" "$logs/sanitizer.txt"
}

part_stress() {
  # Four processes at once: their launches interleave, and the CPU, which does all the work again, has more than one core.
  step stress "$COMPRESSED_DDP_STRESS_SEQUENCES tiny sequences" 100 bash -c '
    for i in 1 2 3 4; do
      COMPRESSED_DDP_STRESS_PART=$i/4 "$0" &
      pids="${pids:-} $!"
    done
    code=0
    for pid in $pids; do wait "$pid" || code=1; done
    exit $code' "$programs/launch_stress_test_gpu"
}

part_ranks() {
  ranks "2 Gloo ranks" train --backend gloo --ranks 2
  ranks "4 Gloo ranks" train --backend gloo --ranks 4
  ranks "NCCL, 1 rank" train --backend nccl --ranks 1
  ranks "sync debug mode, steady state" steady
  ranks "CUDA graph" graph
  ranks "NCCL, 2 ranks on one GPU" train --backend nccl --ranks 2
  ranks "NCCL, 4 ranks on one GPU" train --backend nccl --ranks 4
}
ranks() { # NAME ARGUMENTS..
  local name="$1"
  shift
  step ranks "$name" 80 env PYTHONPATH="$site" "$python" "$here/ranks_on_gpu.py" "$@" --timeout-s 60
}

part_bench() {
  local output="$results/bench_stages_cuda.json" commit dirty=()
  commit="$(git rev-parse HEAD 2>/dev/null || echo "${COMMIT:-}")"
  if git rev-parse HEAD >/dev/null 2>&1; then
    if [ -n "$(git status --porcelain -uno -- . ':(exclude)benchmarks/results' ':(exclude)docs/benchmarks.md')" ]; then
      dirty=(--dirty 1)
    else
      dirty=(--dirty 0)
    fi
  fi
  step bench "stages and baselines" 120 "$programs/bench_cuda_stages" --output "$output" --budget-s 90 --commit "$commit" "${dirty[@]}" ||
    return 1
  step bench "eager pipeline and torch.sort" 70 env PYTHONPATH="$site" "$python" "$here/bench_eager_cuda.py" --into "$output" --budget-s 40
  grep 'goal' "$logs/bench-stages_and_baselines.log" # a missed goal is a figure, not a failure
  return 0
}

export COMPRESSED_DDP_STRESS_SEQUENCES="${STRESS_SEQUENCES:-1000000}"
for part in "${all_parts[@]}"; do
  is_wanted "$part" || continue
  if ! "part_$part" && [ "$part" = build ]; then
    failed=1
    break # nothing else could run
  fi
done
exit $failed
