# `make help` lists the targets. Everything runs in .venv/, built by `make setup`.
PYTHON ?= python3
# Where pip takes torch from besides the default index, e.g. on Linux without a GPU, for a much smaller download:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PY := .venv/bin/python

.PHONY: help setup demo test reference clean

help:           ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: .venv/ready  ## the virtual environment .venv/ with everything needed

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minivl needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[dev,video]"
	@touch .venv/ready

demo: setup     ## a small model answers a question about a picture
	@echo
	@echo "A tiny model with RANDOM weights, made on the spot: what it writes is nonsense, the way there is the real one."
	@$(PY) -m weights_tools.synthesize build/tiny --size tiny --awq --overwrite
	@echo
	@echo "tests/golden/tiger.jpeg> describe this image"
	@$(PY) -m minivl chat -m build/tiny tests/golden/tiger.jpeg -p "describe this image" --max-new-tokens 24
	@echo
	@echo "Your own: .venv/bin/python -m minivl chat -m build/tiny PICTURE     The 4B model: see README.md"

test: setup     ## all tests
	$(PY) -m pytest

reference: .reference/ready     ## the environment .reference/ with transformers, for `python -m weights_tools.verify`

.reference/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .reference
	.reference/bin/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[reference]"
	@touch .reference/ready

clean:          ## removes .venv/, .reference/ and build/
	rm -rf .venv .reference build *.egg-info
