# The two commands a new user needs are `make quickstart` and `make test`; both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := quickstart

.PHONY: quickstart test lint format generated soak

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

# Trains a small model on Python's language reference, scores it, and lets it write.
quickstart: $(VENV)/.installed
	test -f datasets/python-reference/train.safetensors || \
	  $(BIN)/python prepare_dataset.py python-reference datasets/python-reference \
	    --tokenizer train:2048 --validation-fraction 0.1
	$(BIN)/torchrun --standalone --nproc_per_node=1 ddp_train.py $(RUN) datasets
	$(BIN)/python test_loss.py datasets --run $(RUN)
	$(BIN)/python test_smoke.py --run $(RUN) --prompt "The value of" --num-tokens 150 --temperature 0.8 --seed 1
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

# Kills a run at random 220 times and races 50 pairs of trainers for one: 20 minutes on two cores.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.soak --output benchmarks/results/soak.txt
