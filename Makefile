# The front door. `make help` lists the targets; the graph behind them is workflow/Snakefile.

# A new .venv is made with the first of these that is at least 3.11 and can make environments.
# Packages come as wheels for 3.11 to 3.13; a later python3 may have to compile some.
PYTHON ?= python3.11 python3.12 python3.13 python3
USABLE := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
INSTALL := no usable Python among '$(PYTHON)': install Python 3.11 or newer with its venv module \
	(Debian and Ubuntu: apt-get install python3-venv) or name one, make PYTHON=/path/to/python3

BIN := .venv/bin
PROFILE ?= local
GRAPH := $(BIN)/snakemake --snakefile workflow/Snakefile --profile workflow/profiles/$(PROFILE)
SNAKEMAKE := $(BIN)/python workflow/locked.py .cache/build.lock $(GRAPH)
EXPERIMENTS := $(BIN)/python -m amortised.experiments
# Values go to the shell through the environment, quoted; an empty one is wrong, it is not "all".
CHOSEN = $${STUDY+"$$STUDY"} $${ROW+"$$ROW"} $${SEED+--seed "$$SEED"}
define make_results
@results=$$($(EXPERIMENTS) prepare $(CHOSEN) --scale $(1)) || exit; \
	[ -z "$$results" ] || $(BIN)/python workflow/locked.py .cache/studies.lock $(GRAPH) $$results \
	$(OPTIONS) --rerun-triggers mtime --config device="$${DEVICE:-$(2)}"; code=$$?; \
	$(EXPERIMENTS) record $(CHOSEN) --scale $(1) && exit $$code
endef
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
CHAPTERS := $(basename $(notdir $(wildcard notebooks/[0-9]*.py)))
NB ?= $(CHAPTERS)
# $(call among,NAME,CHOICES) stops unless the value of NAME is one or several of the choices.
among = $(if $(strip $($(1))),,$(error $(1) is empty; choose among: $(2)))$(foreach \
	value,$($(1)),$(if $(filter-out $(2),$(value)),$(error $(1)=$(value) is none of: $(2))))
$(call among,PROFILE,$(notdir $(wildcard workflow/profiles/*)))

unexport PYTHONPATH PYTHONHOME
export PYTHONUTF8 := 1
.DEFAULT_GOAL := help
.PHONY: help book test soak site chapters notebooks smoke laptop full lab coursework grade chapter \
	bench lock clean environment pdf slides times

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

book: environment ## install, execute the chapters, build the site: whatever has changed
	@$(SNAKEMAKE) book
	@echo "The book is ready: file://$(CURDIR)/book/_build/html/index.html"

test: environment ## lint, unit tests, chapters at smoke size, committed outputs, site in a browser
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .
	@$(PYTEST) --numprocesses auto --ignore tests/test_site.py
	@$(PYTEST) --numprocesses auto --dist loadscope -o addopts= --nbval-lax --nbval-current-env \
		--nbval-sanitize-with tests/nbval_sanitize.cfg notebooks
	@$(SNAKEMAKE) book
	@$(PYTEST) --numprocesses auto --dist loadscope tests/test_site.py

site: book ## the same as book

chapters: environment ## execute the chapters that have changed, into book/chapters; SIZE=full for a GPU
	$(if $(filter undefined,$(origin SIZE)),,$(call among,SIZE,smoke full))
	@$(SNAKEMAKE) $(or $(SIZE),chapters)

notebooks: environment ## write their outputs into the committed pairs; NB=01_vi_recap for one
	$(call among,NB,$(CHAPTERS))
	@$(SNAKEMAKE) $(NB:%=book/chapters/%.ipynb)
	@for name in $(NB); do \
		cmp -s book/chapters/$$name.ipynb notebooks/$$name.ipynb || { \
		cp book/chapters/$$name.ipynb notebooks/.$$name.new && \
		mv notebooks/.$$name.new notebooks/$$name.ipynb && echo "updated notebooks/$$name.ipynb"; }; \
	done

soak: environment ## kill 200 processes and compare what they leave; grade submissions of all kinds
	@$(BIN)/python workflow/environment.py lab
	@$(PYTEST) --quiet -m soak tests/test_runs.py tests/test_training.py tests/test_coursework.py

smoke: environment ## execute the chapters with params/*.smoke.yaml, into book/_build/smoke
	@$(SNAKEMAKE) smoke

laptop: environment ## train and evaluate what is missing or stale at laptop scale; STUDY= ROW= SEED=
	$(call make_results,laptop,cpu)

full: environment ## the same at full scale, on DEVICE=cuda; PROFILE=slurm
	$(call make_results,full,cuda)

lab: environment ## JupyterLab with MyST and nbgrader, installed when first asked for
	@$(BIN)/python workflow/environment.py lab
	@JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab $(OPTIONS)

coursework: environment ## assignments in coursework/: release, source, answers; HIDDEN=folder of tests
	@$(BIN)/python workflow/coursework.py coursework $${HIDDEN:+--hidden "$$HIDDEN"}

grade: environment ## grade submissions with nbgrader; FOLDER= holds a folder for each student
	$(if $(FOLDER),,$(error FOLDER is empty; name the folder that holds a folder for each student))
	@$(BIN)/python workflow/environment.py lab
	@$(BIN)/python workflow/grade.py "$$FOLDER" coursework $${HIDDEN:+--hide "$$HIDDEN"}

chapter: environment ## begin a chapter from another: FROM=06_evaluation_hais TO=08_mine
	$(if $(FROM),,$(error FROM is empty; choose among: $(CHAPTERS)))
	$(if $(TO),,$(error TO is empty; name the new chapter, as in TO=08_mine))
	@$(BIN)/python workflow/new_chapter.py "$$FROM" "$$TO"
	@$(MAKE) --no-print-directory notebooks NB="$$TO"

bench: environment ## what annealing and training cost here, form by form; OPTIONS=--quick
	@$(BIN)/python workflow/bench.py $(OPTIONS)
	@$(BIN)/python workflow/bench_training.py

lock: environment ## renew requirements.lock and environment.yml; UPGRADE=1 for newest versions
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
		--generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-package torch \
		$(if $(UPGRADE),--upgrade) --output-file requirements.lock requirements.in pyproject.toml
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
		--generate-hashes --no-annotate --no-header --no-emit-index-url \
		--constraint requirements.lock $(if $(UPGRADE),--upgrade) \
		--output-file requirements-lab.lock requirements-lab.in
	@$(BIN)/python workflow/conda.py

clean: ## remove everything made here but the environment
	@rm -rf book/_build book/chapters .cache .snakemake .pytest_cache .ruff_cache

environment:
	@for python in $(PYTHON); do \
		$$python -c '$(USABLE)' 2>/dev/null && exec $$python workflow/environment.py; \
	done; echo "$(INSTALL)" >&2; exit 1

pdf: book ## the whole book as one PDF, printed with Chromium, in book/_build
	@$(BIN)/python workflow/pdf.py

slides: environment ## a deck of slides for each chapter, in slides/; NB=01_vi_recap for one
	$(call among,NB,$(CHAPTERS))
	@$(BIN)/python workflow/slides.py slides $(NB)

times: chapters ## note what the chapters took here, where their heads and README take it from
	@$(BIN)/python workflow/execution_table.py --record book/chapters/[0-9]*.json
