# SPDX-License-Identifier: MIT
# Every target but help and clean first installs what is missing (scripts/setup.sh).
#   PYTHON=python3.12 make test    another interpreter     VENV=/tmp/venv make test    another place

VENV ?= .venv
PYTHON ?= python3
export VENV PYTHON
export PREFIX DESTDIR LIBDIR BINDIR HELPERDIR SYSCONFDIR UNITDIR DATADIR WHEELHOUSE
BIN := $(abspath $(VENV))/bin
# Hundreds of commands are started; each would compile the program anew.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := $(wildcard zbudfs tests scripts bench setup.py)

.PHONY: help venv picture demo test lint format campaign-kill test-vm bench install uninstall dist pages fsx soak coverage mutants clean

help:
	@echo 'make test     install what is missing, then ruff, mypy and all tests (real mounts and real swap: as root)'
	@echo 'make demo     install what is missing, then swap a program that needs three times its memory, and count'
	@echo 'make campaign-kill   a worker killed 100 times while a program lives on its swap (ARGS=--help tells more)'
	@echo 'make bench    how fast it is, what it takes, and against what (ARGS=--help tells more; ARGS="storm --rounds 3")'
	@echo 'make test-vm         boot, swap, hand-over and power-off in a virtual machine, emulated: slow (ARGS="boot pressure")'
	@echo 'make fsx      many processes do anything to swapfile, compared with a plain file (ARGS=--help tells more)'
	@echo 'make soak     everything at once, with a disk that fails, for as long as wanted (ARGS=--help tells more)'
	@echo 'make coverage branches of core/ and store/ that no test takes'
	@echo 'make mutants  changes to the allocator and the page table that no test notices (ARGS=--help tells more)'
	@echo 'make picture         draw docs/top.svg anew: zbudfs top during a storm of swap (as root)'
	@echo 'make lint     ruff and mypy only'
	@echo 'make format   let ruff lay out the sources'
	@echo 'make venv     only the virtual environment, in $(VENV)'
	@echo 'make install     the program, units, man pages, completion, /etc/zbudfs/swap.toml: below PREFIX=/usr/local, as root'
	@echo '                 (DESTDIR=, SYSCONFDIR=, UNITDIR= ... as usual; WHEELHOUSE=folder: from wheels, without a network)'
	@echo 'make uninstall   all of that away again'
	@echo 'make pages       manual pages and shell completion again, after a change of options'
	@echo 'make dist        sdist and wheel in dist/, installed into an empty environment and tried'
	@echo 'make clean    remove what was built'

venv:
	@scripts/setup.sh

picture: venv
	@$(BIN)/python -m scripts.picture $(ARGS)

campaign-kill: venv
	@$(BIN)/python scripts/campaign_kill.py $(ARGS)

fsx: venv
	@$(BIN)/python scripts/fsx.py $(ARGS)

soak: venv
	@$(BIN)/python -m scripts.soak $(ARGS)

coverage: venv
	$(BIN)/python -m coverage run -m pytest -q tests/core tests/store tests/tracing --ignore tests/store/test_crash_points.py
	$(BIN)/python -m coverage report

mutants: venv
	@$(BIN)/python -m scripts.mutants $(ARGS)

bench: venv
	@$(BIN)/python -m bench $(or $(ARGS),all)

test-vm: venv
	@$(BIN)/python scripts/vm.py $(ARGS)

lint: venv
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy --strict $(filter-out setup.py,$(SOURCES))

format: venv
	$(BIN)/ruff format $(SOURCES)

# Two at a time: most of a test is waiting (tests/conftest.py says which are never beside each other).
test: lint
	$(BIN)/python -m pytest -n 2

demo: venv
	@$(BIN)/python scripts/demo.py

# Where things go, and why: scripts/install.sh.
install:
	@scripts/install.sh install

uninstall:
	@scripts/install.sh uninstall

pages: venv
	@$(BIN)/python -m scripts.pages

dist: venv
	@$(BIN)/python -m scripts.dist

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find zbudfs tests scripts bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f zbudfs/*/*.so
