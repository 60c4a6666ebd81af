# What every rule file uses: the validated configuration, folders, and the parameters that decide about reruns.
import json
import os
import sys
from hashlib import sha256
from pathlib import Path

from jacnorm.code_version import code_version
from jacnorm.config import data_sets, load
from jacnorm.data import photos, texts
from jacnorm.data.catalogue import find
from jacnorm.errors import UserError
from jacnorm.files import read_yaml
from jacnorm.report.claims import claims_digest
from jacnorm.settings import flags


def own_text():
    """Digest of the user's text if one is given or needed: that it moved is no reason to run a job, what it says is."""
    if not (texts.given() or "text" in CONFIG.data_sets):
        return ""
    return texts.load(find("text")).digest


def own_photos():
    """Digest of the user's photos if a folder of them is given."""
    return photos.digest(photos.listed(photos.given())) if photos.given() else ""


try:
    CONFIG = load(Path(workflow.basedir) / "configs", config)
    if CONFIG.machine.text_path:
        os.environ[texts.VARIABLE] = str(
            Path(CONFIG.machine.text_path).expanduser().absolute()
        )
    if CONFIG.machine.photos_path:
        os.environ[photos.VARIABLE] = str(
            Path(CONFIG.machine.photos_path).expanduser().absolute()
        )
    TEXT = own_text()
    PHOTOS = own_photos()
except UserError as error:
    print(f"ERROR: {error}", file=sys.stderr)
    sys.exit(2)

SCALE = CONFIG.machine.scale
RESULTS = f"{CONFIG.machine.results}/{SCALE}"
PACKAGE = Path(workflow.basedir) / "src" / "jacnorm"

# Jobs run the interpreter that runs Snakemake, one thread each. What follows may change without rerunning a job, so it
# travels by environment and not by option.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
os.environ["JACNORM_WANDB_MODE"] = CONFIG.machine.wandb
os.environ["JACNORM_WANDB_DIR"] = str(Path(f"{RESULTS}/wandb").absolute())
if CONFIG.machine.mirror:
    os.environ["JACNORM_MIRROR"] = str(
        Path(CONFIG.machine.mirror).expanduser().absolute()
    )


# By study: step ("train", "measure") -> experiment -> tables that the job fills. Each study's rule file adds its own,
# and studies.smk makes the rules.
STUDIES = {}
# Experiments whose program cannot live in this environment: (study, experiment) -> name of its own (environments.smk).
ENVIRONMENTS = {}
# What each study is to leave behind.
TARGETS = {}


wildcard_constraints:
    block=r"s\d+-\d+",


def options(study, experiment):
    """The options of one job: the experiment's settings for the block of seeds in its file name."""
    settings = getattr(CONFIG.studies[study], experiment)
    return lambda wildcards: flags(settings.block(wildcards.block))


def blocks(study, experiment, pattern):
    """`pattern` once for every block of seeds of an experiment."""
    names = getattr(CONFIG.studies[study], experiment).block_names()
    return [pattern.replace("{block}", name) for name in names]


def tables(study, step, experiment):
    """Files that a job of the step fills, with the block of seeds as a wildcard."""
    return [
        f"{RESULTS}/{study}/tables/{name}-{{block}}.parquet"
        for name in STUDIES[study][step][experiment]
    ]


def all_tables(study):
    """Every table of a study, block by block."""
    return [
        file
        for step, experiments in STUDIES[study].items()
        for experiment in experiments
        for pattern in tables(study, step, experiment)
        for file in blocks(study, experiment, pattern)
    ]


def data_of(study, experiment):
    """Prepared data sets that an experiment's settings name, in their order."""
    names = data_sets(getattr(CONFIG.studies[study], experiment))
    return [f"{RESULTS}/data/{name}.safetensors" for name in names]


def given(study, experiment):
    """What every job of an experiment reads, as named inputs: data sets and an environment of its own, if any."""
    files = data_of(study, experiment)
    found = {"data": files} if files else {}
    if (study, experiment) in ENVIRONMENTS:
        found["environment"] = environment_of(ENVIRONMENTS[study, experiment])
    return found


def inputs_of(study, experiment):
    """What a measuring job reads: what is given and, if the experiment trains, the weights."""
    found = given(study, experiment)
    if experiment in STUDIES[study].get("train", {}):
        found["weights"] = f"{RESULTS}/{study}/train/{experiment}-{{block}}.safetensors"
    return found


def all_data(study):
    """Every data set that a job of the study reads."""
    experiments = {name for step in STUDIES[study].values() for name in step}
    planned = (
        name for name in experiments if getattr(CONFIG.studies[study], name).seeds
    )
    return sorted({file for name in planned for file in data_of(study, name)})


def needs(step):
    """Resources of a step, from the configuration."""
    return getattr(CONFIG.machine.jobs, step).model_dump()


def flags_of(inputs):
    """Named inputs of a job as options of its command."""
    return " ".join(f"--{name} {files}" for name, files in inputs.items())


def canonical(value):
    """Plain data as text that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True)


def digest(folder):
    """Digest of the files in a folder of the package that code reads."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return sha256(
        b"".join(path.name.encode() + path.read_bytes() for path in files)
    ).hexdigest()[:16]


def claims(study):
    """Digest of the study's claims; comments in claims.yaml do not count."""
    return claims_digest(PACKAGE / "studies" / study / "claims.yaml")


def captions(study):
    """Figure names and captions of a study, as plain data."""
    return read_yaml(PACKAGE / "studies" / study / "captions.yaml")


def departures(study):
    """What a study does differently from its paper, as canonical text."""
    return canonical(read_yaml(PACKAGE / "studies" / study / "departures.yaml"))
