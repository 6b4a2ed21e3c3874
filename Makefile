# make demo: set-up and the main job on the embedded default. make test: set-up and the tests. make gpu-bundle: what
# run/gpu_checks.sh needs on a GPU machine without a network, into gpu_bundle/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/compositions_tiny
CONSTRAINTS ?= constraints.txt

# Without a device that it could find, DeepSpeed warns that it finds none, at each start.
ON_CPU := $(shell [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || [ -e /dev/dri ] || echo DS_ACCELERATOR=cpu)

# Many containers set it. Without bytecode, each process compiles its libraries again, which takes 8 CPU seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint gpu-bundle check

demo: $(VENV)/.ready
	@echo "[1/2] pre-training from scratch on pictures of one or two things: 500 steps, about 7 minutes on 2 CPU cores"
	@$(ON_CPU) $(BIN)/deepspeed --quiet run/pretrain.py --deepspeed ds_configs/zero3.json --output $(RUN)
	@echo "[2/2] captions and reconstructions of pictures whose two things were never seen together"
	@$(BIN)/python run/generate.py $(RUN) --out $(RUN)/generated
	@$(BIN)/python run/report.py $(RUN) --out $(RUN)/report.html
	@echo
	@echo "look at it:         open $(RUN)/report.html, and $(RUN)/generated/generated.html"
	@echo "your own picture:   $(BIN)/python run/generate.py $(RUN) photo.jpg"
	@echo "another objective:  $(BIN)/deepspeed run/pretrain.py --deepspeed ds_configs/zero3.json --config run/recipes/clip/openmoji_clip.yaml"
	@echo "a larger run:       run/recipes/mug/cc3m_base.yaml explains how"

# PYTEST names other tests or options: make test PYTEST='-m slow', make test PYTEST=tests/data
PYTEST ?= -m "not slow"
test: $(VENV)/.ready
	@$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(PYTEST)

lint: $(VENV)/.ready
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/python .ci/check_types.py

gpu-bundle: $(VENV)/.ready
	@PYTHON=$(BIN)/python run/gpu_bundle.sh

$(VENV)/.ready: setup.py $(CONSTRAINTS) | check
	@$(PYTHON) .ci/set_up.py install $(VENV) $(CONSTRAINTS)
	@touch $@

# One line where Python, disk or memory do not suffice.
check:
	@command -v $(PYTHON) > /dev/null || { \
		echo "error: $(PYTHON) is not installed: install Python 3.11 or 3.12, or make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) .ci/set_up.py check $(VENV)
