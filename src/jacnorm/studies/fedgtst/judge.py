"""Judging step of the `fedgtst` study: one estimand function per claim of ``claims.yaml``, tables in, numbers out.

Margins live in claims.yaml and nowhere else. Runs of one seed share split, start, batches and fine-tuning, so methods
are compared in pairs, each at the coefficient that was best in target validation; the label names it. A run that became
unstable counts as it ended: it is never dropped, the label says how many there are, and the accounting does not call it
finished. Norms are of gradients by the weights (loss_weight_gradient_norm), never of input-output Jacobians.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from jacnorm.report.claims import Scale
from jacnorm.report.estimands import (
    Measured,
    account,
    by_seed,
    complete,
    paired,
    quantity,
    select,
    slope,
    whole_seeds,
)
from jacnorm.report.judging import judge_files
from jacnorm.report.verdicts import Accounting, Quantity
from jacnorm.step import run
from jacnorm.studies.fedgtst.selection import (
    Arm,
    Cell,
    Experiment,
    Tables,
    arm_of,
    coefficients,
    experiments,
    random_rows,
    trained,
)
from jacnorm.studies.fedgtst.settings import StudySettings

TOLERANCE = 1e-12
"""By how much a decrease may miss a bound through rounding, in double precision [nat] (G1 to G4)."""
STABLE_RATE = 2.0
"""Step sizes, in units of 1 / alpha, below which the lemma promises anything (G1, G4)."""
EARLY_ROUNDS = 100
"""Rounds of Figure 2 (G5)."""
BASELINES = ("fedavg", "fedsr", "fediir")
SEED_LEFT_OUT = "another run of the seed is lost"
TRANSFER = ["transfer", "runs"]
STATISTICS = ["statistics", "transfer", "runs"]


# --- G1 to G4: descent of convex losses ------------------------------------------------------------------------------


def lemma_holds(tables: Tables, settings: StudySettings) -> Measured:
    """G1: rounds of a seed whose decrease is below the one of Lemma B.3."""
    return _violations(tables["bounds"], settings, "lemma")


def corrected_rate_holds(tables: Tables, settings: StudySettings) -> Measured:
    """G2: rounds of a seed whose decrease is below the one of Appendix E, optimal step size."""
    return _violations(select(tables["bounds"], rule="optimal"), settings, "corrected")


def printed_rate_holds(tables: Tables, settings: StudySettings) -> Measured:
    """G3: share of all rounds whose decrease is below the printed one, optimal step size; and below the corrected."""
    rows = select(tables["bounds"], rule="optimal")
    seeds = account(settings.bounds.seeds, rows.seed, what="trainings")
    label = f"optimal step size, {len(rows)} rounds"
    found: Measured = [
        quantity(promise, label, _missed(rows, promise).groupby(rows.seed).mean(), seeds)
        for promise in ("printed", "corrected")
    ]
    return complete(found, ["printed", "corrected"], "no round had the optimal step size")


def variance_is_not_needed(tables: Tables, settings: StudySettings) -> Measured:
    """G4: rounds of a seed whose decrease is below the one of the descent lemma for the mean gradient."""
    return _violations(tables["bounds"], settings, "variance_free")


def _violations(rows: pd.DataFrame, settings: StudySettings, promise: str) -> Measured:
    found: Measured = []
    rows = rows[rows.rate < STABLE_RATE]
    for rule, rate in _steps(rows):
        own = select(rows, rule=rule) if rate is None else select(rows, rule=rule, rate=rate)
        words = "optimal step size" if rate is None else f"step size {rate:g} / alpha"
        runs = account(settings.bounds.seeds, own.seed, what="trainings")
        counts = _missed(own, promise).groupby(own.seed).sum().astype(float)
        found.append(quantity("violations", f"{words}, {len(own)} rounds", counts, runs))
    return complete(found, ["violations"], "no round was made with a step size below 2 / alpha")


def _steps(rows: pd.DataFrame) -> Iterator[tuple[str, float | None]]:
    """The optimal step size, which changes from round to round, then each fixed one."""
    if (rows.rule == "optimal").any():
        yield "optimal", None
    yield from (("fixed", rate) for rate in sorted(select(rows, rule="fixed").rate.unique()))


def _missed(rows: pd.DataFrame, promise: str) -> pd.Series:
    """Whether each round falls short of a promise; a number that is undefined keeps none."""
    return ~(rows.decrease >= rows[promise] - TOLERANCE)


# --- G5 to G7: norm and variance of the clients' gradients -----------------------------------------------------------


def raises_the_norm(tables: Tables, settings: StudySettings) -> Measured:
    """G5: norm of the mean gradient, FedGTST over FedAVG, mean over the measured rounds 1 to 100."""
    return _statistic_ratios(tables, settings, "norm_of_mean", EARLY_ROUNDS)


def lowers_the_variance(tables: Tables, settings: StudySettings) -> Measured:
    """G6: variance over clients, FedGTST over FedAVG, mean over the measured rounds."""
    return _statistic_ratios(tables, settings, "variance", None)


def _statistic_ratios(tables: Tables, settings: StudySettings, column: str, last: int | None) -> Measured:
    found: Measured = []
    for study in _studies(tables, settings, STATISTICS, "federated", "image"):
        for cell in study.experiment.cells():
            plain, best, mean = (study.arm(cell, method) for method in ("fedavg", "fedgtst", "fedgtst-mean"))
            if plain is None:
                continue
            for coefficient in coefficients(study.transfer, cell, "fedgtst"):
                arm = Arm(cell, "fedgtst", coefficient)
                found.append(study.ratio("chosen" if arm == best else "sweep", [arm, plain], column, last))
            if mean is not None:
                found.append(study.ratio("mean-guide", [mean, plain], column, last))
    found = complete(found, ["chosen"], "FedAVG and FedGTST were not both measured")
    found = complete(found, ["sweep"], "FedGTST had no other coefficient")
    return complete(found, ["mean-guide"], "FedGTST with the mean as the guide was not measured beside FedAVG")


def both_at_once(tables: Tables, settings: StudySettings) -> Measured:
    """G7: norm's and variance's ratios of the same runs, and what the variance is made of."""
    found: Measured = []
    for study in _studies(tables, settings, STATISTICS, "federated", "image"):
        for cell in study.experiment.cells():
            plain, best = (study.arm(cell, method) for method in ("fedavg", "fedgtst"))
            if plain is not None and best is not None:
                found.append(study.together(plain, coefficients(study.transfer, cell, "fedgtst")))
                found.append(study.ratio("norms", [best, plain], "norm_dispersion", None))
                found.append(study.ratio("directions", [best, plain], "direction_dispersion", None))
                found.append(study.norm_share(plain))
    names = ["together", "norms", "directions", "norm-share"]
    return complete(found, names, "FedAVG and FedGTST were not both measured")


def closest_to_both(logs: np.ndarray) -> float:
    """Largest over coefficients of the smaller of mean log ratio of norms and minus that of variances.

    logs: (seeds, 2 coefficients), the norms' first.
    """
    norms, variances = np.split(logs.mean(axis=0), 2)
    return float(np.max(np.minimum(norms, -variances)))


# --- G8 to G11, G14: methods, clients and networks -------------------------------------------------------------------


def transfers_better(tables: Tables, settings: StudySettings) -> Measured:
    """G8: target accuracy of FedGTST minus each baseline's, every task, network and number of clients."""
    found: Measured = []
    for study in _studies(tables, settings, TRANSFER, "federated", "image"):
        for cell in study.experiment.cells():
            found += [study.gain(method, cell, ("fedgtst", method)) for method in BASELINES]
            found.append(study.gain("mean-guide", cell, ("fedgtst-mean", "fedavg")))
    return complete(found, [*BASELINES, "mean-guide"], "the two methods were not both trained")


