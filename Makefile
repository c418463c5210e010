# make demo: set up, export the shapes student and generate four images.  make serve: serve it.  make test: set up and run the quick tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
MODEL ?= shapes

# What `arcflow compile` takes: a student of its own (flux, qwen), one of these two, or a student file.
STUDENT_shapes := models/shapes/student.toml
STUDENT_tiny := tests/golden/flux-tiny/student.toml
STUDENT := $(or $(STUDENT_$(MODEL)),$(MODEL))
# Empty for the student's own.
PRECISION ?=
# What the result runs on: tensorrt-rtx, tensorrt, or onnxruntime on a CPU. Empty or auto: engines for TARGET or for the
# GPU here, or else a bundle for this CPU.
BACKEND ?=
# GPUs to build for, such as sm89 or sm89,sm120; empty for the GPU here.
TARGET ?=
# A policy of arcflow quantize, a preset or a file; empty for the student's own.
POLICY ?=
# Scales of an earlier calibration; made if the file is not there. Empty for $(OUT)/NAME-scales.json.
SCALES ?=
# GATE= leaves the drift gate out.
GATE ?= 1
# Prompts of calibration and gate, and the size of their images as HEIGHTxWIDTH; empty for the student's own.
LIMIT ?=
SIZE ?=
COMPILE = $(BIN)/arcflow compile $(STUDENT) --out $(OUT) $(addprefix --precision ,$(PRECISION)) \
	$(addprefix --backend ,$(BACKEND)) $(addprefix --target ,$(TARGET)) $(addprefix --policy ,$(POLICY)) $(addprefix --scales ,$(SCALES)) \
	$(addprefix --limit ,$(LIMIT)) $(addprefix --size ,$(SIZE)) $(if $(GATE),,--no-gate)

# What the demo draws; on this CPU, in float32 unless PRECISION says otherwise.
NAME = $(if $(wildcard $(STUDENT)),$(shell sed -n 's/^name *= *"\(.*\)"/\1/p' $(STUDENT)),$(MODEL))
PROMPTS := "a large red circle on a blue background"
PROMPTS_shapes := "a large red circle on the left, blue background" "a small yellow heart on a black background" \
	"a large green triangle" "a purple cross at the top, white background"
SIZE_tiny := --height 64 --width 64

.PHONY: help setup demo serve engine shapes speedup test check gpu-test lint format docs clean
help:
	@echo "make demo     export the shapes student and generate four images on this CPU  [PROMPT=...]"
	@echo "make serve    export the shapes student and serve it on http://127.0.0.1:8000  [PORT=...] [MODEL=...]"
	@echo "make speedup  compare the shapes teacher at 50 to 1 steps with its student at 2: times, images, a plot"
	@echo "make test     build the C++ library once and run every quick test, in minutes"
	@echo "make check    run all other tests: slow ones, packaging, sanitizers, fuzzing, static build  [CHECK=NAME]"
	@echo "make gpu-test run the tests that need a GPU, on a machine that has one"
	@echo "make lint     ruff, mypy, import-linter and clang-format, as pre-commit and CI run them"
	@echo "make format   let ruff and clang-format rewrite the files"
	@echo "make docs     build the documentation's site in out/site; a broken link is an error"
	@echo "make cpp-test build, test and install the C++ library; make cpp-check its sanitizers, fuzzing and static build"
	@echo "make engine   MODEL=shapes|tiny|flux|qwen|FILE.toml [PRECISION=fp32|bf16|fp16|fp8] [BACKEND=auto|onnxruntime|tensorrt-rtx|tensorrt] [TARGET=sm89]"
	@echo "make shapes   train the shapes model from nothing: two hours on two CPU cores, minutes on a GPU"

