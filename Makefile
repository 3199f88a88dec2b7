# Everything runs in .venv, which the first command sets up and which follows settings.ini.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/ready
BEGAN := $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help setup npm study test outputs docs export hooks unhook clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

setup: $(READY)  ## the environment .venv, made once (PYTHON=python3.12 chooses the interpreter)

# .venv.unfinished marks an interrupted set-up: the next one starts from an empty environment.
$(READY): settings.ini setup.py pyproject.toml
	@if [ ! -d .venv ] || [ -e .venv.unfinished ]; then touch .venv.unfinished && $(PYTHON) -m venv --clear .venv; fi
	@touch .venv.unfinished
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@ && rm .venv.unfinished

# The checks of mathematics and accessibility want three packages of Node's, and the preview one of them; without Node they are left out, and the tests say so.
NPM := tests/preview/node_modules/.ready
npm: $(NPM)
$(NPM): tests/preview/package.json
	@{ command -v npm && npm install --prefix tests/preview --no-package-lock --no-audit --no-fund --loglevel=error --fetch-retries=0 --fetch-timeout=30000 && touch $@; } || echo "no npm, or nothing from it: some checks of the site will be skipped"

study: $(READY)  ## the main job: the quick grid on real digits (ARGS='--seeds 3' and the like)
	$(BIN)/gcnn_stn_study --grid quick --jobs 2 $(ARGS)

test: $(READY) npm  ## the proof: every chapter, the pages, the wheel (ARGS=--slow for all of it)
	@export TEST_BEGAN=$(BEGAN) TEST_READY=$$(date +%s) OMP_NUM_THREADS=1 && \
	$(BIN)/nbdev_test --n_workers 2 --do_print --timing && \
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests $(ARGS)

outputs: $(READY)  ## run every notebook anew, and compare its figures and tables with those that are kept (ARGS=layers/kernel for one)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/test_outputs.py $(ARGS)

docs: $(READY) npm  ## the site in _docs: by Quarto if it is there, otherwise a preview by pandoc
	@if command -v quarto >/dev/null; then touch README.md && PATH="$(abspath $(BIN)):$$PATH" nbdev_docs; else $(BIN)/python tests/preview.py; fi

export: $(READY)  ## after editing notebooks: clean them, write the package and the README
	$(BIN)/python tests/colab.py
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tests/book.py

hooks: $(READY)  ## in this clone only: refuse commits out of step, merge notebooks by cell (undo: make unhook)
	git config core.hooksPath .githooks
	git config merge.nbdev-merge.driver '$(BIN)/nbdev_merge %O %A %B %P'

unhook:  ## take the hooks out again
	-git config --unset core.hooksPath
	-git config --remove-section merge.nbdev-merge

clean:  ## remove what the commands made, but not .venv and results
	rm -rf _proc _docs build dist *.egg-info .pytest_cache tests/preview/node_modules gcnn_stn/__pycache__ tests/__pycache__
