"""Tests that other optimizers can replace the project's own, against unbroken runs and runs on one process.

The example is what a researcher might add: two torch optimizers that share the parameters. Only
optim.make_optimizers is replaced.
"""

import os
import shutil

import pytest
import torch

import train
from conftest import losses, run_forked
from engine import checkpoint
from model import GPT
from optim import Optimizers, adamw, lr_multipliers, make_optimizers, parameter_groups
from options import GPTConfig, RunConfig

CONFIG = dict(vocab_size=96, n_layer=1, n_head=2, d_model=36, block_size=32)
BATCH = torch.randint(96, (2, 4, 32), generator=torch.Generator().manual_seed(3))


def sgd_and_adamw(model, config, multipliers=None):
    """Momentum SGD for matrices and cores, AdamW for the rest."""
    multipliers = multipliers or lr_multipliers(model)
    named = list(model.named_parameters())
    matrices = parameter_groups([item for item in named if item[1].dim() >= 2], multipliers, 0.0)
    rest = parameter_groups([item for item in named if item[1].dim() < 2], multipliers, 0.0)
    parts = [torch.optim.SGD(matrices, lr=1.0, momentum=0.9), adamw(rest, config.lr, (0.9, config.beta2))]
    return Optimizers(model, parts, multipliers)


SCRIPT = """
import sys
import train
from test_optimizers import sgd_and_adamw

train.make_optimizers = sgd_and_adamw
train.main(sys.argv[1:])
"""


@pytest.fixture
def two_optimizers(tiny, monkeypatch):
    """Arguments for a tiny run, which these two optimizers train."""
    monkeypatch.setattr(train, "make_optimizers", sgd_and_adamw)
    return [*tiny, "--micro_batch=2", "--schedule=constant"]


def test_a_run_with_two_optimizers_trains_and_resumes_bit_for_bit(two_optimizers, tmp_path):
    train.main([*two_optimizers, "--keep_every=7"])
    val = losses(tmp_path / "run", "val_loss")
    assert val[20] < val[0] - 0.5
    saved = checkpoint.load(tmp_path / "run")["optimizer"]
    assert set(saved["blocks.0.attn.q.cores.0"]) == {"momentum_buffer"}
    assert set(saved["final_norm.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    os.makedirs(tmp_path / "half")
    shutil.copy(tmp_path / "run" / "ckpt_step7.pt", tmp_path / "half" / "ckpt.pt")
    train.main([*two_optimizers, f"--out_dir={tmp_path}/half", "--resume"])
    for key in ("loss", "val_loss", "grad_norm"):
        want, got = losses(tmp_path / "run", key), losses(tmp_path / "half", key)
        assert max(got) == 20 and all(got[step] == want[step] for step in got)


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_one_process_resumes_from_two_and_equals_a_run_on_one(two_optimizers, tmp_path, shard):
    train.main([*two_optimizers, f"--out_dir={tmp_path}/one"])
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_forked(tmp_path / "script.py", *two_optimizers, f"--shard={shard}", "--max_steps=10", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    train.main([*two_optimizers, "--resume"])
    for key in ("loss", "val_loss", "grad_norm"):
        want, got = losses(tmp_path / "one", key), losses(tmp_path / "run", key)
        assert got.keys() == want.keys() and all(got[step] == pytest.approx(want[step], rel=1e-3) for step in want), key


def test_an_overflow_in_one_part_skips_the_step_of_all():
    model = GPT(GPTConfig(**CONFIG))
    optimizers = sgd_and_adamw(model, RunConfig())
    optimizers.set_lr(1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    for finite in (False, True):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if not finite:
            model.final_norm.weight.grad[0] = torch.inf  # a parameter of AdamW
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizers)
        scaler.step(optimizers)
        scaler.update()
        assert all(torch.equal(p, old) != finite for p, old in zip(model.parameters(), before))


def one_step(model, optimizers):
    model(*BATCH)[1].backward()
    optimizers.step()
    optimizers.zero_grad()


def adafactor(model, config):
    """An optimizer whose state has other shapes than the parameters: one row and one column each."""
    named, multipliers = model.named_parameters(), lr_multipliers(model)
    part = torch.optim.Adafactor([p for _, p in named], lr=config.lr)
    for group in part.param_groups:
        group["lr_mult"] = 1.0
    return Optimizers(model, [part], multipliers)


@pytest.mark.parametrize("make", [make_optimizers, sgd_and_adamw, adafactor])
def test_state_of_any_shape_is_saved_and_restored(make, tmp_path):
    results = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**CONFIG))
        optimizers = make(model, RunConfig(lr=1e-2))
        if resumed:
            checkpoint.restore(checkpoint.load(str(tmp_path)), model, optimizers)
        else:
            one_step(model, optimizers)
            plain = {
                "step": 1,
                "seconds": 0.0,
                "best_val_loss": 1.0,
                "wandb_id": None,
                "config": {},
                "meta": {},
                "scaler": {},
            }
            state = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
            checkpoint.save(str(tmp_path), {**plain, **state})
        one_step(model, optimizers)
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_state_that_is_no_tensor_is_refused_by_name():
    model = torch.nn.Linear(3, 3, bias=False)
    optimizers = make_optimizers(model, RunConfig(), {"weight": 1.0})
    optimizers.parts[0].state[model.weight]["count"] = 3
    with pytest.raises(TypeError, match="count=3 of weight: make it a tensor"):
        optimizers.state_dict()
