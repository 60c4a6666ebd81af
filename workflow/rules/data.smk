# Named data sets, prepared once and shared by the studies.


rule data:
    output:
        f"{RESULTS}/data/{{name}}.safetensors",
    log:
        f"{RESULTS}/logs/data/{{name}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/data/{{name}}.tsv"
    resources:
        **needs("data"),
    params:
        code=code_version("jacnorm.data.prepare"),
        text=lambda wildcards: TEXT if wildcards.name == "text" else "",
        photos=lambda wildcards: PHOTOS if wildcards.name == "mnist_m" else "",
    message:
        "Preparing the data set {wildcards.name}"
    shell:
        "python -m jacnorm.data.prepare --name {wildcards.name} --out {output} > {log} 2>&1"
