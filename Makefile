# Needs Python 3.11+ (with venv and headers), a C++ compiler, make and git; everything else is
# installed into $(VENV). Nothing outside $(VENV) and build/ is written.
#
#   make PYTHON=python3.12 VENV=.venv-oldest TORCH='torch==2.11.0' test

PYTHON ?= python3
VENV ?= .venv
# The version that CI tests. May hold pip options, such as an --index-url for a CPU-only torch.
TORCH ?= torch==2.15.0

BIN = $(VENV)/bin
# A failure of a warning is for those who change the code, not for those who compile it.
export COMPRESSED_DDP_WERROR ?= $(if $(CI),ON,OFF)
COMPRESSED_DDP_REQUIRE_SIMDE ?= OFF
# The CUDA stages, and their tests without a GPU: AUTO where a toolkit is found, ON (its absence is an error) or OFF.
export COMPRESSED_DDP_CUDA ?= AUTO
export COMPRESSED_DDP_REQUIRE_CUDA_TOOLKIT ?= $(if $(filter ON,$(COMPRESSED_DDP_CUDA)),1,0)

native_sources = CMakeLists.txt csrc/CMakeLists.txt $(wildcard csrc/*.cmake csrc/*/*.cmake) \
  $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/cuda/*.cu csrc/cuda/*.cuh) $(wildcard build_backend/*.py)

# The tests of the hook that run once more with the CUDA kernels in place of the CPU engine.
stand_in_tests = $(addprefix tests/python/test_,$(addsuffix .py, \
  stand_in cuda_engine hook rollback resume failures state_dict non_finite metrics ddp_loops invariants all_reduce \
  all_reduce_gradients agreement hierarchical dense_residuals training))

FUZZ_SECONDS ?= 60
COMPRESSED_DDP_REQUIRE_FUZZ ?= OFF

.DELETE_ON_ERROR:
.PHONY: help env build build-tests fuzz test test-without-gpu demo bench-stages lint format clean FORCE

help:
	@echo "make env           create $(VENV) with $(TORCH) and the build tools"
	@echo "make build         compile and install compressed_ddp into $(VENV) (editable)"
	@echo "make test          build, then the C++ tests and the Python tests (PYTEST_ARGS=...)"
	@echo "make test-without-gpu  of these, the tests of the hook with the CUDA kernels, whose PTX is interpreted"
	@echo "make fuzz          throw bytes at the decoder for FUZZ_SECONDS (60); needs clang++"
	@echo "make demo          build, then 2 ranks dense and compressed on real digits"
	@echo "make bench-stages  build, then time each stage (BENCH_ARGS=...)"
	@echo "make lint          formatters, linters and type checks; changes nothing"
	@echo "make format        let the formatters change the files"
	@echo "make clean         remove build/ and $(VENV)"

# --- Environment: every step leaves a stamp, so that a second call installs nothing ---------------
env: $(VENV)/.tools

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "compressed_ddp needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Changes only when TORCH does: another torch means another environment and another build.
$(VENV)/.torch-wanted: FORCE | $(BIN)/python
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

# torchvision in the same call: on its own, pip would take the newest one and its torch.
# xargs, because TORCH may hold options as well as a `>`.
$(VENV)/.torch: $(VENV)/.torch-wanted
	xargs $(BIN)/pip install torchvision < $<
	@touch $@

$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	@$(BIN)/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $@
	$(BIN)/pip install -r $@
	@touch $@

# --- Build ----------------------------------------------------------------------------------------
build: $(VENV)/.extension

# PATH: cmake and ninja of the environment, whether or not the machine has any.
$(VENV)/.extension: $(VENV)/.tools $(native_sources)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --no-build-isolation -e '.[examples,test]'
	@touch $@

# Ninja sees for itself what changed.
build-tests: $(VENV)/.tools $(VENV)/.torch
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cpp -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCOMPRESSED_DDP_PYTHON=OFF -DCOMPRESSED_DDP_TESTS=ON -DCOMPRESSED_DDP_STAND_IN_MODULE=ON \
	  -DPython_EXECUTABLE="$(abspath $(BIN))/python" -DCOMPRESSED_DDP_CUDA=$(COMPRESSED_DDP_CUDA) \
	  -DCOMPRESSED_DDP_WERROR=$(COMPRESSED_DDP_WERROR) \
	  -DCOMPRESSED_DDP_REQUIRE_SIMDE=$(COMPRESSED_DDP_REQUIRE_SIMDE)
	@PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cpp

# --- Use ------------------------------------------------------------------------------------------
test: build build-tests
	$(BIN)/ctest --test-dir build/cpp --output-on-failure --no-tests=error -j 2
	$(MAKE) fuzz
	$(BIN)/python -m pytest --durations=15 $(PYTEST_ARGS)
	$(MAKE) test-without-gpu

# The module exists only where a CUDA toolkit is.
test-without-gpu: build build-tests
	@module="$$(ls build/cpp/stand_in/_C.*so 2>/dev/null)"; \
	if [ -z "$$module" ]; then echo "no CUDA toolkit: the CUDA stages were not built, and are not tested"; exit 0; fi; \
	export COMPRESSED_DDP_STAND_IN="$(abspath .)/$$module"; \
	$(BIN)/python -m pytest --durations=5 --timeout=300 $(stand_in_tests) && \
	SIMT_FUZZ=1 SIMT_SEED=2 SIMT_ORDER=random $(BIN)/python -m pytest --timeout=300 tests/python/test_cuda_engine.py

# What is found new lies in build/fuzz/found; `make fuzz FUZZ_SECONDS=3600`, then copy what is worth keeping to the corpus.
fuzz: $(VENV)/.tools
	@if ! echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' \
	  | clang++ -x c++ -fsanitize=fuzzer -o /dev/null - 2>/dev/null; then \
	  if [ "$(COMPRESSED_DDP_REQUIRE_FUZZ)" = ON ]; then echo "no clang++ with the fuzzer's runtime" >&2; exit 1; fi; \
	  echo "no clang++ with the fuzzer's runtime: the decoder is not fuzzed"; exit 0; fi; \
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/fuzz -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=clang++ \
	  -DCOMPRESSED_DDP_PYTHON=OFF -DCOMPRESSED_DDP_TESTS=OFF -DCOMPRESSED_DDP_CUDA=OFF -DCOMPRESSED_DDP_FUZZ=ON && \
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/fuzz --target decode_fuzz && mkdir -p build/fuzz/found && \
	build/fuzz/tests/cpp/fuzz/decode_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=2600 -timeout=10 -artifact_prefix=build/fuzz/ \
	  -print_final_stats=1 -verbosity=0 build/fuzz/found tests/cpp/fuzz/corpus

demo: build
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

bench-stages: build
	$(BIN)/python benchmarks/bench_stages.py $(BENCH_ARGS)

$(VENV)/.lint-tools: $(VENV)/.tools pyproject.toml
	@$(BIN)/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lint"], sep="\n")' > $@
	$(BIN)/pip install -r $@
	@touch $@

cxx_files = git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/cpp/*.cpp' 'tests/cpp/*.h' 'tests/cpp/*.cu' 'benchmarks/gpu/*.cu'

lint: $(VENV)/.lint-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(cxx_files) | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/typos

format: $(VENV)/.lint-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(cxx_files) | xargs -r $(BIN)/clang-format -i

clean:
	rm -rf build $(VENV)
