# Seven papers about the input-output Jacobian, one DAG: data -> train -> measure -> plot -> judge -> report.
#
#   snakemake                                  every study at scale smoke
#   snakemake stability --config scale=laptop  one study at another scale
#   snakemake report --configfile mine.yaml    your own keys on top of configs/<scale>.yaml
from snakemake.utils import min_version

min_version("9.18")


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/environments.smk"
include: "workflow/rules/stability.smk"
include: "workflow/rules/lipschitz.smk"
include: "workflow/rules/sharpening.smk"
include: "workflow/rules/attention.smk"
include: "workflow/rules/glstm.smk"
include: "workflow/rules/fedgtst.smk"
include: "workflow/rules/worldmodel.smk"
include: "workflow/rules/studies.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        f"{RESULTS}/report/index.html",
        [TARGETS[study] for study in CONFIG.selected],
