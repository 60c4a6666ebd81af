"""A small invented study with every kind of verdict, written to a folder as a real one would be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from jacnorm.files import Column, write_table
from jacnorm.report.manifest import Caption, DataUsed, Departure, Setting, StudyManifest, write_captions, write_manifest
from jacnorm.report.verdicts import Accounting, NotTested, Quantity, judge_study, write_verdicts

HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"

CLAIMS = """
study: sample
paper:
  title: On the Norm of Invented Jacobians & Other <Matrices>
  authors: A. Author, B. Writer
  arxiv: "2506.08764"
  versions: v1 and v2 were read; v2 adds a figure.
claims:
  - id: C1
    statement: Away from criticality the norm of the Jacobian is exponential in the depth of the network.
    source: Fig. 1 left
    evidence: published
    expected_at: [smoke, laptop, paper]
    estimand: slopes
    published: {value: 0.347, unit: nats per layer, source: Fig. 1}
    criteria:
      - {id: slope, quantity: Slope of the log-norm minus its theory, unit: nats per layer,
         direction: within, low: -0.04, high: 0.04}
      - {id: sign, quantity: Share of seeds whose two slopes have opposite signs, unit: "",
         direction: above, margin: 0.5, interval: binomial}
    evidence_tables: [depth]
  - id: C2
    statement: At the critical variance the norm stays put.
    source: Fig. 1 right
    evidence: second-hand
    expected_at: [smoke, laptop, paper]
    estimand: flat
    published: null
    criteria:
      - {id: flat, quantity: Slope of the log-norm, unit: nats per layer, direction: below, margin: 0.01}
    evidence_tables: [depth]
  - id: C3
    statement: "HOSTILE"
    source: Main theorem
    evidence: reconstructed
    expected_at: [smoke, laptop, paper]
    estimand: ratio
    published: null
    note: The limit is reached slowly, so the margin is wide.
    criteria:
      - {id: ratio, quantity: Ratio of the norm to its limit, unit: "",
         direction: within, low: 0.85, high: 1.08, interval: bootstrap}
      - {id: bracket, quantity: Rows outside the bracket, unit: rows,
         direction: below, margin: 0, interval: exact, decides: false}
    evidence_tables: [limit]
  - id: C4
    statement: Pruning without rescaling makes the Jacobian vanish.
    source: Section 4
    evidence: second-hand
    expected_at: [smoke, laptop, paper]
    estimand: vanish
    published: null
    criteria:
      - {id: log-norm, quantity: Log-norm at depth 50, unit: nats, direction: below, margin: -10}
      - {id: gain, quantity: Norm with correlated weights over norm without, unit: "", direction: above, margin: 100}
    evidence_tables: [depth, limit]
  - id: C5
    statement: Training leaves the norm as it was.
    source: Section 5
    evidence: published
    expected_at: [laptop, paper]
    estimand: training
    published: {value: null, source: text only}
    criteria:
      - {id: shift, quantity: Change of the log-norm, unit: nats, direction: within, low: -1, high: 1}
    evidence_tables: [drift]
  - id: C6
    statement: Second-moment scaling is not enough for gradient scores.
    source: beyond the paper
    evidence: reconstructed
    extension: true
    expected_at: [laptop, paper]
    estimand: gradient
    published: null
    criteria:
      - {id: explodes, quantity: Log-norm at depth 30, unit: nats, direction: above, margin: 10}
    evidence_tables: [limit]
