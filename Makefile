# Every target sets up what it needs and remembers it, so that a second run starts at once.
#   make test     lint, build and test: what the continuous integration runs
#   make demo     run the demonstration; the report lands in out/
#   make docs     build the documentation into out/docs
#   make build    compile the extension in place, with CUDA kernels where nvcc is
#   make lint     check style and types;  make format  rewrite to the style
#   make clean    remove what was built, not the environment
# An active virtual environment is used as it is, otherwise .venv is made. TORCH is the requirement to install
# where no torch is importable yet, with pip's options if it needs any: make TORCH='torch==2.13.0' test
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
TORCH ?= torch==2.13.0
ARGS ?=

export PATH := $(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.PHONY: test demo docs build lint format clean setup

STAMPS := build/stamps
# The environment and the switches are part of the name: another torch or switch means another build.
BUILT := $(STAMPS)/build$(subst /,-,$(VENV))$(NEARFIELD_CUDA)$(subst ;,-,$(NEARFIELD_CUDA_ARCHS))$(subst ;,-,$(NEARFIELD_FAMILIES))
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cuh csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.def \
                  include/nearfield/*.h include/nearfield/*.cuh)
PYTHON_FILES := $(shell find python tests bench docs examples setup.py -name '*.py' -o -name '*.pyi' 2>/dev/null)

test: lint build
	python -m pytest $(ARGS)

demo: build
	python -m nearfield.demo $(ARGS)

docs: build
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	@echo out/docs/index.html

setup: $(VENV)/nearfield.stamp
build: $(BUILT)
lint: $(STAMPS)/lint

$(VENV)/nearfield.stamp: .ci/setup pyproject.toml
	@.ci/setup '$(VENV)' '$(TORCH)'
	@touch $@

# One build at a time may write into python/nearfield, so an older build's stamp goes.
$(BUILT): $(VENV)/nearfield.stamp setup.py CMakeLists.txt csrc/instance.cu.in $(CPP)
	python setup.py -q build_ext --inplace
	@mkdir -p $(STAMPS) && rm -f $(STAMPS)/build* && touch $@

$(STAMPS)/lint: $(VENV)/nearfield.stamp pyproject.toml .clang-format $(PYTHON_FILES) $(CPP)
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(filter-out %.def,$(CPP))
	@mkdir -p $(STAMPS) && touch $@

format: $(VENV)/nearfield.stamp
	ruff check --fix .
	ruff format .
	clang-format -i $(filter-out %.def,$(CPP))

clean:
	rm -rf build out python/nearfield/*.so python/*.egg-info
