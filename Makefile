# make demo: install, generate data, train, evaluate, draw. make search-demo: the same with an
# architecture search. make test: install and run the tests.

PYTHON ?= python3
VENV ?= .venv
# The versions that the project is tested with; any torch from 2.6 on will do.
TORCH ?= torch==2.14.1 torchvision==0.29.1

BIN := $(VENV)/bin
DEMO := configs/demo/nas_fcos.yaml
SEARCH_DEMO := configs/nas/demo.yaml

.PHONY: install demo search-demo test lint clean

# Handed to the shell as a variable, for it may hold quotes and comparisons.
export MADE_WITH := $(PYTHON) $(TORCH)
GIVEN := $(filter-out file,$(origin PYTHON) $(origin TORCH))

install: $(VENV)/.installed
	@[ -z '$(GIVEN)' ] || [ "$$(cat $(VENV)/.torch)" = "$$MADE_WITH" ] || { \
		echo "$(VENV) was made with $$(cat $(VENV)/.torch). To make it anew with $$MADE_WITH," \
			"put clean before install; to keep it, leave out PYTHON and TORCH."; exit 1; }

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet $(TORCH) "setuptools>=64" wheel ninja
	@printf '%s\n' "$$MADE_WITH" > $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml $(shell find csrc -type f)
	$(BIN)/pip install --disable-pip-version-check --quiet --no-build-isolation -e ".[test]"
	@touch $@

demo: install
	$(BIN)/python tools/make_demo_data.py --output datasets/demo
	$(BIN)/python tools/train_net.py --config-file $(DEMO) --resume DATASETS.ROOT datasets
	$(BIN)/python tools/predict.py --config-file $(DEMO) \
		--input datasets/demo/val --output output/demo/pictures DATASETS.ROOT datasets
	@echo "Detections: output/demo/pictures  Curves: output/demo/training.png"

search-demo: install
	$(BIN)/python tools/make_demo_data.py --output datasets/demo
	$(BIN)/python tools/search_net.py --config-file $(SEARCH_DEMO) --resume DATASETS.ROOT datasets
	@echo "Found: output/nas/demo/best.yaml  Report: output/nas/demo/report/report.html"

# Two at a time, with a thread each; threads that wait must leave the core to the other one.
test: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info nasfcos/*.so