# Bytecode is written when a module is first used, also where the environment forbids it: without, torch and
# diffusers take nearly twice as long to import.
unexport PYTHONDONTWRITEBYTECODE
setup: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml setup.py constraints.txt runtime/arcflow_runtime/maths/speedups.cpp $(wildcard runtime/kernels/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "arcflow needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[export,calibrate,distill,serve,tensorrt-rtx,cpp,gpu,dev,docs]"
	@touch $@

# Ray and Triton's server have environments of their own, in which the tests and benchmarks of the service run them: Ray
# is half a gigabyte, and the server needs an older numpy. The tests call this rule. The compilers are left out: the
# extension that `setup` built is in this checkout already, and may be in use.
build/%/.installed: pyproject.toml setup.py constraints.txt constraints-%.txt
	$(PYTHON) -m venv build/$*
	CC=false CXX=false build/$*/bin/pip install --quiet --no-compile --constraint constraints-$*.txt --editable ".[$*]"
	@touch $@

demo: PRECISION := $(or $(PRECISION),fp32)
demo: BACKEND := onnxruntime
demo: engine
	$(BIN)/arcflow generate $(OUT)/$(NAME)-$(PRECISION) $(if $(PROMPT),"$(PROMPT)",$(or $(PROMPTS_$(MODEL)),$(PROMPTS))) \
		$(SIZE_$(MODEL)) --seed 42 --sheet --out $(OUT)/demo.png

PORT ?= 8000
serve: PRECISION := $(or $(PRECISION),fp32)
serve: engine
	$(BIN)/arcflow serve $(OUT)/$(NAME)-$(PRECISION) --port $(PORT)

engine: setup
	$(COMPILE)

# The shapes teacher and its student, from the same noise.
TEACHER := $(OUT)/shapes-teacher
speedup: PRECISION := fp32
speedup: BACKEND := onnxruntime
speedup: engine
	$(BIN)/arcflow export --base models/shapes/teacher --out $(TEACHER) --steps 50 --max-px 64 --max-sequence-length 12 --overwrite
	$(BIN)/arcflow compare $(TEACHER)@50 $(TEACHER)@8 $(TEACHER)@4 $(TEACHER)@2 $(TEACHER)@1 $(OUT)/shapes-fp32@2 \
		--prompts shapes --limit 256 --judge models/shapes/judge --out $(OUT)/speedup

shapes: setup
	@mkdir -p $(OUT)
	$(BIN)/arcflow train-shapes --out $(OUT)/shapes

# Processes of one thread, one for each of two cores; each needs up to 2 GB of memory. A third would cover the tests that
# wait, but its imports cost more than that.
WORKERS ?= 2
CPP_MISSING := needs a C++ compiler, CMake and OpenSSL's headers
PYTEST = ARCFLOW_CPP_BUILD=$(CPP) OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS)

# Every test is in one of two lanes: `make test` runs what is quick, `make check` what is marked slow and all of the C++
# library's other builds.
test: setup
	$(if $(CPP_FOUND),$(MAKE) cpp-quick,@echo "cpp-test was left out: it $(CPP_MISSING)")
	$(PYTEST) --dist worksteal

# CHECK names some of the slow tests, as pytest's -k does; then nothing else runs.
check: setup
	$(if $(CHECK),,$(if $(CPP_FOUND),$(MAKE) cpp-check,@echo "cpp-check was left out: it $(CPP_MISSING)"))
	$(PYTEST) --dist worksteal -m slow $(if $(CHECK),-k "$(CHECK)")

gpu-test: setup
	$(BIN)/pytest tests/gpu -m gpu

# The C++ library; warnings are errors. `cpp-test` is what a user does: build, run the tests, install, and build a
# project that finds what is installed; `cpp-quick` is what `make test` takes of it. `cpp-check` is the rest, two
# steps at a time: the tests under AddressSanitizer and UndefinedBehaviorSanitizer; those with threads under
# ThreadSanitizer; FUZZ_SECONDS of the bundle reader, with clang; clang-tidy; and the static library. All but the
# static library compile several sources at once, in about half of the time; there each source compiles by itself, so
# a missing #include is found.
FUZZ_SECONDS ?= 60
CPP := $(abspath $(OUT))/cpp
# Without make's flags: ninja stops at a job server that it cannot reach, and make closes it to programs other than make.
CMAKE := env -u MAKEFLAGS cmake
CPP_FOUND = $(shell $${CXX:-c++} -E -include openssl/evp.h -x c++ /dev/null >/dev/null && command -v cmake)
CPP_CONFIGURE = $(CMAKE) -S runtime/cpp -G Ninja -DARCFLOW_PYTHON=$(abspath $(BIN))/python -DARCFLOW_WERROR=ON
UNITY := -DCMAKE_UNITY_BUILD=ON
CHECKED := -DARCFLOW_EXAMPLES=OFF -DCMAKE_BUILD_TYPE=None $(UNITY)
SANITIZE := -DARCFLOW_SANITIZE=address,undefined $(CHECKED)
CPP_SOURCES = $(shell git ls-files 'runtime/*.cpp' 'runtime/*.hpp' 'runtime/*.h' 'runtime/*.c' 'runtime/*.cu' 'tests/*.cpp')
CPP_STEPS := cpp-build cpp-quick cpp-check cpp-rest cpp-static cpp-traces cpp-sanitized cpp-sanitize cpp-tsan cpp-fuzz cpp-tidy
.PHONY: cpp-format cpp-lint $(CPP_STEPS)
test check cpp-test $(CPP_STEPS): export PATH := $(abspath $(BIN)):$(PATH)
cpp-quick: cpp-build
	ctest --test-dir $(CPP) --output-on-failure --parallel 2 --label-exclude slow

cpp-test: cpp-build
	ctest --test-dir $(CPP) --output-on-failure --parallel 2
	$(call cpp_consume,$(CPP))

cpp-build: setup
	$(CPP_CONFIGURE) -B $(CPP) $(UNITY) -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
	$(CMAKE) --build $(CPP)