def margin_on_images(tables: Tables, settings: StudySettings) -> Measured:
    """G9: target accuracy of FedGTST minus FedIIR's and FedSR's, CIFAR-10 to SVHN, LeNet, 100 clients."""
    found: Measured = []
    for study in _studies(tables, settings, TRANSFER, "image"):
        for cell in study.experiment.cells():
            if (cell.source, cell.network, cell.clients) == ("cifar10", "lenet", 100):
                found += [study.gain(method, cell, ("fedgtst", method)) for method in ("fediir", "fedsr")]
    return complete(found, ["fediir", "fedsr"], "the two methods were not both trained with LeNet and 100 clients")


def clients_matter(tables: Tables, settings: StudySettings) -> Measured:
    """G10: slopes of target accuracy, and of FedGTST's gain, on the number of clients."""
    found: Measured = []
    for study in _studies(tables, settings, TRANSFER, "federated", "image"):
        cells = study.experiment.cells()
        for task, network in dict.fromkeys((cell.task, cell.network) for cell in cells):
            own = [cell for cell in cells if (cell.task, cell.network) == (task, network)]
            found += [study.trend("accuracy", own, (method,)) for method in (*BASELINES, "fedgtst")]
            found += [study.trend("gain", own, ("fedgtst", method)) for method in ("fedsr", "fediir")]
            found.append(study.trend("gain-fedavg", own, ("fedgtst", "fedavg")))
    return complete(found, ["accuracy", "gain", "gain-fedavg"], "there was one number of clients")


