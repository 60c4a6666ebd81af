"""Training step of the `fedgtst` study: one subcommand per experiment.

``python -m jacnorm.studies.fedgtst.train federated --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.fedgtst.train_federated import domains, federated, images

if __name__ == "__main__":
    run({command.__name__: command for command in (federated, images, domains)})
