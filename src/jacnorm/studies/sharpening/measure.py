"""Measuring step of the `sharpening` study: one subcommand per experiment.

``python -m jacnorm.studies.sharpening.measure descent --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.sharpening.measure_descent import descent, images
from jacnorm.studies.sharpening.measure_regularisers import regularisers
from jacnorm.studies.sharpening.measure_scaling import scaling

if __name__ == "__main__":
    run({command.__name__: command for command in (descent, images, regularisers, scaling)})
