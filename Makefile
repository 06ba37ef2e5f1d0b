# The two commands a new user needs are `make quickstart` and `make test`; both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := quickstart

.PHONY: quickstart test test-lowest lint format generated lock cuda-check gpu-check fuzz soak

# What training needs, and on top of it what the tests need: exact versions of everything, with their SHA-256. But for
# torch, whose builds depend on the machine (CPU, or one of several versions of CUDA), so that is what pip finds for it.
TORCH := $(shell sed -n 's/^    "\(torch[><=].*\)",$$/\1/p' pyproject.toml)
$(VENV)/.installed: requirements/train.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-deps --require-hashes --requirement $<
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $<
	touch $@

# Trains a small model on Python's language reference, shows what it has learned, and judges a first change to a recipe:
# dropout on or off, two runs at a time on a core each. By the noise that studies/five-interventions found, five seeds tell
# two thirds of its effect 93 times in 100, three 53 times. None of them is in that study.
DATASETS := $(patsubst %,datasets/%/train.safetensors,python-reference python-reference-bytes)
datasets/python-reference/train.safetensors: TOKENIZER := train:2048
datasets/python-reference/train.safetensors: HELD_OUT := 0.1
datasets/python-reference-bytes/train.safetensors: TOKENIZER := bytes
datasets/python-reference-bytes/train.safetensors: HELD_OUT := 0.2
$(DATASETS): | $(VENV)/.installed
	$(BIN)/python prepare_dataset.py python-reference $(@D) --tokenizer $(TOKENIZER) --validation-fraction $(HELD_OUT)

# What the study in this laboratory learned of its noise, for the plan to reckon with.
runs/noise-ledger.json:
	cp studies/five-interventions/noise-ledger.json $@

SAMPLE := @$(BIN)/python test_smoke.py --prompt "The statement" --num-tokens 150 --temperature 0.8 --seed 1
quickstart: $(VENV)/.installed $(DATASETS) runs/noise-ledger.json
	$(BIN)/python ddp_train.py $(RUN) datasets
	$(BIN)/python test_loss.py datasets --run $(RUN)
	$(BIN)/python -m harness.report.terminal $(RUN)
	@echo; echo "What it writes before training:"
	$(SAMPLE) --run $(RUN)/checkpoints/step-00000000
	@echo; echo "And after:"
	$(SAMPLE) --run $(RUN)
	@echo; echo "Does it help to train without dropout? Five runs each with and without it, on the same five seeds:"
	test -f runs/first-verdict/experiment.json || \
	  $(BIN)/python experiment.py plan lab runs/lab/no-dropout.json --name first-verdict --seeds 21,22,23,24,25 --test-batches 100
	OMP_NUM_THREADS=1 $(BIN)/python experiment.py run first-verdict datasets >/dev/null 2>&1 & \
	  OMP_NUM_THREADS=1 $(BIN)/python experiment.py run first-verdict datasets; status=$$?; wait; exit $$status
	$(BIN)/python experiment.py compare --experiment first-verdict
	@echo; echo "HELPS or HURTS is wrong at most once in twenty such experiments; CANNOT TELL asks for more seeds."
	@echo; printf '%s\n' "Next: charts and samples of the run:   open runs/$(RUN)/training-run-chart.html" \
	  "      let it go on with what you type: $(BIN)/python test_smoke.py --run $(RUN) --interactive" \
	  "      a run of your own text:          $(BIN)/python prepare_dataset.py \"books/*.txt\" datasets/books"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The same tests with the lowest versions that pyproject.toml allows.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest --resolution lowest-direct \
	  --requirement pyproject.toml --extra dev
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist worksteal

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

# Reads the CUDA code that training compiles to, on any Linux machine: PyPI's build of torch (5 GB) in .venv-cuda, no GPU.
cuda-check:
	$(MAKE) VENV=.venv-cuda .venv-cuda/.installed
	.venv-cuda/bin/python -m benchmarks.cuda_check

# The first ten minutes on a GPU machine: what works, how fast, and what was foretold; benchmarks/results/gpu-CARD.md.
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu_check

# Chooses the newest versions that pyproject.toml allows, for every system and Python, and writes their SHA-256.
LOCK := uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-header --quiet --upgrade
WITHOUT_TORCH := /^[a-z]/ {is_its = /^(torch|triton|cuda-|nvidia-)/} !is_its
lock: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/$(LOCK) --extra dev | awk '$(WITHOUT_TORCH)' > requirements/dev.txt
	$(BIN)/$(LOCK) --constraint requirements/dev.txt | awk '$(WITHOUT_TORCH)' > requirements/train.txt

# Feeds every command what nobody would: ten minutes, from a seed that is printed (FUZZ="--seed N --minutes M").
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.fuzz --output benchmarks/results/fuzz.txt $(FUZZ)

# Kills all that writes at random, races trainers, copies live runs (SOAK="--command-kills 100 --steps 0" and others).
soak: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.soak --output benchmarks/results/soak.txt $(SOAK)
