# Verdicts, figures and tables of all studies on one page.

REPORTED = CONFIG.selected


rule report:
    input:
        verdicts=expand(f"{RESULTS}/{{study}}/verdicts.json", study=REPORTED),
        manifests=expand(f"{RESULTS}/{{study}}/manifest.json", study=REPORTED),
        captions=expand(f"{RESULTS}/{{study}}/figures/captions.json", study=REPORTED),
    output:
        f"{RESULTS}/report/index.html",
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report.tsv"
    resources:
        **needs("judge"),
    params:
        code=code_version("jacnorm.report.build"),
        templates=digest(PACKAGE / "report" / "templates"),
        studies=" ".join(REPORTED),
        results=RESULTS,
    message:
        "Writing the report to {output}"
    shell:
        "python -m jacnorm.report.build --results {params.results} --studies {params.studies} --out {output} > {log} 2>&1"
