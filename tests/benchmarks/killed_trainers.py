"""Kills a recorded Trainer again and again: python tests/benchmarks/killed_trainers.py [N].

Each training is the same script: a Hugging Face Trainer with the recorder's callback at its
defaults, which resumes from the newest checkpoint, if there is one. It is sent SIGKILL after a
random time, until N (20) were killed. Afterwards every recording must open, verify, and hold what
it held before, as an undisturbed training has it: none may lose a record but by resuming, which
drops those after the checkpoint. A training that resumes must continue the recording of the one
that it resumes. When a training is through, the checkpoints move away and another one begins beside
its recording.
"""

import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

LAST, SAVED_EVERY = 40, 5


def train_and_record(folder, progress):
    """Train to step LAST, from the newest checkpoint in the folder; record each step."""
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from probes.frameworks.hf_trainer import RecorderCallback
    from tests.probes.frameworks.test_hf_trainer import CONFIG, Tokens

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            progress.value = state.global_step

    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=LAST,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=SAVED_EVERY,
        save_total_limit=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        LlamaForCausalLM(CONFIG),
        arguments,
        train_dataset=Tokens(),
        callbacks=[RecorderCallback(folder / "run.zarr", every=1), Progress()],
    )
    last = get_last_checkpoint(folder / "out") if (folder / "out").exists() else None
    trainer.train(resume_from_checkpoint=last)


def newest_checkpoint(out):
    """The newest complete checkpoint; incomplete ones, which the Trainer takes too, are removed."""
    steps = sorted(int(each.name.split("-")[1]) for each in out.glob("checkpoint-*"))
    for step in reversed(steps):
        # The state is the last of its files.
        state = out / f"checkpoint-{step}/trainer_state.json"
        try:
            json.loads(state.read_text())
            return step, state
        except (OSError, ValueError):
            shutil.rmtree(state.parent)
    return 0, None


def steps_of(store, truth):
    """The steps of a recording whose records are all those of the undisturbed training."""
    import numpy as np

    from dynamics.recordings import Recording, verify

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recording = Recording(store)
    assert not verify(recording).damaged, store
    for index, step in enumerate(recording.steps):
        for path in recording.paths:
            found = (
                recording.read(path, index) if path.startswith(("weight/", "gradient/")) else None
            )
            expected = None if found is None else truth.read(path, int(step))
            assert found is None or np.array_equal(found, expected), (store, path, step)
    return recording.steps.tolist()


def main(kills):
    """Print what was survived."""
    from dynamics.errors import FormatError
    from dynamics.recordings import Recording

    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(
        ["torch", "probes.frameworks.hf_trainer", "tests.probes.frameworks.test_hf_trainer"]
    )
    moment = random.Random(0)
    folder, progress = Path(tempfile.mkdtemp()), start.RawValue("i", 0)
    (folder / "truth").mkdir()
    whole = start.Process(target=train_and_record, args=(folder / "truth", progress))
    whole.start()
    whole.join()
    truth = Recording(folder / "truth/run.zarr")
    assert whole.exitcode == 0
    assert truth.steps.tolist() == list(range(LAST + 1))
    began, held, resumed, anew, finished, through = time.monotonic(), {}, 0, 0, 0, 0
    job = folder / "job"
    job.mkdir()
    while resumed + anew - finished < kills:
        step, state = newest_checkpoint(job / "out")
        if step == LAST:  # killed at its very end; resumed, the Trainer would make another step
            through += 1
            (job / "out").rename(job / f"out of {through}")
            step, state = 0, None
        noted = {} if state is None else json.loads(state.read_text())["stateful_callbacks"]
        name = noted.get("learning-dynamics recordings", {}).get("run.zarr")
        assert (step == 0) == (name is None), (step, noted)
        progress.value = 0
        process = start.Process(target=train_and_record, args=(job, progress))
        process.start()
        if moment.random() < 0.85:  # the others may be killed before their first step
            while process.is_alive() and progress.value <= step:
                time.sleep(0.001)
        process.join(moment.uniform(0, 1.5))
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), process.exitcode
        now = {}
        for store in sorted(job.glob("run*.zarr")):
            try:
                now[store.name] = steps_of(store, truth)
            except FormatError:  # it was killed before its first commit
                assert store.name not in held, store
        for each, before in held.items():
            kept = before if each != name else [at for at in before if at <= step]
            assert now[each][: len(kept)] == kept, (each, before, now[each])
            if each != name:
                assert now[each] == before, (each, before, now[each])
        new = [each for each in now if each not in held and now[each]]
        if name is not None:
            assert not new, (name, new)
            assert now[name][: step + 1] == list(range(step + 1)), (name, step, now[name])
            resumed += 1
        else:
            assert len(new) <= 1, new
            anew += 1
        written = name or (new[0] if new else None)
        if written is not None:
            assert now[written] == list(range(len(now[written])))
            # The training may be ahead by its queue, a pending record and the one being written.
            assert len(now[written]) - 1 >= progress.value - 5, (now[written], progress.value)
        held = now
        if process.exitcode == 0:
            finished, through = finished + 1, through + 1
            (job / "out").rename(job / f"out of {through}")
    print(
        f"{kills} trainings of the Trainer were killed and {finished} came to their end: {resumed} "
        f"had resumed their recording, {anew} had begun one; {len(held)} recordings; every "
        f"committed record as it should be; {time.monotonic() - began:.0f} s."
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