def deeper_network_is_better(tables: Tables, settings: StudySettings) -> Measured:
    """G11: target accuracy with ResNet18 minus that with LeNet, each method and number of clients."""
    found: Measured = []
    for study in _studies(tables, settings, TRANSFER, "federated", "image"):
        for cell in study.experiment.cells():
            if cell.network == "resnet18":
                shallow = cell._replace(network="lenet")
                for method in (*BASELINES, "fedgtst"):
                    found.append(study.difference("difference", study.arm(cell, method), study.arm(shallow, method)))
    return complete(found, ["difference"], "ResNet18 and LeNet were not both trained")


def better_elsewhere(tables: Tables, settings: StudySettings) -> Measured:
    """G14: target accuracy of FedGTST minus Scaffold's; minus the baselines' under Dirichlet; on DomainNet."""
    found: Measured = []
    for study in _studies(tables, settings, TRANSFER, "federated", "image"):
        found += [study.gain("scaffold", cell, ("fedgtst", "scaffold")) for cell in study.experiment.cells()]
        for cell in study.experiment.cells(split="dirichlet"):
            found += [study.gain("dirichlet", cell, ("fedgtst", method)) for method in BASELINES]
    for study in _studies(tables, settings, TRANSFER, "domain"):
        for cell in study.experiment.cells():
            found += [study.gain("domains", cell, ("fedgtst", method)) for method in ("fedavg", "fedsr")]
    found = complete(found, ["scaffold"], "FedGTST and Scaffold were not both trained")
    found = complete(found, ["dirichlet"], "no two methods were trained with clients of a Dirichlet split")
    return complete(found, ["domains"], "no two methods were trained on DomainNet")


# --- G12, G13: participation and local epochs ------------------------------------------------------------------------


def participation_matters(tables: Tables, settings: StudySettings) -> Measured:
    """G12: target accuracy with all clients against 10 % and 20 %, and its slope on the logarithm of the share."""
    found: Measured = []
    for study in _studies(tables, settings, TRANSFER, "federated", "image"):
        for cells in study.alternatives("participation"):
            ends = {"helps": (1.0, 0.1, "fedgtst"), "close": (0.2, 1.0, "fedgtst"), "fedavg": (1.0, 0.1, "fedavg")}
            for criterion, (first, second, method) in ends.items():
                pair = [study.arm(cells[share], method) if share in cells else None for share in (first, second)]
                found.append(study.difference(criterion, *pair))
            found.append(study.trend("trend", list(cells.values()), ("fedgtst",)))
    found = complete(found, ["helps", "fedavg"], "the method was not trained with all clients and with 10 % of them")
    found = complete(found, ["close"], "FedGTST was not trained with all clients and with 20 % of them")
    return complete(found, ["trend"], "FedGTST was trained with one share of the clients")


def one_epoch_is_better(tables: Tables, settings: StudySettings) -> Measured:
    """G13: target accuracy with one local epoch minus that with ten."""
    found: Measured = []
    for study in _studies(tables, settings, TRANSFER, "federated", "image"):
        for cells in study.alternatives("local_epochs"):
            for method in ("fedavg", "fedgtst"):
                pair = [study.arm(cells[epochs], method) if epochs in cells else None for epochs in (1, 10)]
                found.append(study.difference(method, *pair))
    return complete(found, ["fedavg", "fedgtst"], "the method was not trained with one and with ten local epochs")


# --- G15 to G17: communication, control, engines ---------------------------------------------------------------------


def one_number_each_way(tables: Tables, settings: StudySettings) -> Measured:
    """G15: bytes of FedGTST beside the weights, every different number once."""
    found: Measured = []
    for experiment in experiments(tables, settings, ["runs"], "federated", "image", "domain"):
        rows = select(experiment.tables["runs"], method="fedgtst")
        for (source, network), own in rows.groupby(["source", "network"]):
            label = f"{source}, {network}, D = {own.parameters.max()}"
            found += _bytes(own, label, ("down", "up"))
            extra = own.bytes_down + own.bytes_up - 2 * own.weight_bytes
            shares = (extra / (2 * own.weight_bytes)).unique()
            runs = Accounting.all_finished(len(own), "trainings")
            found += [Quantity("share", label, [float(share)], runs) for share in shares]
    found += _bytes(select(tables["engines"], method="fedgtst", engine="flower"), "Flower", ("flower", "flower"))
    found = complete(found, ["down", "up", "share"], "FedGTST was not trained")
    return complete(found, ["flower"], "FedGTST was not run through Flower")


