# The five steps of every study: one training and one measuring rule per experiment, one job per block of seeds, then
# figures and verdicts from tables alone.

for study, steps in STUDIES.items():
    TARGETS[study] = [
        f"{RESULTS}/{study}/verdicts.json",
        f"{RESULTS}/{study}/manifest.json",
        f"{RESULTS}/{study}/figures/captions.json",
        *all_tables(study),
    ]

    rule:
        name:
            study
        input:
            TARGETS[study],

    for experiment in steps.get("train", {}):

        rule:
            name:
                f"{study}_train_{experiment}"
            input:
                **given(study, experiment),
            output:
                *tables(study, "train", experiment),
                weights=f"{RESULTS}/{study}/train/{experiment}-{{block}}.safetensors",
            log:
                f"{RESULTS}/logs/{study}/train-{experiment}-{{block}}.log",
            benchmark:
                f"{RESULTS}/benchmarks/{study}/train-{experiment}-{{block}}.tsv"
            resources:
                **needs("train"),
            params:
                code=code_version(f"jacnorm.studies.{study}.train"),
                module=f"jacnorm.studies.{study}.train",
                command=f"{experiment} --device {CONFIG.machine.device} --tables {RESULTS}/{study}/tables",
                settings=options(study, experiment),
                inputs=lambda wildcards, input: flags_of(input),
            message:
                f"{study}: training for {experiment}, seeds {{wildcards.block}}"
            shell:
                "python -m {params.module} {params.command} {params.settings} {params.inputs}"
                " --weights {output.weights} > {log} 2>&1"

    for experiment in steps["measure"]:

        rule:
            name:
                f"{study}_measure_{experiment}"
            input:
                **inputs_of(study, experiment),
            output:
                tables(study, "measure", experiment),
            log:
                f"{RESULTS}/logs/{study}/measure-{experiment}-{{block}}.log",
            benchmark:
                f"{RESULTS}/benchmarks/{study}/measure-{experiment}-{{block}}.tsv"
            resources:
                **needs("measure"),
            params:
                code=code_version(f"jacnorm.studies.{study}.measure"),
                module=f"jacnorm.studies.{study}.measure",
                command=f"{experiment} --device {CONFIG.machine.device} --tables {RESULTS}/{study}/tables",
                settings=options(study, experiment),
                inputs=lambda wildcards, input: flags_of(input),
            message:
                f"{study}: measuring {experiment}, seeds {{wildcards.block}}"
            shell:
                "python -m {params.module} {params.command} {params.settings} {params.inputs} > {log} 2>&1"

    rule:
        name:
            f"{study}_plot"
        input:
            all_tables(study),
        output:
            captions=f"{RESULTS}/{study}/figures/captions.json",
            figures=[
                f"{RESULTS}/{study}/figures/{name}.{kind}"
                for name in captions(study)
                for kind in ("svg", "png")
            ],
        log:
            f"{RESULTS}/logs/{study}/plot.log",
        benchmark:
            f"{RESULTS}/benchmarks/{study}/plot.tsv"
        resources:
            **needs("plot"),
        params:
            code=code_version(f"jacnorm.studies.{study}.figures"),
            module=f"jacnorm.studies.{study}.figures",
            captions=canonical(captions(study)),
            folder=f"{RESULTS}/{study}/figures",
        message:
            f"{study}: drawing the figures"
        shell:
            "python -m {params.module} --tables {input} --out {params.folder} > {log} 2>&1"

    rule:
        name:
            f"{study}_judge"
        input:
            tables=all_tables(study),
            data=all_data(study),
        output:
            verdicts=f"{RESULTS}/{study}/verdicts.json",
            manifest=f"{RESULTS}/{study}/manifest.json",
        log:
            f"{RESULTS}/logs/{study}/judge.log",
        benchmark:
            f"{RESULTS}/benchmarks/{study}/judge.tsv"
        resources:
            **needs("judge"),
        params:
            code=code_version(f"jacnorm.studies.{study}.judge"),
            module=f"jacnorm.studies.{study}.judge",
            claims=claims(study),
            departures=departures(study),
            scale=SCALE,
            settings=canonical(CONFIG.studies[study].public()),
        message:
            f"{study}: judging the claims"
        shell:
            "python -m {params.module} --scale {params.scale} --settings {params.settings:q}"
            " --tables {input.tables} --data {input.data} --verdicts {output.verdicts} --manifest {output.manifest}"
            " > {log} 2>&1"
