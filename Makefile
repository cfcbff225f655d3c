# `make demo` trains a small model on this machine and generates text with it; `make test` runs the fast tests.
# Both first install what they need into .venv, in the versions of constraints.txt.

FAMILY ?= leap
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# What `make demo` needs, and everything.
INSTALLED_TRAIN := $(VENV)/.installed-train
INSTALLED := $(VENV)/.installed
OUTPUT := outputs/$(FAMILY)-tiny

.PHONY: install demo judge test test-slow docs gpu conformance compat free-install mutants bench style format clean

install: $(INSTALLED)

# torch first, so that no other package installs another build of it.
$(INSTALLED_TRAIN): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(shell grep '^torch==' constraints.txt)
	$(PY) -m pip install -c constraints.txt -e .[train]
	touch $@

$(INSTALLED): $(INSTALLED_TRAIN)
	$(PY) -m pip install -c constraints.txt -e .[train,report,test,parity,axes,finetune,eval,deploy,app,serve,docs,notebooks]
	touch $@

# Options of all families, options of each, and the script that shows the result.
TRAIN := $(PY) training/train.py --train_minutes 3 --bf16_if_fast --max_validation_bytes 131072 \
	--learning_rate 3e-3 --lr_scheduler_type cosine --warmup_steps 0.05 --weight_decay 0.1 --adam_beta2 0.99 \
	--eval_on_start true --eval_strategy steps --eval_steps 0.3 --logging_steps 10 --save_strategy no
TRAIN_leap := --block_size 512 --per_device_train_batch_size 4 --per_device_eval_batch_size 8
TRAIN_heptapod := --per_device_train_batch_size 4 --per_device_eval_batch_size 16
TRAIN_hierarchical_lm := $(TRAIN_leap)
# Generated positions stay within those trained.
TRAIN_multigrid := --block_size 256 --per_device_train_batch_size 4 --per_device_eval_batch_size 16
SHOW_leap := training/sample.py
SHOW_heptapod := training/infill.py
SHOW_hierarchical_lm := training/sample.py
SHOW_multigrid := training/sample_axes.py

demo: $(INSTALLED_TRAIN)
	$(TRAIN) $(TRAIN_$(FAMILY)) --config_name configs/$(FAMILY)-tiny --output_dir $(OUTPUT)
	$(PY) $(SHOW_$(FAMILY)) $(OUTPUT)

# A second LEAP with another seed, by which tests/benchmarks/bench_grid_generation.py scores pages.
judge: $(INSTALLED_TRAIN)
	$(TRAIN) $(TRAIN_leap) --config_name configs/leap-tiny --output_dir outputs/leap-judge --seed 1

# A process per core with one thread each (tests/conftest.py); the tests of a file share fixtures.
PYTEST := $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: $(INSTALLED)
	$(PYTEST) $(if $(SLOW),-m slow)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# The pages in docs/, built into build/docs without the network; generated parts and links are checked.
docs: $(INSTALLED)
	$(PY) docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

# On a CUDA device, with PYTHON; `make gpu QUICK=1` uses Triton's interpreter on a CPU.
gpu:
	PYTHON=$(PYTHON) tests/gpu/run.sh $(if $(QUICK),--quick)

conformance: $(INSTALLED)
	$(PYTEST) tests/conformance

# One suite with each version of Transformers: `make compat VERSIONS="5.17.0 newest"`. Environments are kept in .compat.
VERSIONS ?= oldest 5.20.2 5.22.2 5.23.0 newest

compat: $(INSTALLED)
	$(PY) tests/compat/run_versions.py --versions $(VERSIONS)

# The wheel with dependencies chosen by pip, except torch.
free-install: $(INSTALLED)
	$(PY) tests/compat/free_install.py

# Apply each defect of tests/mutations.toml to a copy of the tree, and list those that no test detects. For example
# `make mutants MUTANTS="focus.py --shard 1/4"`.
mutants: $(INSTALLED)
	$(PY) tests/run_mutants.py $(MUTANTS)

bench: $(INSTALLED)
	$(PY) tests/benchmarks/run_all.py

style: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) .compat outputs *.egg-info .mypy_cache .pytest_cache .ruff_cache
