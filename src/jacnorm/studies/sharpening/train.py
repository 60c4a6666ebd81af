"""Training step of the `sharpening` study: one subcommand per experiment.

``python -m jacnorm.studies.sharpening.train descent --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.sharpening.train_descent import descent, images
from jacnorm.studies.sharpening.train_regularisers import regularisers
from jacnorm.studies.sharpening.train_scaling import scaling

if __name__ == "__main__":
    run({command.__name__: command for command in (descent, images, regularisers, scaling)})
