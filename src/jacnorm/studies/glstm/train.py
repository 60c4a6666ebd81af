"""Training step of the `glstm` study: one subcommand per experiment.

``python -m jacnorm.studies.glstm.train nar --help`` documents the options.
"""

from __future__ import annotations

from jacnorm.step import run
from jacnorm.studies.glstm.train_gpp import gpp
from jacnorm.studies.glstm.train_peptides import peptides
from jacnorm.studies.glstm.train_recall import nar, narr
from jacnorm.studies.glstm.train_ring import ring

if __name__ == "__main__":
    run({command.__name__: command for command in (nar, narr, gpp, ring, peptides)})
