# `make help` lists the targets. Each one sets up what it needs; none needs another one first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.gdfast-ready
ASAN := build/asan
# More for its CMake: -DGDFAST_BASELINE_ONLY=ON compiles a third.
ASAN_CMAKE ?=
SIMULATOR := build/simulator

.DEFAULT_GOAL := help
.PHONY: help build train test bench lint asan asan-configured asan-cpu asan-cuda asan-cuda-build \
  cuda-simulator triton triton-aot clean

help:
	@echo "make train   set up .venv and train the CNN on handwritten digits; ARGS='--epochs 3' for more"
	@echo "make test    set up .venv and run the test suite; ARGS='-k conv2d' for a part"
	@echo "make build   set up .venv: pinned dependencies, compiled kernels"
	@echo "make bench   compare the kernels with native PyTorch, side by side"
	@echo "make lint    ruff, clang-format and mypy"
	@echo "make asan    run the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer;"
	@echo "             make asan-cpu and make asan-cuda run a part of them"
	@echo "make cuda-simulator  run the tests of the CUDA kernels in their simulator, on the CPU"
	@echo "make triton  run the tests of the Triton kernels in its interpreter, on the CPU"
	@echo "make triton-aot  compile the Triton kernels for GPUs and tabulate what they take"
	@echo "make clean   remove what was built; .venv stays"
	@echo
	@echo "PYTHON=python3.12 chooses the Python that makes .venv. GDFAST_NO_CUDA=1 ignores nvcc."
	@echo "PIP_EXTRA_INDEX_URL=URL names an index that has the small CPU build of torch, if you know one."

build: $(READY)

# Again after any change of the sources; then pip finds its work done, and Ninja does the rest.
$(READY): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	@command -v $(PYTHON) >/dev/null || { \
	  echo "gdfast: $(PYTHON): not found; fix: \`apt install python3\`, or make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "gdfast: Python: expected 3.10 or newer, got `$(PYTHON) -V 2>&1`;" \
	    "fix: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "gdfast: venv: not part of $(PYTHON); fix: \`apt install python3-venv\`"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel pybind11 cmake ninja
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e ".[dev]"
	@$(BIN)/python -c 'from gdfast import native; print("gdfast:", native.summary())'
	@touch $@

train: $(READY)
	$(BIN)/gdfast train cnn $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

bench: $(READY)
	$(BIN)/gdfast bench $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/*.cpp)
	$(BIN)/mypy

asan-configured: $(READY)
	$(BIN)/cmake -S . -B $(ASAN) -G Ninja -DGDFAST_ASAN=ON -DGDFAST_CUDA_SIMULATOR=ON $(ASAN_CMAKE) \
	  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	  -Dpybind11_DIR="`$(BIN)/python -m pybind11 --cmakedir`"

# Python itself is not instrumented, so the sanitizers' run-time comes first by LD_PRELOAD, and with
# it libstdc++, whose exceptions they intercept. Python never frees all: no leak check.
UNDER_ASAN = GDFAST_NATIVE_DIR=$(ASAN) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="`g++ -print-file-name=libasan.so` `g++ -print-file-name=libubsan.so` `g++ -print-file-name=libstdc++.so`"

asan: asan-cpu asan-cuda

asan-cpu: asan-configured
	$(BIN)/cmake --build $(ASAN) --target _cpu
	$(UNDER_ASAN) $(BIN)/python -m pytest -m kernels $(ARGS)

# Of the CPU's kernels these tests need little: they take what there is.
asan-cuda-build: asan-configured
	$(BIN)/cmake --build $(ASAN) --target _cuda_simulated
	ls $(ASAN)/_cpu.*.so 2>/dev/null || cp gdfast/_cpu.*.so $(ASAN)/

asan-cuda: asan-cuda-build
	$(UNDER_ASAN) GDFAST_CUDA_SIMULATE=1 $(BIN)/python -m pytest -m cuda_simulator $(ARGS)

cuda-simulator: $(READY)
	$(BIN)/cmake -S . -B $(SIMULATOR) -G Ninja -DGDFAST_CUDA_SIMULATOR=ON -DGDFAST_BASELINE_ONLY=ON \
	  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	  -Dpybind11_DIR="`$(BIN)/python -m pybind11 --cmakedir`"
	$(BIN)/cmake --build $(SIMULATOR)
	GDFAST_NATIVE_DIR=$(SIMULATOR) GDFAST_CUDA_SIMULATE=1 \
	  $(BIN)/python -m pytest -m cuda_simulator $(ARGS)

triton: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton $(ARGS)

triton-aot: $(READY)
	$(BIN)/python benchmarks/triton_aot.py $(ARGS)

clean:
	rm -rf build dist gdfast/_cpu.*.so gdfast/_cuda.*.so $(READY)
