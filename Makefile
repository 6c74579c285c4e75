# make demo    build everything in .venv and run the main job: a federation of quantized personal models on real digits
# make test    the test suite
# make help    the rest
PYTHON ?= python3
VENV ?= .venv
# Another torch build: make demo TORCH=torch==2.8.0 (the pins of torch and triton then do not apply)
TORCH ?=
OUT ?= runs/quickstart

BIN := $(VENV)/bin
FLOWER := $(shell sed -n 's/^flower = \["\([^"]*\)".*/\1/p' pyproject.toml)
NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)
PYTEST_OPTIONS ?=
# Worker processes of the test suite, a file in each at a time
WORKERS ?= 2
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
CMAKE ?= cmake
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# The kernels without Python: a C++ driver that calls every one of them (tests/native)
DRIVER := $(CMAKE) -S . -DQUPEDKERN_DRIVER=ON

.PHONY: help install demo test test-slow test-flower sanitize test-instructions lint format digits clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       build in $(VENV), run the federation of fl/configs/quickstart.toml, say where its results lie"
	@echo "make test       the test suite (minutes)"
	@echo "make test-slow  every property on 1,500 random examples; long"
	@echo "make test-flower  install Flower ($(FLOWER)) and test its simulation and a real deployment (minutes)"
	@echo "make sanitize   every kernel under ASan, UBSan and TSan (CMake and g++ or clang++)"
	@echo "make test-instructions   instructions an element of three kernels, counted by valgrind, against the recorded"
	@echo "make lint       ruff and mypy"
	@echo "make digits     the accuracy table of Algorithm 1 on handwritten digits"
	@echo "options         PYTHON=python3.12  VENV=.venv  TORCH=torch==2.8.0  OUT=runs/quickstart"

install: $(VENV)/installed

# Editable: the native modules land beside the sources, so running from this folder finds them.
$(VENV)/installed: pyproject.toml constraints.txt qupedkern/_version.py $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),grep -vE '^(torch|triton)==' constraints.txt > $(VENV)/constraints.txt,cp constraints.txt $(VENV)/constraints.txt)
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt "$(or $(TORCH),torch)"
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[fl,test,lint]'
	@$(BIN)/python -m qupedkern --brief
	@touch $@

demo: install
	$(BIN)/python -m fl run fl/configs/quickstart.toml --out "$(OUT)" --resume

test: install
	$(BIN)/python $(PYTEST) $(PYTEST_OPTIONS)

test-slow: install
	HYPOTHESIS_PROFILE=slow $(BIN)/python $(PYTEST) $(PYTEST_OPTIONS)

# The tests of the extra 'flower', which `make test` names as skipped without it; the import makes its absence an error here.
test-flower: install
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt '$(FLOWER)'
	$(BIN)/python -c 'import flwr, ray'
	$(BIN)/python -m pytest tests/fl/test_flower.py $(PYTEST_OPTIONS)

# Every instruction set this processor runs for memory, one for threads, whose code is the same in all.
sanitize:
	$(DRIVER) -B build/address -DQUPEDKERN_SANITIZE=address,undefined,float-cast-overflow
	$(CMAKE) --build build/address --parallel $(JOBS)
	$(DRIVER) -B build/thread -DQUPEDKERN_SANITIZE=thread
	$(CMAKE) --build build/thread --parallel $(JOBS) --target driver_baseline
	@for isa in $$(build/address/tests/native/driver_baseline isas); do \
	  echo "address, undefined: $$isa"; build/address/tests/native/driver_$$isa sweep || exit 1; \
	done
	@echo "thread: baseline"
	@TSAN_OPTIONS=die_after_fork=0 build/thread/tests/native/driver_baseline threads

# After a change that is meant: INSTRUCTIONS_OPTIONS=--update, and commit tests/native/instructions.json.
test-instructions:
	$(DRIVER) -B build/driver
	$(CMAKE) --build build/driver --parallel $(JOBS) --target driver_avx2
	$(PYTHON) tests/native/count_instructions.py build/driver/tests/native/driver_avx2 $(INSTRUCTIONS_OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

digits: install
	$(BIN)/python -m bench train digits

clean:
	rm -rf build *.egg-info qupedkern/_C_* qupedkern/_build_info.json $(VENV)/installed
