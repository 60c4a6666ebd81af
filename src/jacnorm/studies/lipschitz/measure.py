"""Measuring step of the `lipschitz` study: one subcommand per experiment.

``python -m jacnorm.studies.lipschitz.measure depth --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.lipschitz.measure_depth import depth
from jacnorm.studies.lipschitz.measure_regulariser import paired, table
from jacnorm.studies.lipschitz.measure_residual import residual

if __name__ == "__main__":
    run({command.__name__: command for command in (depth, residual, paired, table)})
