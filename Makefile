# Each command sets up .venv first, where it is missing or older than requirements.txt.
# Written for GNU Make 3.81, which macOS ships.

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif
# Where to take torch from; empty: from PyPI, like everything else.
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
READY := .venv/.installed

.PHONY: help setup demo test fetch-demo fetch-test lab verify bench check-readme

help:
	@echo 'make demo          check every chapter against Hugging Face, train it, show its output'
	@echo 'make test          run every test and every notebook'
	@echo 'make lab           open the notebooks in Jupyter'
	@echo 'make verify        compare every chapter with Hugging Face, layer by layer'
	@echo 'make bench         measure every chapter against Hugging Face and the machine'
	@echo 'make check-readme  run every command that a README shows'
	@echo
	@echo 'make PYTHON=python3.12 demo       set up .venv with another Python (3.11 or newer)'
	@echo 'make TORCH_INDEX=$(CPU_INDEX) demo'
	@echo '                                  on Linux without an NVIDIA GPU: the small torch'

setup: $(READY)

demo: fetch-demo
	@$(BIN)/python tests/demo.py demo

test: fetch-test
	@$(BIN)/python -m pytest

# What a command uses of data/download.py, and what becomes of it without a network. The
# download names each size before it starts, and only looks where all is there.
FETCH_demo := smollm2
WITHOUT_demo := the chapter that uses it says so
FETCH_test := smollm2 gpt2-tokenizer llama3-tokenizer
WITHOUT_test := what needs it is skipped and named at the end

# Exit code 2 of the download is a network that cannot be reached: one line says so.
fetch-demo fetch-test: fetch-%: $(READY)
	@$(BIN)/python data/download.py $(FETCH_$*) || { code=$$?; \
	  test $$code -eq 2 || exit $$code; \
	  echo 'make $* goes on without what could not be fetched; $(WITHOUT_$*).'; }

lab: $(READY)
	@OMP_WAIT_POLICY=passive $(BIN)/python -m jupyter lab

verify: $(READY)
	@$(BIN)/python tests/demo.py verify

bench: $(READY)
	@$(BIN)/python tests/bench.py

check-readme: $(READY)
	@$(BIN)/python tests/readme.py --run-all

$(READY): requirements.txt
	@$(PYTHON) -c '' 2>/dev/null || { \
	  echo '$(PYTHON) cannot be run; install Python 3.11 or newer, or name one: make PYTHON=python3.12 …' >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); this book needs 3.11 or newer. Name one: make PYTHON=python3.12 …" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo '$(PYTHON) lacks its venv module; on Debian and Ubuntu: sudo apt install python3-venv' >&2; exit 2; }
	@if test -d .venv && ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo 'Removing .venv: it is incomplete, or made with an older Python.'; rm -rf .venv; fi
	@if test ! -d .venv; then \
	  echo "Creating .venv with $$($(PYTHON) -V)."; $(PYTHON) -m venv .venv || exit 2; fi
	@if test -n '$(TORCH_INDEX)'; then \
	  echo 'Installing torch from $(TORCH_INDEX).'; \
	  $(BIN)/python -m pip install --disable-pip-version-check --index-url '$(TORCH_INDEX)' \
	    "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)" || { \
	    echo 'torch could not be installed; nothing is lost, run the same command again.' >&2; exit 2; }; \
	elif test "$$(uname -s)" = Linux && ! command -v nvidia-smi >/dev/null && \
	    ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  echo 'No NVIDIA GPU found. On Linux, the torch of PyPI brings several GB of CUDA along;'; \
	  echo 'to avoid that, stop here (Ctrl-C) and run: make TORCH_INDEX=$(CPU_INDEX) $(MAKECMDGOALS)'; fi
	@echo 'Installing requirements.txt into .venv; the first time this takes some minutes.'
	@$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt || { \
	  echo 'The installation did not finish; run the same command again, it keeps what it has.' >&2; exit 2; }
	@touch $(READY)
	@echo '.venv is ready.'
