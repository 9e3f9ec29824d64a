"""lm-evaluation-harness on local files: its BLiMP tasks, models and scoring as they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

_TEMPLATE = Path(lm_eval.tasks.__file__).parent / "blimp" / "_template_yaml"


def harness_blimp(
    model: Any,
    tokenizer: Any,
    folder: Path,
    names: Sequence[str],
    *,
    delimiter: str,
    limit: int | None,
    cache: Path,
) -> dict[str, tuple[float, np.ndarray]]:
    """Paradigm -> (its accuracy, (n, 2) summed log-probabilities), as the harness has them.

    Args:
        model: a transformers model.
        tokenizer: its transformers tokenizer.
        folder: holds NAME.jsonl.
        names: the paradigms.
        delimiter: what it puts before each sentence, " " by default there.
        limit: the first so many pairs of each.
        cache: a folder for the library `datasets`.
    """
    template = yaml.safe_load(_TEMPLATE.read_text())
    tasks = [
        {
            **template,
            "task": f"blimp_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"train": str((folder / f"{name}.jsonl").resolve())},
                "cache_dir": str(cache),
            },
            "target_delimiter": delimiter,
        }
        for name in names
    ]
    found = simple_evaluate(
        harness_model(model, tokenizer),
        tasks=tasks,
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # reading its 13,000 takes seconds
    )
    assert found is not None
    scores = {}
    for name in names:
        samples = sorted(found["samples"][f"blimp_{name}"], key=lambda each: each["doc_id"])
        sums = [[answer[0][0] for answer in each["resps"]] for each in samples]
        scores[name] = (found["results"][f"blimp_{name}"]["acc,none"], np.array(sums))
    return scores


def harness_model(model: Any, tokenizer: Any) -> HFLM:
    # Its cache of logits takes windows of a repetitive text for one that differ in their targets.
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=16, device="cpu", logits_cache=False
    )
