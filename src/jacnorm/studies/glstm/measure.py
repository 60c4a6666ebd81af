"""Measuring step of the `glstm` study: one subcommand per experiment.

``python -m jacnorm.studies.glstm.measure nar --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.glstm.measure_recall import nar, narr
from jacnorm.studies.glstm.measure_trees import trees

if __name__ == "__main__":
    run({command.__name__: command for command in (trees, nar, narr)})
