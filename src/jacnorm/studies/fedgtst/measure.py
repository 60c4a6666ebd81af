"""Measuring step of the `fedgtst` study: one subcommand per experiment.

``python -m jacnorm.studies.fedgtst.measure federated --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.fedgtst.measure_bounds import bounds
from jacnorm.studies.fedgtst.measure_engines import engines
from jacnorm.studies.fedgtst.measure_federated import domains, federated, images

if __name__ == "__main__":
    run({command.__name__: command for command in (bounds, engines, federated, images, domains)})