def _bytes(rows: pd.DataFrame, label: str, criteria: tuple[str, str]) -> Iterator[Quantity]:
    """Each different number of bytes beside the weights, down then up."""
    runs = Accounting.all_finished(len(rows), "rounds" if "engine" in rows else "trainings")
    for criterion, column, words in zip(criteria, ("bytes_down", "bytes_up"), ("to", "from"), strict=True):
        for extra in (rows[column] - rows.weight_bytes).unique():
            yield Quantity(criterion, f"{label}, {words} a client", [float(extra)], runs)


def trained_features_help(tables: Tables, settings: StudySettings) -> Measured:
    """G16: target accuracy on trained features minus that on those of the initial weights."""
    found: Measured = []
    for study in _studies(tables, settings, TRANSFER, "federated", "image", "domain"):
        for cell in study.experiment.cells():
            for method in dict.fromkeys(study.transfer.method):
                found.append(study.control("fedavg" if method == "fedavg" else "others", study.arm(cell, method)))
    return complete(found, ["fedavg", "others"], "trained and random features were not both measured")


def engines_agree(tables: Tables, settings: StudySettings) -> Measured:
    """G17: largest differences of the loop and of Flower from the batched engine."""
    found: Measured = []
    rows = tables["engines"]
    for (method, engine), own in rows.groupby(["method", "engine"], sort=False):
        runs = account(settings.engines.seeds, own.seed, what="trainings")
        label = f"{method}, {engine}, {own['round'].max()} rounds"
        for criterion, column in (("weights", "weights_difference"), ("guide", "guide_difference")):
            found.append(Quantity(criterion, label, [float(np.max(own[column].to_numpy()))], runs))
    return complete(found, ["weights", "guide"], "no other engine was run")


# --- shared ----------------------------------------------------------------------------------------------------------


def _studies(tables: Tables, settings: StudySettings, names: list[str], *prefixes: str) -> Iterator[_Federation]:
    yield from (_Federation(each) for each in experiments(tables, settings, names, *prefixes))


