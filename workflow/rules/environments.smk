# Environments of programs that cannot live in ours, shared by all scales and built again when their lock changes:
# <name>, and <name>-cuda with what an Nvidia GPU needs on top.

ENVIRONMENT_FOLDER = f"{CONFIG.machine.results}/envs"
LOCKS = os.path.relpath(Path(workflow.basedir) / "requirements")


def locks(wildcards):
    """Locks that an environment is built from."""
    names = [wildcards.environment.removesuffix("-cuda"), wildcards.environment]
    return [f"{LOCKS}/{name}.txt" for name in dict.fromkeys(names)]


def environment_of(name):
    """The file that names an environment's interpreter, with CUDA where the device is a GPU."""
    chosen = f"{name}-cuda" if CONFIG.machine.device == "cuda" else name
    return f"{ENVIRONMENT_FOLDER}/{chosen}/environment.json"


rule environment:
    input:
        lock=locks,
    output:
        f"{ENVIRONMENT_FOLDER}/{{environment}}/environment.json",
    log:
        f"{ENVIRONMENT_FOLDER}/logs/{{environment}}.log",
    benchmark:
        f"{ENVIRONMENT_FOLDER}/benchmarks/{{environment}}.tsv"
    resources:
        **needs("data"),
    params:
        code=code_version("jacnorm.environments"),
    message:
        "Building the environment of {wildcards.environment}"
    shell:
        "python -m jacnorm.environments --lock {input.lock} --out {output} > {log} 2>&1"
