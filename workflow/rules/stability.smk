# On the Stability of the Jacobian Matrix in Deep Neural Networks (docs/studies/stability.md).
# One measuring rule per experiment, one job per block of seeds.

STABILITY = f"{RESULTS}/stability"
STABILITY_SETTINGS = CONFIG.studies["stability"]
STABILITY_LOG = f"{RESULTS}/logs/stability/{{}}.log"
STABILITY_BENCHMARK = f"{RESULTS}/benchmarks/stability/{{}}.tsv"
# Tables that each step fills, by experiment: <table>-<block>.parquet.
STABILITY_TRAINED = {"trainability": ["trainability"], "drift": ["curves"]}
STABILITY_MEASURED = {
    "depth": ["depth"],
    "theorem": ["limit", "surrogate", "independence"],
    "conditions": ["edge_matrices", "edge_networks", "correlated"],
    "scores": ["scores"],
    "trainability": ["start"],
    "drift": ["drift"],
}


def stability_tables(names):
    return [f"{STABILITY}/tables/{name}-{{block}}.parquet" for name in names]


def stability_data(experiment):
    """Prepared data sets of an experiment, in the order of its settings."""
    settings = getattr(STABILITY_SETTINGS, experiment)
    names = [settings.data_set] if hasattr(settings, "data_set") else settings.data_sets
    return [f"{RESULTS}/data/{name}.safetensors" for name in names]


STABILITY_INPUT = {
    "scores": {"data": stability_data("scores")},
    "trainability": {
        "data": stability_data("trainability"),
        "weights": f"{STABILITY}/train/trainability-{{block}}.safetensors",
    },
    "drift": {
        "data": stability_data("drift"),
        "weights": f"{STABILITY}/train/drift-{{block}}.safetensors",
    },
}
STABILITY_ALL_TABLES = [
    file
    for step in (STABILITY_TRAINED, STABILITY_MEASURED)
    for experiment, names in step.items()
    for pattern in stability_tables(names)
    for file in blocks("stability", experiment, pattern)
]


TARGETS["stability"] = [
    f"{STABILITY}/verdicts.json",
    f"{STABILITY}/manifest.json",
    f"{STABILITY}/figures/captions.json",
    *STABILITY_ALL_TABLES,
]


rule stability:
    input:
        TARGETS["stability"],


for experiment, tables in STABILITY_TRAINED.items():

    rule:
        name:
            f"stability_train_{experiment}"
        input:
            data=stability_data(experiment),
        output:
            *stability_tables(tables),
            weights=f"{STABILITY}/train/{experiment}-{{block}}.safetensors",
        log:
            STABILITY_LOG.format(f"train-{experiment}-{{block}}"),
        benchmark:
            STABILITY_BENCHMARK.format(f"train-{experiment}-{{block}}")
        resources:
            **needs("train"),
        params:
            code=code_version("jacnorm.studies.stability.train"),
            command=f"{experiment} --device {CONFIG.machine.device} --tables {STABILITY}/tables",
            settings=options("stability", experiment),
        message:
            f"stability: training for {experiment}, seeds {{wildcards.block}}"
        shell:
            "python -m jacnorm.studies.stability.train {params.command} {params.settings}"
            " --data {input.data} --weights {output.weights} > {log} 2>&1"


for experiment, tables in STABILITY_MEASURED.items():

    rule:
        name:
            f"stability_measure_{experiment}"
        input:
            **STABILITY_INPUT.get(experiment, {}),
        output:
            stability_tables(tables),
        log:
            STABILITY_LOG.format(f"measure-{experiment}-{{block}}"),
        benchmark:
            STABILITY_BENCHMARK.format(f"measure-{experiment}-{{block}}")
        resources:
            **needs("measure"),
        params:
            code=code_version("jacnorm.studies.stability.measure"),
            command=f"{experiment} --device {CONFIG.machine.device} --tables {STABILITY}/tables",
            settings=options("stability", experiment),
            inputs=lambda wildcards, input: " ".join(
                f"--{name} {files}" for name, files in input.items()
            ),
        message:
            f"stability: measuring {experiment}, seeds {{wildcards.block}}"
        shell:
            "python -m jacnorm.studies.stability.measure {params.command} {params.settings} {params.inputs}"
            " > {log} 2>&1"


rule stability_plot:
    input:
        STABILITY_ALL_TABLES,
    output:
        captions=f"{STABILITY}/figures/captions.json",
        figures=[
            f"{STABILITY}/figures/{name}.{kind}"
            for name in captions("stability")
            for kind in ("svg", "png")
        ],
    log:
        STABILITY_LOG.format("plot"),
    benchmark:
        STABILITY_BENCHMARK.format("plot")
    resources:
        **needs("plot"),
    params:
        code=code_version("jacnorm.studies.stability.figures"),
        captions=canonical(captions("stability")),
        folder=f"{STABILITY}/figures",
    message:
        "stability: drawing the figures"
    shell:
        "python -m jacnorm.studies.stability.figures --tables {input} --out {params.folder} > {log} 2>&1"


rule stability_judge:
    input:
        tables=STABILITY_ALL_TABLES,
        data=sorted(
            {
                file
                for experiment in ("scores", "trainability", "drift")
                for file in stability_data(experiment)
            }
        ),
    output:
        verdicts=f"{STABILITY}/verdicts.json",
        manifest=f"{STABILITY}/manifest.json",
    log:
        STABILITY_LOG.format("judge"),
    benchmark:
        STABILITY_BENCHMARK.format("judge")
    resources:
        **needs("judge"),
    params:
        code=code_version("jacnorm.studies.stability.judge"),
        claims=claims("stability"),
        departures=departures("stability"),
        scale=SCALE,
        settings=canonical(STABILITY_SETTINGS.model_dump()),
    message:
        "stability: judging the claims"
    shell:
        "python -m jacnorm.studies.stability.judge --scale {params.scale} --settings {params.settings:q}"
        " --tables {input.tables} --data {input.data} --verdicts {output.verdicts} --manifest {output.manifest}"
        " > {log} 2>&1"
