# LucidPrune: what a newcomer needs. `make install` is what the others do first; it does nothing when it is done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo
# The others name what they need in --help.
BENCHMARKS := attribution_speed di_scoring matching_cost pruned_speed saliency shrink training zoo

.PHONY: help install test demo flags lint docs benchmarks gpu-check campaign clean

help:
	@echo 'make install     .venv with everything, the needs of the tests included'
	@echo 'make test        install, then the fast tests, then the slow ones'
	@echo 'make demo        install, then pretrain, prune, fine-tune, explain, export and report a small network'
	@echo 'make flags       install, then list the flags of every verb anew: what --help is answered from'
	@echo 'make docs        install, then build the documentation into site/'
	@echo 'make lint        install, then ruff and mypy'
	@echo 'make benchmarks  install, then the scripts of benchmarks/ that need no data or checkpoint of yours'
	@echo 'make gpu-check   tests and speeds of this machine with its GPU, into benchmarks/results/gpu_check.json'
	@echo 'make campaign    install, then kill nine kinds of training 207 times, and compare; hostile words for every verb'
	@echo 'make clean       remove .venv and what tools left behind'
	@echo 'PYTHON=python3.12 chooses the interpreter (3.11.4 or newer)'

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || \
		{ echo 'Python 3.11.4 or newer is needed: make install PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo 'No venv module; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }

$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

# A process per core, a file of tests at a time, one thread each: faster than one process with all threads.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m slow

# Pretrain, prune to half the MACs while training, fine-tune, explain, export, report.
demo: install
	$(BIN)/python main.py shapes --config configs/shapes_resnet20.yaml --workspace $(DEMO)/pretrain
	$(BIN)/python main.py shapes --config configs/shapes_resnet20_prune.yaml --workspace $(DEMO)/prune \
		--pretrained-weights $(DEMO)/pretrain/checkpoint.pth.tar
	$(BIN)/python main.py shapes --config configs/shapes_resnet20_finetune.yaml --workspace $(DEMO)/finetune \
		--pretrained-weights $(DEMO)/prune/checkpoint.pth.tar
	$(BIN)/python -m explainers attribute shapes --checkpoint $(DEMO)/finetune/checkpoint.pth.tar --method gradcam \
		--method lrp --num-images 12 --output $(DEMO)/maps
	$(BIN)/python -m pruning export $(DEMO)/finetune/checkpoint.pth.tar --format onnx --data shapes \
		--output $(DEMO)/pruned.onnx
	$(BIN)/python -m pruning report $(DEMO)
	@echo "open $(CURDIR)/$(DEMO)/report.html"

flags: install
	$(BIN)/python -m image_classification.write_flags pruning.__main__:ALL_VERBS explainers.__main__:VERBS

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p image_classification -p explainers -p pruning
	$(BIN)/mypy main.py multiproc.py

docs: install
	$(BIN)/zensical build --strict --clean

benchmarks: install
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

# Where .venv is not made by this file (a container, a lent machine): make gpu-check BIN=/usr/bin
gpu-check:
	$(BIN)/python benchmarks/gpu_check.py $(DATA)

campaign: install
	$(BIN)/python benchmarks/kill_campaign.py
	$(BIN)/python benchmarks/fuzz.py --seconds 1800
	$(BIN)/python -m pytest tests/reliability

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
