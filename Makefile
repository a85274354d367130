# `make help` lists the targets. Everything runs in .venv/, built by `make setup`.
PYTHON ?= python3
# Where pip takes torch from besides the default index, e.g. on Linux without a GPU, for a much smaller download:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PY := .venv/bin/python
# Tests run in a few processes side by side, each with one thread; `make test PROCESSES=0` runs them in one.
PROCESSES ?= logical --maxprocesses 4
PYTEST := $(PY) -m pytest -n $(PROCESSES) --dist worksteal

.PHONY: help setup demo test test-all fuzz gpu lint reference verify notebooks html lab clean

help:           ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: .venv/ready  ## the virtual environment .venv/ with everything needed

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minivl needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[dev,html,video,serve]"
	@touch .venv/ready

demo: setup     ## a small trained model answers questions about pictures
	@echo
	@$(PY) -m minivl demo
	@echo
	@echo 'Your own:      .venv/bin/python -m minivl chat PICTURE          (a conversation; it knows shapes, words and numbers)'
	@echo '               .venv/bin/python -m minivl chat minivl/nano/samples/count.png -p "How many rings are there?"'
	@echo 'The 4B model:  .venv/bin/python -m minivl chat -m OpenGVLab/InternVL2_5-4B-MPO-AWQ PICTURE     (downloads 3.3 GB)'

test: setup     ## all tests
	$(PYTEST)

lint: setup     ## ruff: imports, width, likely mistakes; the rules are in pyproject.toml
	$(PY) -m ruff check .

test-all: setup     ## all tests, also the slow ones
	$(PYTEST) -m "not gpu"

# A few of one kind: make fuzz FUZZ="pictures=500 --seed 7"
fuzz: setup     ## thousands of altered files of every kind, some minutes; the table and the failing ones: tests/fuzz/
	PYTHONPATH=.:tests $(PY) -W ignore -m fuzz $(FUZZ)

# On a bare machine with CUDA: `make gpu PY=python3`, with any Python that has torch, safetensors, tokenizers,
# huggingface_hub and Pillow.
gpu:            ## on a GPU: proves and measures everything in one go, some 5 minutes; results in build/
	@mkdir -p build
	PYTHONPATH=. $(PY) -W ignore -m weights_tools.bench --device cuda --json build/gpu.json

reference: .reference/ready     ## the environment .reference/ with transformers, for `python -m weights_tools.verify`

.reference/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .reference
	.reference/bin/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[reference]"
	@touch .reference/ready

QUESTION = minivl/nano/samples/small-print.png -p "What does the small print say?"

verify: setup reference     ## minivl against transformers on both small models, stage by stage; two pages in build/
	@mkdir -p build
	$(PY) -m weights_tools.verify nano $(QUESTION) --html build/verify-nano.html
	$(PY) -m weights_tools.verify nano-awq $(QUESTION) --html build/verify-nano-awq.html

notebooks: setup            ## runs every notebook and puts the outputs into the files
	$(PY) notebooks/run.py --write

html: setup     ## the notebooks as pages that need no network, in build/html/
	$(PY) notebooks/pages.py

lab: setup      ## JupyterLab on the first notebook
	.venv/bin/jupyter lab notebooks/00_a_picture_becomes_words.ipynb

clean:          ## removes .venv/, .reference/ and build/
	rm -rf .venv .reference build *.egg-info
