"""Tests that runs with non-finite numbers end with one line and leave a finite checkpoint that resumes."""

import json
import math
import os
import re
import signal

import pytest
import torch

import train
from configurator import RunFailed
from conftest import read_rows
from data import TokenData
from engine import checkpoint


def load(out_dir):
    return checkpoint.load(out_dir, say=lambda text: None)


def assert_finite(saved):
    assert all(tensor.isfinite().all() for tensor in checkpoint.flatten_checkpoint(saved).values())


def test_a_non_finite_validation_loss_ends_the_run_unsaved(tiny, tmp_path):
    """The loss and the gradient of the update that spoils the weights are finite."""
    with pytest.raises(
        RunFailed, match=r"step \d: val_loss nan; .*this step is not saved.*ckpt.pt of step \d;.*lower lr"
    ):
        train.main([*tiny, "--lr=1e30", "--warmup_steps=0", "--eval_interval=1"])
    saved = load(tmp_path / "run")
    assert_finite(saved)
    rows = read_rows(tmp_path / "run")
    assert saved["step"] == rows[-1]["step"] and all(math.isfinite(row["val_loss"]) for row in rows)
    train.main([*tiny, "--eval_interval=1", "--resume", "--lr=1e-6", f"--max_steps={saved['step'] + 1}"])


def test_a_non_finite_last_evaluation_is_a_failure(tiny, monkeypatch):
    monkeypatch.setattr(
        train.TokenTask, "evaluate", lambda task, trainer: {"val_loss": [1.0, math.inf][trainer.state["step"] > 0]}
    )
    with pytest.raises(RunFailed, match="step 4: val_loss inf"):
        train.main([*tiny, "--max_steps=4"])


def test_a_signal_does_not_make_a_run_save_non_finite_weights(tiny, tmp_path, monkeypatch):
    """It comes between two evaluations, before anything else has noticed the bad update."""
    batch = TokenData.train_batch

    def ask_in_step_7(self, seed, step, *place):
        if step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return batch(self, seed, step, *place)

    step_optimizers = train.Trainer.step_optimizers

    def spoil_in_step_7(self):
        norm = step_optimizers(self)
        if self.state["step"] == 6:
            self.model.blocks[1].ffn_norm.weight.data[3] = math.inf
        return norm

    monkeypatch.setattr(TokenData, "train_batch", ask_in_step_7)
    monkeypatch.setattr(train.Trainer, "step_optimizers", spoil_in_step_7)
    with pytest.raises(
        RunFailed, match=r"step 7: model.blocks.1.ffn_norm.weight holds inf or NaN; .*ckpt.pt of step 0;"
    ):
        train.main(tiny)
    assert_finite(load(tmp_path / "run"))


@pytest.mark.parametrize("bad_steps", [range(99), (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)])
def test_float16_gradients_that_are_never_finite_end_the_run(tiny, tmp_path, monkeypatch, bad_steps):
    """GradScaler skips such updates and lowers its factor, so a few in a row are normal."""
    run_passes = train.Trainer.run_passes

    def spoil(self, *batch):
        losses = run_passes(self, *batch)
        if self.state["step"] in bad_steps:
            next(self.model.parameters()).grad[0] = math.nan
        return losses

    monkeypatch.setattr(train.Trainer, "run_passes", spoil)
    monkeypatch.setattr(train, "MOST_SKIPPED", 6)
    argv = [*tiny, "--dtype=float16", "--max_steps=12", "--batch_tokens=128"]
    if len(bad_steps) < 12:
        train.main(argv)
        assert ["grad_norm" in row for row in read_rows(tmp_path / "run")[1:]] == [
            n not in bad_steps for n in range(12)
        ]
        return
    with pytest.raises(
        RunFailed, match=r"step 6: the gradients of 6 updates in a row .*float16.*of step 0;.*--dtype=float32"
    ):
        train.main(argv)
    monkeypatch.undo()
    train.main([*argv, "--resume", "--dtype=float32", "--max_steps=2"])  # the remedy


def test_a_run_resumes_from_the_last_finite_checkpoint(tiny, tmp_path, capsys):
    """The newest checkpoint holds NaN."""
    train.main(tiny)
    path = tmp_path / "run" / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    saved["model"]["final_norm.weight"][0] = math.nan
    torch.save(saved, path)
    log = read_rows(tmp_path / "run")
    train.main([*tiny, "--resume"])
    out = capsys.readouterr().out
    assert re.search(r"ckpt.pt is not a whole checkpoint \(.*model.final_norm.weight holds inf or NaN\): skipped", out)
    assert load(tmp_path / "run")["step"] == 20
    keys = ("step", "loss", "val_loss")
    assert [[r.get(k) for k in keys] for r in read_rows(tmp_path / "run")] == [[r.get(k) for k in keys] for r in log]


def test_files_left_by_a_killed_start_are_set_aside_with_the_run(tiny, tmp_path, monkeypatch):
    """config.json is first written under another name, which a kill leaves behind."""

    class Killed(BaseException):
        pass

    def killed(options, file, **how):
        file.write("{")
        raise Killed

    train.main([*tiny, "--max_steps=1"])
    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", killed)
        patch.setattr(os, "remove", lambda path: None)  # after SIGKILL nothing is tidied up
        with pytest.raises(Killed):
            train.main([*tiny, "--max_steps=2", "--resume"])
    left = [name for name in os.listdir(tmp_path / "run") if name.startswith("config.json.")]
    assert len(left) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_steps"] == 1
    train.main([*tiny, "--max_steps=2"])
    assert not [name for name in os.listdir(tmp_path / "run") if name.endswith(".part")]
    assert left[0] in os.listdir(tmp_path / "run.1")
