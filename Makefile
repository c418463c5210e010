# make demo: set up, export the shapes student and draw four prompts.  make test: set up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
MODEL ?= shapes
BACKEND ?= onnxruntime

# A preset names the weights, its usual precision, export options, and what the demo draws.
BASE_shapes := models/shapes/teacher
ADAPTER_shapes := models/shapes/adapter
PRECISION_shapes := fp32
EXPORT_shapes := --max-px 64 --max-sequence-length 12
PROMPTS_shapes := "a large red circle on the left, blue background" "a small yellow heart on a black background" \
	"a large green triangle" "a purple cross at the top, white background"
BASE_tiny := tests/golden/flux-tiny/base
ADAPTER_tiny := tests/golden/flux-tiny/adapter
PRECISION_tiny := fp32
SIZE_tiny := --height 64 --width 64
BASE_flux := black-forest-labs/FLUX.1-dev
ADAPTER_flux := ymyy307/ArcFlow --adapter-subfolder arcflow-flux-2steps
PRECISION_flux := bf16
BASE_qwen := Qwen/Qwen-Image
ADAPTER_qwen := ymyy307/ArcFlow --adapter-subfolder arcflow-qwen-2steps
PRECISION_qwen := bf16
PRECISION ?= $(PRECISION_$(MODEL))
DTYPE_fp32 := float32
DTYPE_bf16 := bfloat16
DTYPE_fp16 := float16
BUNDLE := $(OUT)/$(MODEL)-$(PRECISION)
PROMPTS_$(MODEL) ?= "a large red circle on a blue background"

# TARGET is what TensorRT-RTX builds for, such as sm89 or sm89,sm120; empty for the GPU here.
TARGET ?=
# TensorRT has no float32 kernel for attention as one operator.
OPSET_fp32 := $(if $(filter tensorrt%,$(BACKEND)),--opset 20)

.PHONY: help setup demo engine shapes test lint format clean
help:
	@echo "make demo     export the shapes student and draw four prompts on this CPU  [PROMPT=...]"
	@echo "make test     run the tests"
	@echo "make engine   MODEL=shapes|tiny|flux|qwen [PRECISION=fp32|bf16|fp16] [BACKEND=onnxruntime|tensorrt-rtx|tensorrt] [TARGET=sm89]"
	@echo "make shapes   train the shapes model from nothing: two hours on two CPU cores, minutes on a GPU"
	@echo "make lint     ruff and mypy"

setup: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "arcflow needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[export,calibrate,distill,tensorrt-rtx,dev]"
	@touch $@

demo: engine
	$(BIN)/arcflow generate $(BUNDLE) $(if $(PROMPT),"$(PROMPT)",$(PROMPTS_$(MODEL))) $(SIZE_$(MODEL)) \
		--seed 42 --sheet --out $(OUT)/demo.png

engine: check-preset setup
	@mkdir -p $(OUT)
	$(BIN)/arcflow export --base $(BASE_$(MODEL)) --adapter $(ADAPTER_$(MODEL)) \
		--dtype $(DTYPE_$(PRECISION)) $(OPSET_$(PRECISION)) $(EXPORT_$(MODEL)) --out $(BUNDLE) --overwrite
	$(if $(filter tensorrt%,$(BACKEND)),$(BIN)/arcflow build $(BUNDLE) --backend $(BACKEND) $(addprefix --target ,$(TARGET)))

.PHONY: check-preset
check-preset:
	$(if $(BASE_$(MODEL)),,$(error MODEL must be shapes, tiny, flux or qwen, got '$(MODEL)'))
	$(if $(DTYPE_$(PRECISION)),,$(error PRECISION must be fp32, bf16 or fp16, got '$(PRECISION)'; FP8 is not built by this version))
	$(if $(filter onnxruntime tensorrt-rtx tensorrt,$(BACKEND)),,$(error BACKEND must be onnxruntime, tensorrt-rtx or tensorrt, got '$(BACKEND)'))

shapes: setup
	@mkdir -p $(OUT)
	$(BIN)/arcflow train-shapes --out $(OUT)/shapes

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
