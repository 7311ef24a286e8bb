# SPDX-License-Identifier: MIT
# `make setup` installs system packages, and nothing else does. The other targets report what is missing (scripts/setup.sh).
#   PYTHON=python3.12 make test    another interpreter     VENV=/tmp/venv make test    another place

VENV ?= .venv
PYTHON ?= python3
export VENV PYTHON
export PREFIX DESTDIR LIBDIR BINDIR HELPERDIR SYSCONFDIR UNITDIR DATADIR WHEELHOUSE EXTRAS
BIN := $(abspath $(VENV))/bin
# The tests start hundreds of commands, and each would compile the program again.
unexport PYTHONDONTWRITEBYTECODE
C_SOURCES := $(wildcard zbudfs/*/*.c zbudfs/*/*.h)
SOURCES := $(wildcard zbudfs tests scripts bench kit setup.py)

.PHONY: help setup venv picture demo test lint format campaign-kill test-vm bench install uninstall dist pages deb reproducible readme fsx soak coverage mutants sanitize clean

help:
	@echo 'make setup    install missing system packages with apt-get, as root, then the virtual environment'
	@echo 'make test     ruff, mypy, the rules for English, and all tests (real mounts and real swap: as root)'
	@echo 'make demo     swap a program that needs three times its memory, and compare every byte'
	@echo 'make campaign-kill   a worker killed 100 times while a program lives on its swap (ARGS=--help: options)'
	@echo 'make bench    speed and memory, against other programs (ARGS=--help: options; ARGS="storm --rounds 3")'
	@echo 'make test-vm         boot, swap, hand-over and power-off in a virtual machine, emulated: slow (ARGS="boot pressure")'
	@echo 'make fsx      many processes do anything to swapfile, compared with a plain file (ARGS=--help: options)'
	@echo 'make soak     everything at once, with a disk that fails, for as long as wanted (ARGS=--help: options)'
	@echo 'make coverage branches of core/ and store/ that no test takes'
	@echo 'make mutants  changes to the allocator and the page table that no test notices (ARGS=--help: options)'
	@echo 'make sanitize  the tests of the C, built with ASan and UBSan in build/sanitize (ARGS: other tests)'
	@echo 'make picture         draw docs/top.svg: zbudfs top during a storm of swap (as root)'
	@echo 'make lint     ruff, mypy, clang-format, and the rules for English in scripts/prose.py'
	@echo 'make format   let ruff and clang-format lay out the sources'
	@echo 'make venv     only the virtual environment, in $(VENV); reports missing system packages'
	@echo 'make install     the program, units, man pages, completion, /etc/zbudfs/swap.toml: below PREFIX=/usr/local, as root'
	@echo '                 (DESTDIR=, SYSCONFDIR=, UNITDIR= ... as usual; WHEELHOUSE=folder: from wheels, without a network)'
	@echo 'make uninstall   remove what make install has installed'
	@echo 'make pages       manual pages, shell completion and docs/zbudfs.toml.example, from the options and docs/man/*.rst'
	@echo 'make dist        sdist and wheel in dist/, installed into an empty environment and tried'
	@echo 'make deb         the Debian package, in dist/ (ARGS="--suite trixie --try": for Debian 13, installed and purged)'
	@echo 'make reproducible   sdist, wheel and package twice, compared byte for byte (ARGS="--suite trixie")'
	@echo 'make readme      the commands of README.md in a clean Debian 12 and 13 (ARGS="--suite trixie")'
	@echo 'make clean    remove what was built'

setup:
	@scripts/setup.sh --install

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

sanitize: venv
	@scripts/sanitize.sh $(ARGS)

bench: venv
	@$(BIN)/python -m bench $(or $(ARGS),all)

test-vm: venv
	@$(BIN)/python scripts/vm.py $(ARGS)

lint: venv
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy --strict $(filter-out setup.py,$(SOURCES))
	$(BIN)/python -m scripts.prose
	@if [ -x $(BIN)/clang-format ]; then $(BIN)/clang-format --dry-run -Werror $(C_SOURCES); \
	else echo 'lint: the layout of the C files is not checked: install clang-format into $(VENV)' >&2; fi

format: venv
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/clang-format -i $(C_SOURCES)

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

reproducible: venv
	@$(BIN)/python -m scripts.reproducible $(ARGS)

readme: venv
	@$(BIN)/python -m scripts.readme $(ARGS)

deb: venv
	@$(BIN)/python -m scripts.deb $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find zbudfs tests scripts bench kit -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -rf zbudfs/*/*.so completion docs/man/*.[1-9] docs/zbudfs.toml.example
