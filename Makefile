PYTHON ?= python3
RUN := .venv/bin/python
TESTS ?= tests
# Of the tests. Each computes in one thread.
JOBS ?= 2

.PHONY: help setup demo demo-seg test lint clean

help:
	@echo "make demo   set up, train a small Mask R-CNN on drawn shapes, show what it finds"
	@echo "make demo-seg   the same with UPerNet, a segmentor"
	@echo "make test   set up, run the tests"
	@echo "make setup  only make .venv with everything in it"
	@echo "make lint   check the style"
	@echo "make clean  delete .venv, data/shapes and work_dirs"

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	@$(RUN) tools/demo.py configs/demo/mask-rcnn_convnext-atto_shapes.py \
	    --work-dir work_dirs/demo --require bbox_mAP_50=0.70 segm_mAP_50=0.70

demo-seg: setup
	@$(RUN) tools/demo.py configs/demo/upernet_convnext-atto_shapes.py \
	    --work-dir work_dirs/demo-seg --require mIoU=0.80

test: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --durations 20 $(TESTS)

lint: setup
	@$(RUN) -m flake8 convnext_mm configs tools tests

clean:
	rm -rf .venv data/shapes work_dirs
