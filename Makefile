PYTHON ?= python3
VENV ?= .venv
RUN := $(or $(VENV),.venv)/bin/python
# What set-up is asked for: TORCH=2.11, TORCH_INDEX_URL=..., MMCV=compiled.
export VENV TORCH TORCH_INDEX_URL MMCV
TESTS ?= tests
# Tests of the package: without those of configs and tools.
ROOMS := $(filter-out tests/configs tests/tools tests/data tests/helpers tests/conftest.py tests/__pycache__,$(wildcard tests/*))
# Of the tests. Each computes in one thread.
JOBS ?= 2

.PHONY: help setup demo demo-long demo-seg test check lint docs format clean

help:
	@echo "make demo   set up, train a small Mask R-CNN on drawn shapes, show what it finds: 5 minutes"
	@echo "make demo-long  the same with four times as many images"
	@echo "make demo-seg   the same with UPerNet, a segmentor"
	@echo "make test   set up, run the tests"
	@echo "make setup  only make .venv with everything in it (TORCH=2.11: older versions)"
	@echo "make check  lint, types and quick tests of every module: under 90 seconds"
	@echo "make lint   check style and types"
	@echo "make docs   build the documentation into site/, look at it in Chromium"
	@echo "make format let ruff write the style"
	@echo "make clean  delete .venv, .venv-*, data/shapes, site and work_dirs"

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	@$(RUN) tools/demo.py configs/demo/mask-rcnn_convnext-atto_shapes-520it.py \
	    --work-dir work_dirs/demo --require bbox_mAP_50=0.70 segm_mAP_50=0.70

demo-long: setup
	@$(RUN) tools/demo.py configs/demo/mask-rcnn_convnext-atto_shapes.py \
	    --work-dir work_dirs/demo-long --require bbox_mAP_50=0.85 segm_mAP_50=0.85

demo-seg: setup
	@$(RUN) tools/demo.py configs/demo/upernet_convnext-atto_shapes.py \
	    --work-dir work_dirs/demo-seg --require mIoU=0.80

test: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 20 $(TESTS)

check: lint
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not slow' $(ROOMS)

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@$(RUN) tools/maintenance/check_site.py site

format: setup
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

clean:
	rm -rf .venv .venv-* data/shapes site work_dirs
