"""Training step of the `worldmodel` study: one subcommand per experiment.

``python -m jacnorm.studies.worldmodel.train pendulum --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.worldmodel.train_dreamer import dreamer
from jacnorm.studies.worldmodel.train_pendulum import pendulum

if __name__ == "__main__":
    run({command.__name__: command for command in (pendulum, dreamer)})