# Installs a build, and builds and runs a project that finds it.
define cpp_consume
cmake --install $(1) --prefix $(1)/installed
$(CMAKE) -S runtime/cpp/tests/consumer -B $(1)/consumer -G Ninja -DCMAKE_PREFIX_PATH=$(1)/installed
$(CMAKE) --build $(1)/consumer
ctest --test-dir $(1)/consumer --output-on-failure --parallel 2
endef

cpp-check: cpp-build
	$(MAKE) -j2 cpp-sanitize cpp-rest
	$(if $(shell command -v clang++),,@echo "the fuzz target was left out: it needs clang")

# One after the other, beside cpp-sanitize, which takes as long.
cpp-rest: setup
	$(MAKE) cpp-tsan
	$(if $(shell command -v clang++),$(MAKE) cpp-fuzz)
	$(MAKE) cpp-static
	$(MAKE) cpp-tidy

cpp-static: setup
	$(CPP_CONFIGURE) -B $(CPP)-static -DBUILD_SHARED_LIBS=OFF -DARCFLOW_TESTS=OFF $(filter-out $(UNITY),$(CHECKED))
	$(CMAKE) --build $(CPP)-static
	$(call cpp_consume,$(CPP)-static)

# The tests under the sanitizers need exported bundles, and tracing is slow there. So it is done here; pytest keeps the
# traces. This and cpp-tidy use what cpp-build built.
cpp-traces: setup
	ARCFLOW_CPP_BUILD=$(CPP) OMP_NUM_THREADS=1 $(BIN)/pytest -q $(foreach student,flux-tiny qwen-tiny,"tests/test_cpp.py::test_golden_cases[$(student)-0-prompts]" \
		"tests/test_cpp_lora.py::test_without_loras_the_bits_are_those_of_the_plain_bundle[$(student)]")

cpp-sanitized: setup
	$(CPP_CONFIGURE) -B $(CPP)-sanitized $(SANITIZE)
	$(CMAKE) --build $(CPP)-sanitized

# Python itself is not sanitized. So the sanitizer, and the C++ library whose symbols it looks up, are loaded before it;
# its own leaks are not reported; and OpenVINO's threads keep to the sanitizer's copies of what they open.
cpp-sanitize: cpp-traces cpp-sanitized
	ctest --test-dir $(CPP)-sanitized --output-on-failure --parallel 2
	ARCFLOW_CPP_BUILD=$(CPP)-sanitized ASAN_OPTIONS=detect_leaks=0 TBB_ENABLE_SANITIZERS=1 \
		LD_PRELOAD=$$($${CXX:-c++} -print-file-name=libasan.so):$$($${CXX:-c++} -print-file-name=libstdc++.so) \
		$(BIN)/pytest -q -k "core or errors or golden or cpp_lora or cpp_straight" \
		$(wildcard tests/test_cpp.py tests/test_cpp_core.py tests/test_cpp_errors.py tests/test_cpp_lora.py tests/test_cpp_straight.py)

# The tests with threads, without OpenVINO, which is not compiled for ThreadSanitizer: then all that runs is ours, and
# nothing has to be suppressed.
TSAN := threads trt_denoiser trt_runtime_cache
cpp-tsan: setup
	$(CPP_CONFIGURE) -B $(CPP)-tsan -DARCFLOW_SANITIZE=thread -DARCFLOW_OPENVINO=OFF $(CHECKED) -DCMAKE_CXX_FLAGS=-O1
	$(CMAKE) --build $(CPP)-tsan --target $(addsuffix _test,$(TSAN))
	ctest --test-dir $(CPP)-tsan --output-on-failure --parallel 2 --tests-regex "$$(echo $(TSAN) | tr ' ' '|')"

cpp-fuzz: setup
	CC=clang CXX=clang++ $(CPP_CONFIGURE) -B $(CPP)-fuzz $(SANITIZE) -DCMAKE_CXX_FLAGS=-O1 -DARCFLOW_FUZZ=ON -DARCFLOW_TESTS=OFF
	$(CMAKE) --build $(CPP)-fuzz --target bundle_fuzz
	$(BIN)/python runtime/cpp/fuzz/corpus.py $(CPP)-fuzz/corpus $(dir $(wildcard $(OUT)/*/manifest.json))
	$(CPP)-fuzz/fuzz/bundle_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -timeout=10 -print_final_stats=1 \
		-verbosity=0 -dict=runtime/cpp/fuzz/json.dict -artifact_prefix=$(CPP)-fuzz/ $(CPP)-fuzz/corpus

cpp-tidy: setup
	$(BIN)/run-clang-tidy.py -quiet -p $(CPP) -clang-tidy-binary $(BIN)/clang-tidy -j 2 $(CPP)

# What `make lint` runs; and the same, written to the files.
cpp-lint: setup
	@$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

cpp-format: setup
	$(BIN)/clang-format -i $(CPP_SOURCES)

# .pre-commit-config.yaml calls the same tools.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(MAKE) cpp-lint

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(MAKE) cpp-format

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
