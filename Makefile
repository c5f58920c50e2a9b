# make demo: set up and run the main job.  make test: set up, lint, type-check and test, on all cores.
# make quick: lint, types and the tests that compile no network, in a minute.  make docs: the documentation, in site/.
# make fuzz COUNT=2000 SEED=0: random networks, compiled and compared with onnxruntime.
# make faults COUNT=200 SEED=0: kills at random moments, full disks, damaged caches.  make soak COUNT=300: does it grow?
# make mutants COUNT=30 SEED=0: changes of the sources that a test should catch, so many in each of four folders.
# make hashes: the hashes of what constraints.txt names, after a change of it or of the dependencies; it asks the index.
# make audit: are flaws known of the packages that constraints.txt names?  It asks the package index.
# make install-test: the release in empty environments with the lowest and the newest versions, and the code of the pages
# on deployment in a browser and in C++; it installs packages.
# make report: report pages of a few networks and screenshots of them, in build/report; needs Chromium.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready
# one torch thread for each of as many processes as there are cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --durations 10
UNITS := tests/allocation/solver tests/allocation/test_budget.py tests/benchmarks tests/frontend tests/ir \
    tests/maths tests/pass_manager tests/test_import_law.py

.PHONY: demo test quick units lint docs report install-test fuzz faults soak mutants audit hashes clean
fuzz: COUNT ?= 2000
faults: COUNT ?= 200
soak: COUNT ?= 300
mutants: COUNT ?= 30
SEED ?= 0
UV := 0.13.9
NOT_HASHED := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
    cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

demo: $(READY)
	$(BIN)/hawqfx demo

test: lint
	$(PYTEST)

quick: $(READY)
	$(MAKE) --no-print-directory --jobs 2 lint units

units: $(READY)
	$(PYTEST) $(UNITS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# every package by its hash but torch, of which each index has builds of its own
$(READY): pyproject.toml constraints.txt hashes.txt
	@echo "setting up .venv, once: some minutes, and 2 GB of disk"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement hashes.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

hashes:
	$(PYTHON) -m venv build/hashes
	build/hashes/bin/python -m pip install --quiet uv==$(UV)
	build/hashes/bin/uv pip compile pyproject.toml --extra dev --constraint constraints.txt --universal --generate-hashes \
	    --no-annotate --no-header --quiet $(NOT_HASHED:%=--no-emit-package %) --output-file hashes.txt

docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

install-test: $(READY)
	$(BIN)/python -m pip install --quiet uv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/installs/environments.py tests/installs/deployed.py

report: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.report.pictures

fuzz: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --count $(COUNT) --seed $(SEED)

faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.run --count $(COUNT) --seed $(SEED)

soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak --count $(COUNT)

# tools that the package does not need have environments of their own, in build/
mutants: $(READY)
	$(PYTHON) -m venv build/mutants
	build/mutants/bin/python -m pip install --quiet cosmic-ray==8.7.0
	build/mutants/bin/python tests/mutants.py --count $(COUNT) --seed $(SEED) --python $(BIN)/python

# strict: a package that the index does not tell of is a failure, and not one without flaws
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement constraints.txt

clean:
	rm -rf .venv demo site
