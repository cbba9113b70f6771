# Every target sets up .venv first when it is missing or older than pyproject.toml and constraints.txt.
# `make demo ARGS="--control"` and `make test ARGS="tests/moe -x"` hand ARGS on.

PYTHON ?=
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
SETUP_PYTHON = $(or $(PYTHON),python3.11 python3.12 python3.13 python3)

# An environment that was made in another folder is installed anew.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

.PHONY: help setup native demo test check docs bench clean

help:
	@echo "make setup   install unimoe and its tools in $(VENV)"
	@echo "make native  compile the C++ operators again (make setup does, where there is a compiler)"
	@echo "make demo    the whole path on real weights (ARGS=\"--control\" adds the dense control)"
	@echo "make test    the tests, four at a time (ARGS=\"tests/moe -n 8\")"
	@echo "make check   lint, format, spelling, types, import floors"
	@echo "make docs    the documentation, in build/site"
	@echo "make bench   the benchmarks"
	@echo "make clean   remove build/ and caches (not $(VENV), not runs/)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@found=; if ! $(PY) -c "import pip" 2>/dev/null; then \
	    for candidate in $(SETUP_PYTHON); do \
	        if $$candidate -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; then \
	            found=$$candidate; break; \
	        fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "unimoe: Python 3.11 or newer with its venv module is needed; tried: $(SETUP_PYTHON)." >&2; \
	        echo "        Install it (Debian: apt install python3-venv, macOS: brew install python@3.11)," >&2; \
	        echo "        or name one: make PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    echo "making $(VENV) with $$found"; \
	    $$found -m venv --clear $(VENV); \
	fi
	@echo "installing unimoe and its dependencies in $(VENV) (torch alone may be a download of some GB)"
	@$(PY) -m pip install --disable-pip-version-check -e ".[dev]" -c constraints.txt \
	    || { echo "unimoe: the installation failed, see above; the same command starts it again" >&2; exit 1; }
	@$(PY) -P -m unimoe.kernels.native >/dev/null \
	    || echo "        without it, a CPU trains and decodes in plain torch, which is slower"
	@echo "$(CURDIR)" > $(READY)

native: $(READY)
	@$(PY) -P -m unimoe.kernels.native

demo: $(READY)
	@$(PY) -P -m unimoe demo $(ARGS)

# The tests start many processes, so bytecode is kept, whatever PYTHONDONTWRITEBYTECODE says.
test: $(READY)
	@env -u PYTHONDONTWRITEBYTECODE $(PY) -P -m pytest -n 4 --dist worksteal $(ARGS)

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib
	@$(PY) tests/tools/link_view.py
	$(PY) -m pyright
	$(PY) -P -m pytest -q tests/test_floors.py

docs: $(READY)
	@$(PY) tests/tools/link_view.py
	$(PY) -m mkdocs build --strict $(ARGS)

bench: $(READY)
	@$(PY) -P benchmarks $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
