"""Measuring step of the `worldmodel` study: one subcommand per experiment.

``python -m jacnorm.studies.worldmodel.measure pendulum --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.worldmodel.measure_dreamer import dreamer
from jacnorm.studies.worldmodel.measure_expansion import expansion
from jacnorm.studies.worldmodel.measure_pendulum import pendulum

if __name__ == "__main__":
    run({command.__name__: command for command in (expansion, pendulum, dreamer)})
