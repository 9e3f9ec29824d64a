r"""What docs/relora_results.md is made from: the example `relora_micro`, out of the study's runs.

    python -m probes.relora sweep micro --method full_rank,relora,relora:as_published,lora \
        --steps 560 --seeds 0,1,2 --set save_every=80 --set learning_rate=1e-3 \
        --set other_learning_rate=0 --text TEXT --output RUNS
    python -m probes.relora evaluate RUNS/*/ --blimp BLIMP --text TEXTS --limit 100 --steps 560
    python docs/relora_results_data.py RUNS TEXT [SEEDS]

TEXT is the folder of training texts, BLIMP BLiMP's data folder, TEXTS a .jsonl file with an article
of WikiText-2's test set (split at top-level headings) as the `text` of each line. All methods of a
seed must be finished.

It takes the metrics that the page shows, in float32, and adds what each check of the audit says
and the losses around a restart (`probes.relora.restart_ablation`).
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import xarray as xr

import dynamics as dy
from dynamics import schema
from probes.relora.restart_ablation import restart_losses
from probes.relora.sweep import compare_runs
from probes.relora.sweep_plan import SweepRun, plan
from probes.relora.training.run_directory import RECORDING_NAME

EXAMPLE = Path(__file__).parents[1] / "dynamics" / "analysis" / "examples" / "relora_micro.zip"
METHODS = ("full_rank", "relora", "relora:as_published", "lora")
SEEDS = (0, 1, 2)
STEPS = 560
RESTART_AT = 240  # the third merge of six
KINDS = (
    schema.WEIGHT,
    schema.BASE,
    schema.ADAPTER,
    schema.GRADIENT,
    schema.UPDATE,
    schema.DISPLACEMENT,
)
METRICS = (
    "effective_rank",
    "proportional_effective_rank",
    "rank_bound",
    "rank_bound_use",
    "stable_rank",
    "numerical_rank",
    "condition_number",
    "condition_number_raw",
    "spectral_norm",
    "frobenius_norm",
)


def collect(runs: list[SweepRun], folder: Path, text: Path) -> xr.Dataset:
    """The comparison of the study's runs, with their audits and the losses around a restart."""
    found = compare_runs(
        runs,
        folder,
        kinds=KINDS,
        metrics=METRICS,
        components=("parameters", "pico_ov_circuit"),
        steps=range(0, STEPS + 1, 20),
    )
    # Spectra of the displacement at the end; all others would be most of the file.
    last = (found[schema.KIND] == schema.DISPLACEMENT) & (found[schema.STEP] == STEPS)
    found[schema.SINGULAR_VALUE] = found[schema.SINGULAR_VALUE].where(last)
    found = found.drop_vars(schema.SINGULAR_VALUE_ERROR)
    found = found.map(lambda each: each.astype(np.float32) if each.dtype == np.float64 else each)
    found["restart_loss"] = _restarts(runs, folder, text)
    audits = {run.name: dy.audit(folder / run.name / RECORDING_NAME) for run in runs}
    verdicts = {
        name: {each.check: [each.severity, each.worst.meaning] for each in report.summaries}
        for name, report in audits.items()
    }
    kept = {
        name: found.attrs[name]
        for name in ("format", "format_version", "versions", "events", "problems")
        if name in found.attrs
    }
    return found.drop_attrs(deep=False).assign_attrs(
        kept,
        source="the reference experiment at the size micro, docs/relora_results.md",
        audits=json.dumps(verdicts),
    )


def _restarts(runs: list[SweepRun], folder: Path, text: Path) -> xr.DataArray:
    """(run, restart, after), of the ReLoRA runs that merge with their scale."""
    chosen = [run for run in runs if run.varied["method"] == "relora"]
    losses = [_restart(folder / run.name, text) for run in chosen]
    found = xr.concat(losses, xr.Variable(schema.RUN, [run.name for run in chosen]))
    return found.reindex({schema.RUN: [run.name for run in runs]})


def _restart(run: Path, text: Path) -> xr.DataArray:
    """The losses of one run, kept beside it: they take minutes."""
    kept = run / f"restart-{RESTART_AT}.json"
    if not kept.is_file():
        kept.write_text(json.dumps(restart_losses(run, RESTART_AT, text=text).to_dict()))
    return xr.DataArray.from_dict(json.loads(kept.read_text()))


def main(folder: Path, text: Path, seeds: tuple[int, ...]) -> None:
    """Write the example."""
    words = [f"max_steps={STEPS}", "save_every=80", "learning_rate=1e-3"]
    words += ["other_learning_rate=0", "dataset=none", "tokenizer=none"]
    runs = plan("micro", methods=METHODS, words=words, seeds=seeds)
    with tempfile.TemporaryDirectory() as working:
        dy.save(collect(runs, folder, text), Path(working) / f"{EXAMPLE.stem}.zarr")
        shutil.make_archive(str(EXAMPLE.with_suffix("")), "zip", working)
    print(f"Wrote {EXAMPLE}, {EXAMPLE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    chosen = tuple(map(int, sys.argv[3].split(","))) if len(sys.argv) > 3 else SEEDS
    main(Path(sys.argv[1]), Path(sys.argv[2]), chosen)
