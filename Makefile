# make demo: set-up and the main job on the embedded default. make test: set-up and the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/openmoji_tiny
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: demo test lint

demo: $(VENV)/.ready
	@echo "[1/2] pre-training on OpenMoji: 600 steps under ZeRO-3, about 5 minutes on 2 cores"
	@$(BIN)/deepspeed --quiet run/pretrain.py --deepspeed ds_configs/zero3.json --output $(RUN)
	@echo "[2/2] captions and reconstructions of held-out pairs"
	@$(BIN)/python run/generate.py $(RUN) --out $(RUN)/generated

# PYTEST names other tests or options: make test PYTEST='-m slow', make test PYTEST=tests/data
PYTEST ?= -m "not slow"
test: $(VENV)/.ready
	@$(BIN)/python -m pytest $(PYTEST)

lint: $(VENV)/.ready
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

$(VENV)/.ready: setup.py constraints.txt
	@echo "[set-up 1/3] virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade -c constraints.txt pip setuptools wheel
	@echo "[set-up 2/3] PyTorch, about 6 GB installed: 1 to 5 minutes"
	@$(PIP) install -c constraints.txt torch torchvision
	@echo "[set-up 3/3] DeepSpeed and the rest: about 1 minute"
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@
