# The two commands a new user needs are `make quickstart` and `make test`; both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := quickstart

.PHONY: quickstart test lint format generated soak cuda-check gpu-check

# What pyproject.toml asks for, without the project itself, which is a checkout and no package.
NEEDS = import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  more = [need for extra in sys.argv[1:] for need in project["optional-dependencies"][extra]]; \
  print("\n".join(project["dependencies"] + more))

# What training needs, and on top of it what the tests need.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c '$(NEEDS)' > $(VENV)/needs.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/needs.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -c '$(NEEDS)' dev > $(VENV)/needs-dev.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/needs-dev.txt
	touch $@

# Trains a small model on Python's own documentation, scores it, and lets it write.
quickstart: $(VENV)/.installed
	test -f datasets/python-docs/train.safetensors || \
	  $(BIN)/python prepare_dataset.py python-docs datasets/python-docs --validation-fraction 0.05
	$(BIN)/torchrun --standalone --nproc_per_node=1 ddp_train.py $(RUN) datasets
	$(BIN)/python test_loss.py datasets runs/$(RUN)/model.json runs/$(RUN)/checkpoints/latest/model.safetensors \
	  --dataset python-docs --start-token 0 --batches 20
	$(BIN)/python test_smoke.py runs/$(RUN)/model.json runs/$(RUN)/checkpoints/latest/model.safetensors \
	  --prompt "Return a new list" --seed 1
	@echo "Charts, samples and numbers of the run: open runs/$(RUN)/training-run-chart.html"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# JSON Schemas for editors, the reference of all keys, and the instruction set.
generated: $(VENV)/.installed
	$(BIN)/python -m harness.run.reference
	$(BIN)/python -m assets.instructions.builtin_set

# Reads the CUDA code that training compiles to, on any Linux machine: a CUDA build of torch (5 GB) in .venv-cuda, no GPU.
cuda-check:
	test -d .venv-cuda || $(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -c '$(NEEDS)' > .venv-cuda/needs.txt
	.venv-cuda/bin/python -m pip install --quiet --requirement .venv-cuda/needs.txt
	.venv-cuda/bin/python -m benchmarks.cuda_check

# The first ten minutes on a GPU machine: what works, how fast, and what was foretold; benchmarks/results/gpu-CARD.md.
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu_check

# Kills a run at random 220 times and races 50 pairs of trainers for one: 20 minutes on two cores.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.soak --output benchmarks/results/soak.txt
