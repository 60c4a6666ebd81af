# jacnorm: two commands, `make reproduce` and `make test`. `make` alone lists them all.
# Written for GNU make 3.81 and BSD tools, so that macOS runs it as it is.

SCALE = smoke
STUDY =
CORES = all
CONFIG =
PYTHON =
ARGS =

SHELL = /bin/sh
# One thread per process: jobs run side by side, and results stay the same bits.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export OPENBLAS_NUM_THREADS = 1

# The environment carries the checksum of what it was made from, and of the folder it stands in (it cannot be moved).
LOCKS = requirements/build.txt requirements/base.txt requirements/dev.txt requirements/torch.txt
READY := .venv/.ready-$(shell { pwd; cat $(LOCKS) requirements/install.sh; } | cksum | cut -d ' ' -f 1)

IN_VENV = PATH="$$PWD/.venv/bin:$$PATH"
RESULTS = results/$(SCALE)
SELECT = --config scale=$(SCALE) $(if $(STUDY),'only=[$(STUDY)]') $(if $(CONFIG),--configfile $(CONFIG))
# Mistakes in the user's own file are told before Snakemake reads it; that file may also name another results folder.
USE = $(IN_VENV) python -m jacnorm.config --scale $(SCALE) $(if $(CONFIG),--file $(CONFIG))
CHECK = $(if $(CONFIG),$(USE),:)
FOLDER = $(USE) --folder
SNAKEMAKE = $(IN_VENV) snakemake --cores $(CORES) --rerun-incomplete $(SELECT) $(ARGS)

.PHONY: help set-up reproduce plan report test lint bench verify clean lock

help:
	@echo 'make reproduce   run the studies, judge every claim, write the report'
	@echo 'make plan        say what reproduce would run, and run nothing'
	@echo 'make report      bring the report of a scale up to date'
	@echo 'make test        run the tests'
	@echo 'make lint        check style, the rules and the direction of imports'
	@echo 'make bench       compare the speed of the Jacobian measurements with other libraries'
	@echo 'make verify      run smoke twice and compare every table bit for bit'
	@echo 'make clean       delete the results of a scale and the caches'
	@echo 'make set-up      only make .venv, which the other targets do by themselves'
	@echo 'make lock        resolve the dependencies again and write requirements/'
	@echo
	@echo 'Options, with their defaults:'
	@echo '  SCALE=smoke    or laptop, paper'
	@echo '  STUDY=         all; or one, for example STUDY=stability'
	@echo '  CORES=all      how many jobs run at once'
	@echo '  CONFIG=        a YAML file of your own settings, laid over those of the scale'
	@echo '  PYTHON=        the Python 3.11-3.13 to make .venv with (default: the first one found)'
	@echo '  TORCH_ARGS=    options of pip for torch, for example an index of CPU builds'
	@echo '  ARGS=          options handed on to snakemake, pytest, the benchmark or the lock'

set-up: $(READY)

$(READY):
	@TORCH_ARGS='$(TORCH_ARGS)' requirements/install.sh '$@' '$(PYTHON)'

reproduce: $(READY)
	@$(CHECK)
	@$(IN_VENV) python -m jacnorm.unlock
	@$(SNAKEMAKE) || { code=$$?; [ $$code = 2 ] || echo 'Not finished. The same command goes on from here.' >&2; exit $$code; }
	@$(IN_VENV) python -m jacnorm.report.terminal "$$($(FOLDER))"

plan: $(READY)
	@$(CHECK)
	@text=`$(SNAKEMAKE) --dry-run --quiet rules reason host` || { code=$$?; printf '%s\n' "$$text" >&2; exit $$code; }; printf '%s\n' "$$text" | $(IN_VENV) \
	python -m jacnorm.plan --scale $(SCALE) $(if $(STUDY),--only $(STUDY)) $(if $(CONFIG),--config $(CONFIG))

report: $(READY)
	@$(CHECK)
	@$(IN_VENV) python -m jacnorm.unlock
	@$(SNAKEMAKE) -- report
	@echo "Report: $$($(FOLDER))/report/index.html"

test: $(READY)
	@$(IN_VENV) python -m pytest $(ARGS)

lint: $(READY)
	@$(IN_VENV) ruff check
	@$(IN_VENV) ruff format --check
	@$(IN_VENV) snakefmt --check Snakefile workflow
	@$(IN_VENV) lint-imports

bench: $(READY)
	@$(IN_VENV) python -m benchmarks.jacobian $(ARGS)

verify: $(READY)
	@$(IN_VENV) python -m jacnorm.verify --cores $(CORES)

clean:
	$(if $(filter smoke laptop paper,$(SCALE)),,$(error SCALE=$(SCALE) is none of smoke, laptop, paper))
	rm -rf $(RESULTS) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

lock: $(READY)
	@$(IN_VENV) python requirements/lock.py $(ARGS)
