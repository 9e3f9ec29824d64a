"""The command line says what a run is read from, and what lies beside it."""

import torch

import dynamics as dy

NAME = "layers.0.up_proj.weight"


def save(path, step):
    torch.manual_seed(step)
    torch.save({NAME: torch.randn(6, 4)}, path)


def shown(printed):
    code, out, err = printed
    assert (code, err) == (0, "")
    return " ".join(out.split())


def test_inspect_shows_what_is_read_and_what_is_passed_over(command, tmp_path):
    for name in ("step1000", "step2000", "final", "v2"):
        (tmp_path / "run" / name).mkdir(parents=True)
        save(tmp_path / "run" / name / "pytorch_model.bin", 1)
    out = shown(command("inspect", str(tmp_path / "run")))
    assert "read from step1000, step2000" in out
    assert "passed over v2: its name tells no step" in out
    assert "passed over final: neither its name nor its files tell a step" in out


def test_several_paths_are_analysed_as_one_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpts").mkdir()
    for step in (5, 20):
        save(tmp_path / f"ckpts/step_{step}.pt", step)
    save(tmp_path / "ckpts/final.pt", 1)
    for given in (["ckpts/step_5.pt", "ckpts/step_20.pt", "ckpts/final.pt"], ["ckpts/*.pt"]):
        out = shown(command("analyze", *given))
        assert "Saved to ckpts.analysis.zarr" in out
        assert "passed over final.pt: neither its name nor its files tell a step" in out
        assert dy.load("ckpts.analysis.zarr")["step"].values.tolist() == [5, 20]
    assert "read from step_5.pt, step_20.pt" in shown(command("inspect", *given))
