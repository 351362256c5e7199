# Everything happens in .venv; `make test` and `make bench` are all a new user needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
NATIVE_TESTS := $(wildcard tests/native/*.cpp tests/native/*.h)
CXX_FILES := $(CSRC) $(NATIVE_TESTS)
PY_FILES := src kernels tests benchmarks setup.py

# The suite, one file a subject; those with a bar first.
BARRED := neuron linear attention model halting training growth
SUITE := $(BARRED) merging layout dropin

.PHONY: help bench bars bench-compare bench-gpu gpu-report study results profile test asan fuzz \
  lint format build clean $(addprefix bench-,$(SUITE))

help:
	@echo "make bench    set up and run 'atsnn bench' on the shipped checkpoint"
	@echo "make bars     everything that has a bar, into docs/results/performance.md (45 minutes)"
	@echo "make bench-X  one file of the suite, X one of:"
	@echo "              $(SUITE)"
	@echo "make bench-compare   what got slower: HEAD~1 against the working tree, or BASE=rev HEAD=rev"
	@echo "make bench-gpu       time the Triton kernels against SpikingJelly's and PyTorch compiled"
	@echo "make gpu-report      what the compiled Triton kernels take and move, without a GPU (docs/gpu.md)"
	@echo "make study    what halting does to accuracy, into docs/results/study.md (a night on two cores)"
	@echo "make results  which command made which numbers of the documents, and how long it takes"
	@echo "make profile  where the engine's time goes, and how far each part is from its limit"
	@echo "make test     set up and run the tests"
	@echo "make asan     build and run the kernels' own tests under the address and UB sanitizers"
	@echo "make fuzz     random cases of the engine for a minute, under the same sanitizers"
	@echo "make lint     ruff, mypy, clang-format"
	@echo "make format   ruff and clang-format, in place"
	@echo "make build    set up and build the extension"
	@echo "make clean    remove what was built"

# The environment: pinned, so that everybody tests the same. The judge of the tests comes without
# its dependencies, which would replace this PyTorch.
$(VENV)/.installed: requirements/dev.txt requirements/peers.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, got %s" % sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/peers.txt
	@touch $@

# No build isolation: the extension must be built against the PyTorch it runs beside.
$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(CSRC)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

build: $(VENV)/.built

bench: build
	$(BIN)/atsnn bench

# glibc would give memory back after every large tensor and fault it in again, which is not what
# is to be measured, ours or theirs.
QUIET := MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=33554432

$(addprefix bench-,$(SUITE)): bench-%: build
	$(QUIET) $(BIN)/python -m pytest benchmarks/bench_$*.py

# Each file in a process of its own, on the best instruction set and, where that is AVX-512, on
# AVX2 beside it. Memory is told as the system tells it, so growth keeps glibc as it is.
BARS := build/bars
ROUNDS ?= 11
bars: build
	rm -rf $(BARS)
	for file in $(BARRED); do \
	  quiet="$(QUIET)"; test $$file = growth && quiet=; \
	  env $$quiet $(BIN)/python -m pytest benchmarks/bench_$$file.py --rounds $(ROUNDS) \
	    --bars $(BARS) || exit 1; \
	  if test -f $(BARS)/avx512.json; then \
	    env $$quiet ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest benchmarks/bench_$$file.py \
	      --rounds $(ROUNDS) --bars $(BARS) || exit 1; \
	  fi; \
	done
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/gpu_report.py --no-counts \
	  --json $(BARS)/gpu.json > $(BARS)/gpu.txt
	$(BIN)/python benchmarks/write_results.py $(BARS)

# Exits with 1 (make: 2) where something got slower; the worktrees it builds lie in build/compare.
bench-compare: build
	$(QUIET) $(BIN)/python benchmarks/compare.py $(if $(BASE),--base $(BASE)) $(if $(HEAD),--head $(HEAD))

# On a machine without a GPU: TRITON_INTERPRET=1 make bench-gpu runs it on small shapes.
bench-gpu: build
	$(BIN)/python -m pytest benchmarks --device cuda

# Registers, spills, widths and bytes of every kernel for three GPUs, into docs/gpu.md.
gpu-report: build
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/gpu_report.py --write

# Goes on where it stopped: runs/study holds the networks.
study: build
	$(BIN)/python benchmarks/study.py --all
	$(BIN)/python benchmarks/study_page.py

results: build
	@$(BIN)/python benchmarks/results.py

# The table of benchmarks/profile_engine.py, then time by function.
profile: build
	PYTHONPATH=tests $(BIN)/python benchmarks/profile_engine.py
	@if command -v perf > /dev/null; then \
	  PYTHONPATH=tests perf record -q -o build/perf.data $(BIN)/python benchmarks/profile_engine.py > /dev/null && \
	  perf report -i build/perf.data --no-children --stdio 2> /dev/null | grep 'atsnn::' | head -15; \
	else echo "perf is not installed: no times by function"; fi

# A process a core: every test has the threads it asks for, and most ask for one.
test: build
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

# The kernels without torch. Tracking variables would take a third of the compile time. GCC warns
# of its own AVX-512 headers where the sanitizers keep it from seeing through them.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
ASAN_FLAGS := -std=c++20 -O1 -g -fno-var-tracking -fno-omit-frame-pointer -ffp-contract=off -Wall \
  -Wno-maybe-uninitialized $(SANITIZE)
NATIVE_OBJECTS := $(patsubst %.cpp,build/asan/%.o,\
  $(wildcard csrc/cpu/*.cpp csrc/engine/*.cpp tests/native/*.cpp))
# Two programs: the tests, and a fuzzer that runs the random cases of the engine's tests.
ASAN_OBJECTS := $(filter-out %/fuzz_engine.o,$(NATIVE_OBJECTS))
FUZZ_OBJECTS := $(filter build/asan/csrc/% %inputs.o %/check.o %_engine.o \
  build/asan/tests/native/test_engine_%,$(NATIVE_OBJECTS))

build/asan/%.o: %.cpp
	@mkdir -p $(@D) && echo $<
	@$(CXX) $(ASAN_FLAGS) -MMD -MP -c $< -o $@

build/asan/run: $(ASAN_OBJECTS)
	@$(CXX) $(SANITIZE) $^ -o $@

build/asan/fuzz: $(FUZZ_OBJECTS)
	@$(CXX) $(SANITIZE) $^ -o $@

asan:
	+@$(MAKE) --no-print-directory -j2 build/asan/run
	build/asan/run

fuzz:
	+@$(MAKE) --no-print-directory -j2 build/asan/fuzz
	build/asan/fuzz 60

-include $(NATIVE_OBJECTS:.o=.d)

lint: build
	$(BIN)/ruff check $(PY_FILES)
	$(BIN)/ruff format --check $(PY_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(PY_FILES)
	$(BIN)/ruff format $(PY_FILES)
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info src/atsnn/_C*.so
	-git worktree prune 2> /dev/null
