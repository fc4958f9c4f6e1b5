PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv train test lint types pages docs notebooks gpu clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The run lies in runs/quick, its evaluation in runs/quick-evaluation; those before are replaced.
train: venv
	rm -rf runs/quick runs/quick-evaluation
	$(BIN)/python train_meta.py quick --out runs/quick
	$(BIN)/python eval_meta.py runs/quick --out runs/quick-evaluation

test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

# Pages of the results, and tables of other pages, from results/
pages: venv
	$(BIN)/python -m benchmarks.pages

# The pages, in docs/_build/html; a warning is an error
docs: venv
	PYTHONPATH=. $(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

# The tutorials as notebooks, beside their scripts
notebooks: venv
	$(BIN)/python docs/notebooks.py

# As it is installed, without an environment of its own; with data: make gpu DATA=folder
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --out runs/gpu $(if $(DATA),--data-root $(DATA))

clean:
	rm -rf $(VENV) runs build docs/_build docs/reference docs/tutorials *.egg-info
