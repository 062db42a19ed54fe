# make demo    sets everything up, trains an event extractor, extracts events from new sentences and scores them;
#              then finds the classes of an output layer that no input can produce
# make test    sets everything up and runs the tests
# make bench   sets everything up and runs the benchmarks
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
SOURCES := $(shell find csrc kernels -type f -not -name '*.py' -not -name '*.pyc') \
           CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: demo test bench clean

demo: $(VENV)/ready-run
	$(RUN) examples/event_extraction.py
	$(RUN) examples/dead_classes.py

test: $(VENV)/ready-test
	$(RUN) -m pytest -q

bench: $(VENV)/ready-bench
	$(RUN) -m pytest benchmarks -q

# The install is editable, so only native sources and the build's own files ask for a new one.
$(VENV)/ready-run: EXTRA := [demo]
$(VENV)/ready-test: EXTRA := [test]
$(VENV)/ready-bench: EXTRA := [bench]
$(VENV)/ready-%: $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt -e ".$(EXTRA)"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info supy/_C.*