""".replace("HOSTILE", HOSTILE)


def spread(centre: float, sd: float, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(centre, sd, n)


def estimands() -> dict[str, object]:
    """The functions that a judge module would hold."""
    ten, seeds = Accounting.all_finished(10, "networks"), list(range(10, 20))
    short = Accounting(planned=10, finished=7, diverged=2, excluded={"width below 64": 1}, what="networks")
    three = Accounting.all_finished(3, "draws")
    ratios, gains = spread(0.87, 0.05, 12, 4), np.exp(spread(12, 1.0, 20, 6))
    vanishing = np.where(np.arange(10) < 2, -np.inf, spread(-56, 4, 10, 5))
    return {
        "slopes": lambda tables, settings: [
            Quantity("slope", "variance 1", spread(0.006, 0.012, 10, 1), ten, reference=-0.347, seeds=seeds),
            Quantity("slope", "variance 4", spread(0.011, 0.014, 10, 2), ten, seeds=seeds),
            Quantity("sign", "", np.ones(10), ten, statistic="proportion"),
        ],
        "flat": lambda tables, settings: [Quantity("flat", "width 64", spread(0.031, 0.006, 7, 3), short)],
        "ratio": lambda tables, settings: [
            Quantity("ratio", f"{HOSTILE[:24]} m = 3", ratios, Accounting.all_finished(12), "geometric mean"),
            Quantity("bracket", "all rows", [0], Accounting.all_finished(1, "table")),
        ],
        "vanish": lambda tables, settings: [
            Quantity("log-norm", "sparsity 0.9", vanishing, ten, seeds=seeds),
            Quantity("gain", "exponent 0.5", gains, Accounting.all_finished(20, "draws"), "geometric mean"),
            Quantity("gain", "exponent 0.75", [250.0, 300.0, 90.0], three, "geometric mean"),
        ],
        "training": lambda tables, settings: NotTested("never called, because its table is missing"),
        "gradient": lambda tables, settings: [Quantity("explodes", "SNIP", spread(22, 3, 10, 7), ten)],
    }


def write_study(results: Path, scale: str = "smoke") -> Path:
    """Write tables, figures, captions, manifest and verdicts below `results`/sample; returns that folder."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder = results / "sample"
    (folder / "figures").mkdir(parents=True)
    columns = {
        "seed": Column("seed of the network"),
        "depth": Column("number of layers", "layers"),
        "log_norm": Column("natural logarithm of the spectral norm of the input-output Jacobian", "nats"),
    } | {f"wide_column_number_{i}": Column("one of many columns, so that the table must scroll", "1") for i in range(9)}
    for first, last in ((10, 14), (15, 19)):
        rows = pd.DataFrame(
            [{"seed": s, "depth": d, "log_norm": 0.01 * d * s} for s in range(first, last + 1) for d in (1, 10, 50)]
        )
        write_table(
            folder / "tables" / f"depth-s{first}-{last}.parquet",
            rows.assign(**{n: 1.0 for n in columns if n.startswith("wide")}),
            columns,
        )
    limit = pd.DataFrame({"m": [1, 3, 10], "limit": [2.0, 3.0792, -np.inf]})
    write_table(
        folder / "tables" / "limit.parquet", limit, {"m": Column("factors"), "limit": Column("limit of the norm")}
    )
    for name in ("depth", "limit"):
        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        axes.plot([1, 10, 50], [0.0, 1.0, 5.0], label="$\\sigma_w^2 = 4$")
        axes.set(xlabel="depth", ylabel="log norm")
        axes.legend()
        for kind in ("svg", "png"):
            figure.savefig(folder / "figures" / f"{name}.{kind}")
        plt.close(figure)
    write_captions(
        folder / "figures" / "captions.json",
        {
            "depth": Caption(
                title="Norm against depth",
                caption="Mean over 10 seeds; bands are 95 % intervals.",
                claims=["C1", "C2"],
                tables=["depth"],
            ),
            "limit": Caption(
                title="Distance from the limit",
                caption=f"Wider is nearer. {HOSTILE}",
                claims=["C3"],
                tables=["limit"],
                alt="A rising line.",
            ),
        },
    )
    write_manifest(
        folder / "manifest.json",
        StudyManifest(
            settings=[
                Setting(
                    key="depth.widths", value=[64, 128, 256], unit="neurons", description="Widths of the hidden layers."
                ),
                Setting(key="depth.device", value="auto", description="Where the networks are measured."),
                Setting(key="depth.scaled", value=None),
            ],
            departures=[
                Departure(paper="Three runs.", ours="Ten seeds.", why="Three runs give no interval worth reading.")
            ],
            data=[DataUsed(label="digits", digest="ab" * 32, source="scikit-learn")],
        ),
    )
    claims = results / "claims.yaml"
    claims.write_text(CLAIMS, encoding="utf-8")
    from jacnorm.report.tables import read_tables

    verdicts = judge_study(claims, estimands(), read_tables(folder / "tables"), None, scale)
    write_verdicts(folder / "verdicts.json", verdicts)
    claims.unlink()
    return folder
