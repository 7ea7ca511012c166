# Two commands: `make demo` and `make test`. Both make the virtual environment that they need.
#
#   PYTHON=python3.12          another interpreter (3.11 or newer)
#   VENV=/path/to/venv         another place for the environment
#   JAX_FLASHMLA_CUDA=on|off   build the CUDA kernels or not; default: where there is an NVIDIA GPU

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
NATIVE_SOURCES := $(shell find cuda -name '*.cu*' -o -name '*.cc' -o -name '*.h')
SETUP := pyproject.toml CMakeLists.txt $(wildcard tools/*.py) $(NATIVE_SOURCES)

.PHONY: demo test test-oldest test-bazel example example-quick lint format docs notebook wheel bench figures clean

demo: $(VENV)/ready
	@$(RUN) examples/decode_loop.py

test: $(VENV)/ready
	@$(RUN) -m pytest

# The same with the oldest jax that is supported, in an environment of its own.
test-oldest:
	@JAX_RANGE=oldest $(MAKE) --no-print-directory test VENV=$(VENV)-oldest

# The tests under Bazel, without kernels; see docs/bazel.md.
test-bazel: $(VENV)/ready
	@JAX_FLASHMLA_PYTHON=$(abspath $(RUN)) bazel test //... --config=nocuda

# The model of examples/deepseek: its tests, and one trained for a minute on this repository's text.
# Compared with PyTorch's where that is installed.
example: $(VENV)/ready-for-example
	@$(RUN) -m pytest examples/deepseek/tests
	@$(RUN) -m examples.deepseek.train_tiny build/deepseek_tiny
	@printf 'The pool is\nWhat bounds a decode\n' | $(RUN) -m examples.deepseek.chat --complete \
	  --model build/deepseek_tiny --dtype float32 --max-new-tokens 60 --seed 0 --temperature 0.3
	@$(RUN) -m examples.deepseek.bench --tiny --out build/deepseek_tiny

# Those of its tests that take seconds: configuration, loading, the program of its README, what a mesh
# exchanges, pages and the engine. They need less than the extra `example` has.
QUICK := config rope weights readme mesh pages engine engine_trouble runner sampling soak
example-quick: $(VENV)/ready
	@$(RUN) -m pip install --quiet --disable-pip-version-check flax safetensors tokenizers
	@$(RUN) -m pytest $(QUICK:%=examples/deepseek/tests/%_test.py) -k 'not against_one_device'

lint: $(VENV)/ready-for-lint
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE_SOURCES)
	@$(RUN) -m benchmarks.tables --check
	@$(RUN) -m benchmarks.figures --check
	@$(RUN) -m benchmarks.bars --check

format: $(VENV)/ready-for-lint
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(NATIVE_SOURCES)

# The documentation, in build/docs/.
docs: $(VENV)/ready-for-docs
	@$(RUN) -m sphinx -q -W --keep-going docs build/docs
	@echo build/docs/index.html

# Runs the notebook and keeps its outputs.
notebook: $(VENV)/ready-for-notebook
	@$(VENV)/bin/jupyter execute --inplace notebooks/mla_decode.ipynb

# A wheel with the kernels, for the interpreter PYTHON, in dist/.
wheel: build/wheel-venv-$(subst /,-,$(PYTHON))/ready
	@mkdir -p dist
	@JAX_FLASHMLA_CUDA=on $(dir $<)bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

# What this machine can measure; the JSON goes to benchmarks/results/.
bench: $(VENV)/ready
	@$(RUN) -m benchmarks.xla_decode
	@$(RUN) -m benchmarks.fp8_accuracy
	-@$(RUN) -m benchmarks.planner
	@$(RUN) -m benchmarks.decode
	-@$(RUN) -m benchmarks.step
	-@$(RUN) -m benchmarks.layouts
	-@$(RUN) -m benchmarks.fp8
	-@$(RUN) -m benchmarks.sharded

# README.md's tables and the pictures, from the JSON.
figures: $(VENV)/ready-for-figures
	@$(RUN) -m benchmarks.tables
	@$(RUN) -m benchmarks.figures
	@$(RUN) -m benchmarks.bars

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist .bazel bazel-out

$(VENV)/ready: $(SETUP)
	@command -v $(PYTHON) >/dev/null || { echo "jax_flashmla: Python 3.11 or newer is needed, \
	and there is no '$(PYTHON)': install it, or run make with PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) tools/setup_env.py $(VENV) demo,test
	@touch $@

# What an extra of pyproject.toml names.
$(VENV)/ready-for-%: $(VENV)/ready
	@$(RUN) -m pip install --quiet --disable-pip-version-check $$($(RUN) -c \
	  'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"])')
	@touch $@

build/wheel-venv-%/ready:
	@$(PYTHON) -m venv $(dir $@)
	@$(dir $@)bin/python -m pip install --quiet --upgrade 'pip>=25'
	@touch $@