class _Federation:
    """The federated trainings of one experiment, compared by seed."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.transfer = experiment.tables["transfer"]
        self.reached = trained(self.transfer)
        self.fits = experiment.tables["runs"]
        self._arms: dict[tuple[Cell, str], Arm | None] = {}
        self._places: dict[int, dict[tuple[object, ...], np.ndarray]] = {}

    def rows(self, arm: Arm, table: pd.DataFrame) -> pd.DataFrame:
        """An arm's rows of one of the experiment's tables, which are grouped once: there are many arms."""
        if id(table) not in self._places:
            keys = [*Cell._fields, "method", "coefficient"]
            self._places[id(table)] = table.groupby(keys, sort=False).indices
        return table.iloc[self._places[id(table)].get((*arm.cell, arm.method, arm.coefficient), [])]

    def arm(self, cell: Cell, method: str) -> Arm | None:
        """A method at its chosen coefficient, None where it was not trained."""
        if (cell, method) not in self._arms:
            self._arms[cell, method] = arm_of(self.transfer, cell, method)
        return self._arms[cell, method]

    def alternatives(self, column: str) -> Iterator[dict[object, Cell]]:
        """Value of a condition -> cell, for each task where there are several, at the K of the alternatives."""
        cells = [
            cell
            for cell in self.experiment.cells(**{column: None})
            if cell.clients == self.experiment.settings.ablation_clients
        ]
        for task, network in dict.fromkeys((cell.task, cell.network) for cell in cells):
            found = {getattr(c, column): c for c in cells if (c.task, c.network) == (task, network)}
            if len(found) > 1:
                yield found

    def accuracy(self, arm: Arm) -> pd.Series:
        """Target accuracy by seed, in points."""
        return 100 * by_seed(self.rows(arm, self.reached), "target_accuracy").astype(float)

    def gain(self, criterion: str, cell: Cell, methods: tuple[str, str]) -> Quantity:
        """Target accuracy of the first method minus that of the second, paired by seed."""
        return self.difference(criterion, *(self.arm(cell, method) for method in methods))

    def difference(self, criterion: str, first: Arm | None, second: Arm | None) -> Quantity:
        """Target accuracy of the first minus that of the second, paired by seed; no sample where one is missing."""
        if first is None or second is None:
            return Quantity(criterion, "", [], Accounting.all_finished(0))
        values = paired(self.accuracy(first), self.accuracy(second))
        arms = [first, second]
        return quantity(criterion, self.label(arms), values, self.runs(arms, self.reached))

    def control(self, criterion: str, arm: Arm | None) -> Quantity:
        """Target accuracy on an arm's features minus that on its initial weights', paired by seed."""
        if arm is None:
            return Quantity(criterion, "", [], Accounting.all_finished(0))
        start = 100 * by_seed(random_rows(self.transfer, arm.cell, arm.method), "target_accuracy").astype(float)
        values = paired(self.accuracy(arm), start)
        label = f"{self.label([arm])}; random features: {start.mean():.1f} points"
        return quantity(criterion, label, values, self.runs([arm], self.reached))

    def trend(self, criterion: str, cells: Sequence[Cell], methods: Sequence[str]) -> Quantity:
        """Slope of a method's target accuracy, or of its gain over a second one, over cells that differ in one column.

        On K in steps of 10 clients, on the share of participants by doublings.
        """
        arms = [[self.arm(cell, method) for cell in cells] for method in methods]
        if len(cells) < 2 or any(arm is None for line in arms for arm in line):
            return Quantity(criterion, "", [], Accounting.all_finished(0))
        by_share = len({cell.clients for cell in cells}) == 1
        values = [cell.participation if by_share else cell.clients for cell in cells]
        places = np.log2(values) if by_share else np.array(values) / 10
        lines = [self._line(line) for line in arms]  # of (seeds, cells)
        shared = lines[0].index.intersection(lines[-1].index)
        points = lines[0].loc[shared] if len(lines) == 1 else lines[0].loc[shared] - lines[1].loc[shared]
        slopes = pd.Series({seed: slope(places, row.to_numpy()) for seed, row in points.iterrows()}, dtype=float)
        flat = [arm for line in arms for arm in line if arm is not None]
        words = f"{'share' if by_share else 'K'} = {', '.join(f'{value:g}' for value in values)}"
        first = cells[0]
        label = f"{first.task}, {first.network}, {words}; {' against '.join(self._method(line) for line in arms)}"
        runs = self.runs(flat, self.reached, used=set(points.index))
        return quantity(criterion, label + self.unstable(flat), slopes, runs)

    def _line(self, arms: Sequence[Arm | None]) -> pd.DataFrame:
        """Target accuracies of the seeds that all arms have, (seeds, arms)."""
        parts = [
            self.accuracy(arm).rename(place).rename_axis("seed").reset_index(name="accuracy").assign(place=place)
            for place, arm in enumerate(arms)
            if arm is not None
        ]
        rows = whole_seeds(pd.concat(parts), "place", range(len(arms)))
        return rows.pivot(index="seed", columns="place", values="accuracy")

    def _method(self, arms: Sequence[Arm | None]) -> str:
        """A method with the coefficients chosen along a line."""
        return " / ".join(dict.fromkeys(arm.words for arm in arms if arm is not None))

    def ratio(self, criterion: str, arms: Sequence[Arm], column: str, last: int | None) -> Quantity:
        """Mean over the measured rounds of a statistic of the first arm over that of the second, paired by seed."""
        ratios = self._ratios(arms, column, last)
        return quantity(criterion, self.label(arms), ratios, self.runs(arms, self.statistics), "geometric mean")

    def _ratios(self, arms: Sequence[Arm], column: str, last: int | None) -> pd.Series:
        keys = ["seed", "round"]
        parts = [self.rows(arm, self.statistics)[[*keys, column]].set_index(keys)[column] for arm in arms]
        both = pd.concat(parts, axis=1, join="inner", keys=["first", "second"]).sort_index().reset_index()
        both = both[(both["round"] >= 1) & (both["round"] <= (last or np.inf))]
        ratios = both["first"].to_numpy() / both["second"].to_numpy()
        return (
            pd.Series(ratios, both.seed.to_numpy(), dtype=float).groupby(level=0).agg(lambda v: np.mean(v.to_numpy()))
        )

    @property
    def statistics(self) -> pd.DataFrame:
        """Norm and variance over all clients at the measured rounds."""
        return self.experiment.tables["statistics"]

    def together(self, plain: Arm, values: Sequence[float]) -> Quantity:
        """Log ratios of norm and variance to FedAVG's at each coefficient, (seeds, 2 coefficients)."""
        arms = [Arm(plain.cell, "fedgtst", value) for value in values]
        columns = (("norm_of_mean", EARLY_ROUNDS), ("variance", None))
        parts = [self._ratios([arm, plain], column, last) for column, last in columns for arm in arms]
        logs = np.log(pd.concat(parts, axis=1, join="inner"))
        every = [*arms, plain]
        words = f"FedGTST, xi = {', '.join(f'{value:g}' for value in values)}, against FedAVG"
        label = f"{', '.join(_where(plain.cell))}; {words}{self.unstable(every)}"
        runs = self.runs(every, self.statistics, used=set(logs.index))
        return quantity("together", label, logs, runs, closest_to_both)

    def norm_share(self, arm: Arm) -> Quantity:
        """Mean over the measured rounds of the norms' part of the variance."""
        rows = self.rows(arm, self.statistics)
        rows = rows[rows["round"] >= 1]
        shares = _over_rounds(rows.norm_dispersion / rows.variance, rows.seed)
        return quantity("norm-share", self.label([arm]), shares, self.runs([arm], self.statistics))

    def label(self, arms: Sequence[Arm]) -> str:
        """Where, which methods with which of how many coefficients, and how many runs did not finish."""
        places = [_where(arm.cell) for arm in arms]
        shared = [part for part in places[0] if all(part in place for place in places)]
        words = [
            ", ".join([self._chosen(arm), *(part for part in place if part not in shared)])
            for arm, place in zip(arms, places, strict=True)
        ]
        return f"{', '.join(shared)}; {' against '.join(words)}{self.unstable(arms)}"

    def _chosen(self, arm: Arm) -> str:
        """Method and coefficient, and among how many it was chosen, if it was."""
        count = len(coefficients(self.transfer, arm.cell, arm.method))
        picked = count > 1 and arm == self.arm(arm.cell, arm.method)
        return arm.words + f" (of {count}, by validation)" * picked

    def unstable(self, arms: Sequence[Arm]) -> str:
        """How many of the runs ended early, in words; '' if none did."""
        rows = pd.concat([self.rows(arm, self.fits) for arm in dict.fromkeys(arms)])
        counts = {word: int((rows.outcome == word).sum()) for word in ("unstable", "diverged")}
        words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        return f"; {words} of {len(rows)} runs, counted as they ended" if words else ""

    def runs(self, arms: Sequence[Arm], table: pd.DataFrame, used: set[int] | None = None) -> Accounting:
        """Where the trainings of these arms went; `table` is what was measured of them.

        With `used`, a seed that is not among them was left out as a whole because one of its runs is lost.
        """
        there, early = set(), set()
        for place, arm in enumerate(arms):
            rows = self.rows(arm, self.fits)
            there |= {(place, seed) for seed in self.rows(arm, table).seed.unique()}
            early |= {(place, seed) for seed in rows[rows.outcome != "finished"].seed}
        out = set() if used is None else {key for key in there if key[1] not in used}
        wanted = product(range(len(arms)), self.experiment.settings.seeds)
        return account(wanted, there, diverged=early, excluded={SEED_LEFT_OUT: out}, what="trainings")


