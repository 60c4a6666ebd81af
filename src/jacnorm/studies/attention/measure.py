"""Measuring step of the `attention` study: one subcommand per experiment.

``python -m jacnorm.studies.attention.measure probing --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.attention.measure_probing import probing
from jacnorm.studies.attention.measure_synthetic import synthetic

if __name__ == "__main__":
    run({command.__name__: command for command in (probing, synthetic)})
