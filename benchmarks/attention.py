"""Compare capturing attention layer by layer with a plain forward pass that returns all of it, in one run, one thread.

Each measurement runs in a process of its own, on models with random weights, one window at a time. Writes JSON with the
machine and the versions beside the numbers. The aim: at least the tokens per second of the plain pass over 1.5.

    python -m benchmarks.attention                about five minutes
    python -m benchmarks.attention --quick        small models, about half a minute
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.jacobian import ROOT, TIME_LIMIT, machine

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

AIM = 1.5
"""How much slower than the plain pass capturing may be."""
ENOUGH_SECONDS, MOST_RUNS = 4.0, 50
TASKS = {
    "plain": "forward pass, output_attentions=True",
    "plain without logits": "the same without the head of the model",
    "capture": "capture, attention handed over and dropped",
    "metrics": "capture with metrics: all of scale smoke; else one space, softmax, one temperature, four N",
}


@dataclass(frozen=True)
class Row:
    """One model and the length of its window; `metrics` are changes of the settings that are measured with."""

    name: str
    words: str
    layers: int
    heads: int
    width: int
    length: int
    vocabulary: int
    key_heads: int = 0
    """Heads of keys and values of a Llama; 0: a GPT-2."""
    metrics: dict[str, Any] = field(default_factory=dict)


_SOME = {
    "spaces": ["embedding"],
    "normalisers": ["softmax"],
    "selected": [1, 5, 20, 100],
    "fractions": [0.5],
    "temperatures": [1.0],
    "perturbations": [1e-3],
}
QUICK = [
    Row("smoke", "GPT-2 of scale smoke, 4 layers of 4 heads, L=128", 4, 4, 64, 128, 512),
    Row("llama", "Llama, 4 layers of 4 heads, 2 of keys, L=128", 4, 4, 64, 128, 512, 2, _SOME),
]
FULL = [
    QUICK[0],
    Row("laptop", "GPT-2 of scale laptop, 6 layers of 8 heads, L=512", 6, 8, 128, 512, 1024, 0, _SOME),
    Row("gpt2", "GPT-2, 12 layers of 12 heads, L=1024", 12, 12, 768, 1024, 50257, 0, _SOME),
    Row("llama", "Llama, 12 layers of 12 heads, 4 of keys, L=1024", 12, 12, 768, 1024, 32000, 4, _SOME),
]


def main() -> None:
    """Run the comparison, or one task of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, to see that all of it runs")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in FULL], help="only these rows")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "attention.json", help="the JSON file")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows = [row for row in (QUICK if options.quick else FULL) if not options.rows or row.name in options.rows]
    if options.task:
        json.dump(measure(rows[0], options.task), sys.stdout)
        return
    report = {"machine": machine(), "versions": versions(), "quick": options.quick, "rows": []}
    for row in rows:
        found = {task: child(row, task, options.quick) for task in TASKS}
        report["rows"].append({"name": row.name, "words": row.words, "length": row.length, "tasks": found})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.out)
    print(table(report))
    print(f"\nwritten to {options.out}")


def child(row: Row, task: str, quick: bool) -> dict[str, Any]:
    """Run one task in its own process; one that fails or runs out of time says so."""
    command = [sys.executable, "-m", "benchmarks.attention", "--rows", row.name, "--task", task]
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    try:
        done = subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            cwd=ROOT, env=os.environ | threads, capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failure": f"did not finish in {TIME_LIMIT} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failure": f"failed: {lines[-1] if lines else f'signal {-done.returncode} (out of memory?)'}"}
    return json.loads(done.stdout)


def measure(row: Row, task: str) -> dict[str, Any]:
    """Least CPU seconds of a window over several passes, after one that warms up, and what the passes add in memory."""
    from benchmarks.child import peak_bytes, timed

    model, token_ids = build(row)
    before = peak_bytes()
    run = runner(row, task, model, token_ids)
    first = timed(run)[1][0]
    times = [] if first < ENOUGH_SECONDS else [first]
    while sum(times) < ENOUGH_SECONDS and len(times) < MOST_RUNS:
        times.append(timed(run)[1][0])
    return {"cpu_seconds": min(times), "runs": len(times), "peak_bytes": peak_bytes() - before}


def build(row: Row) -> tuple[PreTrainedModel, Tensor]:
    """A model with random weights and eager attention, and one window (L,); the same at every call."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    common = {"vocab_size": row.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    sizes = {"num_hidden_layers": row.layers, "num_attention_heads": row.heads, "hidden_size": row.width}
    if row.key_heads:
        config = LlamaConfig(**sizes, **common, num_key_value_heads=row.key_heads, intermediate_size=4 * row.width)
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(**sizes, **common, n_positions=row.length))
    return model.eval(), torch.randint(0, row.vocabulary, (row.length,))


def runner(row: Row, task: str, model: PreTrainedModel, token_ids: Tensor) -> Callable[[], object]:
    """What is timed."""
    import torch

    from jacnorm.studies.attention.capture import capture
    from jacnorm.studies.attention.measure_probing import probed
    from jacnorm.studies.attention.settings import ProbingSettings

    if task == "metrics":
        changes = {"seeds": [0], "lengths": [row.length], **row.metrics}
        settings = ProbingSettings(**{**changes, "context": row.length, "model": "random"})
        labels = {"seed": 0, "data_set": "random", "model": "random"}
        return lambda: list(probed(model, token_ids[None], settings, labels))
    if task == "capture":
        return lambda: capture(model, token_ids, lambda layer: None)
    part = model if task == "plain" else model.base_model

    @torch.no_grad()
    def plain() -> None:
        output = part(input_ids=token_ids[None], output_attentions=True, use_cache=False)
        if len(output.attentions) != row.layers:
            raise RuntimeError("the plain pass did not return the attention of all layers")

    return plain


def table(report: dict[str, Any]) -> str:
    """The report in Markdown, with machine and versions above it."""
    info, found = report["machine"], report["versions"]
    lines = [
        f"{info['processor']}, {info['threads']} thread, {info['memory_bytes'] / 2**30:.0f} GiB; "
        + ", ".join(f"{name} {version}" for name, version in found.items())
        + (" (quick sizes)." if report["quick"] else "."),
        "",
        f"Aim: capture takes at most {AIM:g} times the plain pass.",
        "",
        "| model | pass | CPU s | tokens / s | plain = 1 | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        plain = row["tasks"]["plain"].get("cpu_seconds")
        for task, words in TASKS.items():
            answer = row["tasks"][task]
            if "failure" in answer:
                lines.append(f"| {row['words']} | {words} | {answer['failure']} | | | |")
                continue
            seconds = answer["cpu_seconds"]
            ratio = f"{seconds / plain:.2f}x" if plain else ""
            lines.append(
                f"| {row['words']} | {words} | {seconds:.3g} | {row['length'] / seconds:.4g} | {ratio} | "
                f"{answer['peak_bytes'] / 2**20:.0f} |"
            )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries involved."""
    names = ("torch", "transformers")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    main()