def _over_rounds(values: pd.Series, seeds: pd.Series) -> pd.Series:
    """Mean over the rounds of each seed; numpy's mean lets a NaN through."""
    return values.groupby(seeds).agg(lambda v: np.mean(v.to_numpy())).astype(float)


def _where(cell: Cell) -> list[str]:
    """A cell in words, part by part."""
    epochs = f"{cell.local_epochs} local epoch{'s' * (cell.local_epochs > 1)}"
    share = f"{cell.participation:.0%} of them a round"
    return [cell.task, cell.network, f"K = {cell.clients}", share, epochs, f"split {cell.split}"]


def judge(settings: str, scale: Scale, tables: list[Path], data: list[Path], verdicts: Path, manifest: Path) -> None:
    """Judge every claim of claims.yaml.

    Args:
        settings: all settings of the study as JSON.
        scale: the scale that the tables were made at.
        tables: Parquet files of the measuring and training steps.
        data: prepared data sets that these steps read.
        verdicts: verdicts.json to write.
        manifest: manifest.json to write.

    """
    validated = StudySettings.validate(json.loads(settings), "studies.fedgtst")
    judge_files(sys.modules[__name__], Path(__file__).parent, validated, scale, tables, data, verdicts, manifest)


if __name__ == "__main__":
    run({"judge": judge})
