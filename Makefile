# Every task is one word; CI calls the same words. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test parity harm trust mutants audit bench dist docs format lint types doctest check clean

help:  ## list the tasks
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## create the environment and install the package with all it needs

# setuptools stays below 81 for Cockpit, so the build must not fetch its own.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools==80.10.2' wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-c constraints.txt -e '.[docs,examples,test]'
	@# A torchvision that does not fit this torch breaks Lightning and Transformers, which import it if it is there.
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	@touch $@

demo: install  ## train from three initial rates, say what alpha did, save a picture (ARGS="--data PATH")
	$(BIN)/python -m examples.demo $(ARGS)

test: install  ## run the tests and the examples in the docstrings
	$(BIN)/python -m pytest $(ARGS)

parity: install  ## compare with Cockpit, all cases, and print the table (ARGS="--dtype float32")
	$(BIN)/python -m tests.parity $(ARGS)

harm: install  ## does steering make a run worse? a table of situations, bare and steered (ARGS="--only Nan")
	$(BIN)/python -m tests.harm $(ARGS)

trust: install  ## random cases, hostile numbers, faults: what is lost? about 20 minutes (ARGS="--cases 10000 --kills 100")
	$(BIN)/python -m tests.trust $(ARGS)

bench: install  ## measure what alpha costs on this machine
	$(BIN)/python -m examples.benchmarks.cost $(ARGS)

# mutmut is installed here only: nothing else needs it.
mutants: install  ## change the code in small ways, one at a time, and see which the tests do not notice; hours (ARGS="'alpha_optim.alpha*'")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mutmut
	OMP_NUM_THREADS=1 $(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

# Asks PyPI, so it needs the network; what could not be looked up is an error, too.
audit: install  ## look for known vulnerabilities in the versions that CI installs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pip-audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# A folder of its own for everything: nothing of the sources is importable where the wheel is tried.
dist: install  ## build wheel and sdist, install each in an environment of its own, try it from another folder
	rm -rf dist build
	$(BIN)/python -m build --no-isolation --outdir dist
	set -e; for file in dist/*.whl dist/*.tar.gz; do \
		folder=$$(mktemp -d); \
		$(PYTHON) -m venv $$folder/env; \
		$$folder/env/bin/pip install --quiet --disable-pip-version-check 'setuptools==80.10.2' wheel; \
		$$folder/env/bin/pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt $$file; \
		cp tests/installed.py $$folder; \
		(cd $$folder && env/bin/python installed.py $(CURDIR)); \
		rm -rf $$folder; \
	done

docs: install  ## build the documentation into site/, warnings are errors (ARGS="--site-dir FOLDER")
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)

format: install  ## format the code
	$(BIN)/ruff format .

lint: install  ## check format, style and docstrings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install  ## check the types
	$(BIN)/mypy

doctest: install  ## run the examples in the docstrings alone
	$(BIN)/python -m pytest alpha_optim $(ARGS)

check: lint types test docs audit  ## format, lint, types, tests, the site, known vulnerabilities

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist out site mutants *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
