# Every target makes .venv first, once: it is made again only when pyproject.toml or constraints.txt changes.
# Needs make, Python >= 3.11 (choose one with PYTHON=python3.12) and a C++ compiler for the CPU's JIT.

PYTHON ?= python3
CXX_FOUND := $(firstword $(foreach name,$(CXX) g++ clang++,$(shell command -v $(name) 2>/dev/null)))
export CXX := $(CXX_FOUND)
BIN := .venv/bin
READY := .venv/.ready
# torch.compile's kernels are kept here, so that the second run finds them.
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export TOKENIZERS_PARALLELISM := false
# Packages are compiled when first imported, as pip is told not to: where that is not kept, each process compiles again.
unexport PYTHONDONTWRITEBYTECODE

# Two files of tests side by side, each on one thread, the longest folders first, so that none is alone at the end; with
# a GPU one after the other, as they watch its memory.
SIDE_BY_SIDE := $(if $(shell command -v nvidia-smi 2>/dev/null),,-n 2 --dist loadfile --no-loadscope-reorder)

.DEFAULT_GOAL := help
.PHONY: help reproduce test lab lint audit fuzz setup compiler chromium clean

help: ## this list
	@echo "hybridlab: make TARGET"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

reproduce: compiler $(READY) ## run the four-arm ablation on the embedded model (set-up + some ten minutes on 2 cores)
	@$(BIN)/hybridlab reproduce

test: compiler $(READY) lint chromium ## check style and types, then run every test that this machine can run
	@echo "==> tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE)

lab: compiler $(READY) ## open the notebooks in JupyterLab, reachable from this machine only
	@$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.app_settings_dir="$(CURDIR)/notebooks" \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_FLAGS)

lint: $(READY) ## ruff and mypy
	@echo "==> ruff" && $(BIN)/ruff check
	@echo "==> mypy" && $(BIN)/mypy

audit: $(READY) ## compare the pinned dependencies with published advisories (needs the network)
	@echo "==> pip check" && $(BIN)/python -m pip --disable-pip-version-check check
	@$(PIP) pip-audit==2.10.1
	@echo "==> pip-audit" && $(BIN)/python -m pip freeze --exclude-editable | sed 's/+[^+]*$$//' >.venv/installed.txt \
		&& $(BIN)/pip-audit --strict --no-deps --disable-pip -r .venv/installed.txt

FUZZ_S ?= 60
fuzz: compiler $(READY) ## attack the readers of files with random ones, FUZZ_S=60 seconds each
	@$(PIP) atheris==3.1.0
	@echo "==> hypothesis" && FUZZ_EXAMPLES=3000 $(BIN)/python -m pytest -q tests/faults/test_fuzz.py
	@for name in weights index config kineto nsys workload; do \
		echo "==> $$name" && $(BIN)/python -m tests.fuzz.harness $$name -max_total_time=$(FUZZ_S) -rss_limit_mb=8192 || exit 1; done

setup: $(READY) ## only make .venv

clean: ## remove .venv and caches; runs and figures stay
	rm -rf .venv .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hybridlab tests notebooks data -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

compiler:
	@if [ -z "$(CXX_FOUND)" ]; then \
		echo "no C++ compiler found · torch.compile builds the CPU's kernels with one, and neither \$$CXX nor g++ nor clang++ is there · install g++ (Debian: apt install g++, macOS: xcode-select --install) or set CXX" >&2; \
		exit 1; fi

# The browser tests say that they were skipped where there is no Chromium; on Debian root can have one.
chromium:
	@for name in chromium chromium-browser google-chrome chrome; do command -v $$name >/dev/null && exit 0; done; \
	[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0; \
	export DEBIAN_FRONTEND=noninteractive; $(STEP); \
	step "Chromium for the browser tests" sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null' \
		|| echo "Chromium could not be installed: the browser tests are skipped" >&2

# One line a step, a sign of life every 10 seconds, and pip's own words when it fails.
define STEP
step() { \
	printf '==> %s\n' "$$1"; shift; \
	( while sleep 10 >/dev/null 2>&1; do waited=$$(( $${waited:-0} + 10 )); printf '    ... %s s\n' "$$waited"; done ) & beat=$$!; \
	trap 'kill $$beat 2>/dev/null' EXIT INT TERM; \
	"$$@"; status=$$?; \
	kill $$beat 2>/dev/null; wait $$beat 2>/dev/null; trap - EXIT INT TERM; \
	return $$status; \
}
endef
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq --no-compile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python >= 3.11 is needed · $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there) · choose one with: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@$(STEP); step "1/4 virtual environment in .venv ($$($(PYTHON) --version))" $(PYTHON) -m venv .venv || { \
		echo "the virtual environment could not be made · $(PYTHON) -m venv .venv · on Debian: apt install python3-venv" >&2; exit 1; }
	@$(STEP); step "2/4 PyTorch, pinned, before anything that could choose another" $(PIP) torch==$(call pin,torch)
	@$(STEP); step "3/4 Triton of the same release" $(PIP) triton==$(call pin,triton) || test "$$(uname -s)" != Linux
	@$(STEP); step "4/4 hybridlab with the lab, cluster and test extras" $(PIP) -c constraints.txt -e '.[lab,cluster,test]'
	@touch $@
	@echo "==> ready: $$($(BIN)/python -c 'import torch; print("torch", torch.__version__, "· GPU" if torch.cuda.is_available() else "· CPU only")')"

pin = $(shell sed -n 's/^$(1)==//p' constraints.txt)
