"""Tests the training loop with real runs of a tiny model on the CPU, against unbroken runs and plain float64 loops."""

import fcntl
import functools
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from configurator import ConfigError, RunFailed
from conftest import FILES_OF_A_RUN, environment, losses, read_rows, run_forked, run_script, start_script
from data import TokenData
from engine import checkpoint, heartbeat, parallel, runlog
from engine.device import choose_device, choose_dtype, peak_flops
from sample import load_model
from train import TrainConfig, lr_at


@pytest.fixture(scope="module")
def unbroken(char_data, tmp_path_factory):
    """The out_dir of an unbroken run of 20 steps, two micro-batches of 4 each."""
    folder = str(tmp_path_factory.mktemp("unbroken") / "run")
    options = dict(
        data_dir=char_data, out_dir=folder, vocab_size=96, n_layer=2, n_head=2, d_model=36, block_size=32, micro_batch=4,
        batch_tokens=256, max_steps=20, eval_interval=10, eval_tokens=1000, log_interval=1, warmup_steps=5, lr=5e-3,
        device="cpu", compile=False, dropout=0.1,
    )  # fmt: skip
    train.main([f"--{key}={value}" for key, value in options.items()])
    return folder


# -- schedules


def rates_of_schedule(**kwargs):
    config = TrainConfig(
        vocab_size=96, d_model=36, n_head=2, max_steps=100, warmup_steps=10, lr=1.0, min_lr_ratio=0.1, **kwargs
    )
    return [lr_at(step, config) for step in range(100)]


def test_schedules_have_the_right_rates_at_their_corners():
    cosine, constant, wsd = (rates_of_schedule(schedule=name) for name in ("cosine", "constant", "wsd"))
    for rates in (cosine, constant, wsd):
        assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
        assert all(a < b for a, b in zip(rates[:9], rates[1:10]))
    assert constant[10:] == [1.0] * 90
    assert cosine[55] == pytest.approx(0.55) and cosine[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in zip(cosine[10:], cosine[11:]))
    assert (
        wsd[10:81] == [1.0] * 71
        and wsd[90] == pytest.approx(0.1 + 0.9 * 0.5)
        and wsd[99] == pytest.approx(0.1 + 0.9 / 20)
    )


# -- a run learns, and leaves its files


def test_a_run_learns_and_leaves_its_files(unbroken):
    assert sorted(os.listdir(unbroken)) == FILES_OF_A_RUN
    rows = read_rows(unbroken)
    assert [row["step"] for row in rows] == list(range(21))
    val = losses(unbroken, "val_loss")
    assert list(val) == [0, 10, 20] and val[0] == pytest.approx(math.log(96), abs=1e-4) and val[20] < 3
    model, _ = load_model(unbroken)
    last = rows[-1]
    assert last["tokens"] == 20 * 256 and last["flops"] == 20 * 256 * 3 * model.flops_per_token()
    assert last["seconds"] > 0 and last["tokens_per_second"] > 0 and last["grad_norm"] > 0 and "mfu" not in last
    with open(os.path.join(unbroken, "config.json")) as file:
        assert json.load(file)["structure"] == "btt"
    with open(os.path.join(unbroken, "loss.png"), "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_validation_loss_is_the_mean_over_tokens(unbroken, char_data):
    """The reference is a plain float64 loop over single rows that divides by the number of tokens."""
    model, _ = load_model(unbroken)
    model.double()
    data = TokenData(char_data, 32)
    total = count = 0
    for offset in data.val_rows(1000):
        x, y = data.val_batch([offset])
        with torch.no_grad():
            total += F.cross_entropy(model(x)[0][0], y[0], reduction="sum").item()
        count += y.numel()
    assert count == 31 * 32  # not a multiple of the micro-batch of 4 rows
    assert losses(unbroken, "val_loss")[20] == pytest.approx(total / count, abs=1e-5)


def test_every_rank_evaluates_its_share(char_data, monkeypatch):
    """Of 31 rows, rank 0 takes 16 and rank 1 the other 15."""
    config = TrainConfig(
        data_dir=char_data,
        vocab_size=96,
        d_model=36,
        n_head=2,
        n_layer=1,
        block_size=32,
        micro_batch=4,
        eval_tokens=1000,
    )
    data, model, cpu = TokenData(char_data, 32), train.GPT(config), torch.device("cpu")
    trainer = train.Trainer(config, train.TokenTask(config, cpu, data), cpu)
    monkeypatch.setattr(train.dist, "all_reduce", lambda tensor: None)
    trainer.task.world = 2
    seen = {}
    for rank in (0, 1):
        rows = seen[rank] = []

        def counting(x, y, rows=rows):
            rows += [tuple(row.tolist()) for row, targets in zip(x, y) if targets[0] != -1]
            return model(x, y)

        counting.eval = counting.train = lambda: None
        trainer.compiled_model, trainer.task.rank = counting, rank
        trainer.task.evaluate(trainer)
    assert [len(seen[0]), len(seen[1])] == [16, 15]
    assert sorted(seen[0] + seen[1]) == sorted(tuple(row.tolist()) for row in data.val_batch(data.val_rows(1000))[0])


@pytest.mark.parametrize("how", ["True", "blocks"])
def test_a_compiled_models_checkpoint_uses_the_models_own_names(tiny, tmp_path, monkeypatch, how):
    # This backend wraps the model like the default one, and saves a minute of compiling C++.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    train.main([*tiny, "--max_steps=2", f"--compile={how}"])
    saved = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    model, _ = load_model(str(tmp_path / "run"))
    assert set(saved["model"]) == set(model.state_dict()) and not any("_orig_mod" in name for name in saved["model"])
    assert set(saved["optimizer"]) == {name for name, _ in model.named_parameters()}
    assert saved["step"] == 2 and saved["best_val_loss"] < 5


def test_compiled_blocks_share_a_graph_and_change_nothing(tiny, tmp_path, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    train.main(
        [
            *tiny,
            "--max_steps=3",
            "--eval_interval=100",
            "--n_layer=4",
            f"--out_dir={tmp_path}/blocks",
            "--compile=blocks",
        ]
    )
    assert len(graphs) == 2  # one for all blocks in training, one in evaluation
    train.main([*tiny, "--max_steps=3", "--eval_interval=100", "--n_layer=4"])
    compiled, plain = losses(tmp_path / "blocks"), losses(tmp_path / "run")
    assert compiled.keys() == plain.keys() and all(
        compiled[step] == pytest.approx(plain[step], rel=1e-6) for step in plain
    )


def test_a_run_shorter_than_the_interval_ends_with_an_evaluation_and_a_checkpoint(tiny, tmp_path):
    train.main([*tiny, "--max_steps=3", "--eval_interval=100"])
    assert list(losses(tmp_path / "run", "val_loss")) == [0, 3]
    assert checkpoint.load(tmp_path / "run")["step"] == 3


def test_without_checkpoints_a_run_leaves_its_log_and_picture(tiny, tmp_path, unbroken, capsys):
    train.main([*tiny, "--dropout=0.1", "--save=False"])
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "log.jsonl", "loss.png", "run.lock"]
    for key in ("loss", "val_loss", "grad_norm"):
        assert losses(tmp_path / "run", key) == losses(unbroken, key)
    assert "ckpt" not in capsys.readouterr().out


def test_a_second_run_sets_the_first_aside(tiny, tmp_path, capsys):
    for _ in range(2):
        train.main([*tiny, "--max_steps=1"])
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1"]
    assert "moved to" in capsys.readouterr().out


def test_a_run_without_checkpoints_is_set_aside_too(tiny, tmp_path):
    rows = []
    for lr in (1e-3, 1e-4):
        train.main([*tiny, "--max_steps=1", "--save=False", f"--lr={lr}"])
        rows.append(read_rows(tmp_path / "run"))
    assert read_rows(tmp_path / "run.1") == rows[0] != rows[1]
    assert sorted(os.listdir(tmp_path / "run.1")) == ["config.json", "log.jsonl", "loss.png"]
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1"]


# -- further checkpoints, and what a run starts from


def test_keep_best_and_keep_every_keep_the_checkpoints_of_their_steps(tiny, tmp_path, monkeypatch):
    """Made-up validation losses put the best step before the newest two checkpoints."""
    values = iter([5.0, 3.0, 2.0, 4.0, 2.5])
    monkeypatch.setattr(train.TokenTask, "evaluate", lambda *arguments: {"val_loss": next(values)})
    train.main([*tiny, "--eval_interval=5", "--keep_best", "--keep_every=7"])
    run = tmp_path / "run"
    kept = {name: checkpoint.load(run / name) for name in sorted(os.listdir(run)) if name.startswith("ckpt")}
    assert {name: saved["step"] for name, saved in kept.items()} == {
        "ckpt.pt": 20, "ckpt_best.pt": 10, "ckpt_prev.pt": 15, "ckpt_step14.pt": 14, "ckpt_step7.pt": 7
    }  # fmt: skip
    assert kept["ckpt_best.pt"]["best_val_loss"] == 2.0
    model, _ = load_model(str(run / "ckpt_step7.pt"))  # sample.py and lab.convert read it like this
    assert all(torch.equal(tensor, kept["ckpt_step7.pt"]["model"][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("how", ["signal", "clock"])
def test_a_signal_and_save_minutes_save_between_evaluations(tiny, tmp_path, monkeypatch, how, capsys):
    """SIGUSR1 in step 7, and the clock after every step: the step in progress is saved, and training continues."""
    original, seen = TokenData.train_batch, {}

    def batch(self, seed, step, *rest):
        if how == "signal" and step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        saved = checkpoint.load(tmp_path / "run")
        seen[step] = saved["step"]
        return original(self, seed, step, *rest)

    monkeypatch.setattr(TokenData, "train_batch", batch)
    train.main([*tiny, *(["--save_minutes=1e-9"] if how == "clock" else [])])
    if how == "signal":
        assert [seen[step] for step in (6, 7, 9, 10, 19)] == [0, 7, 7, 10, 10]
        assert capsys.readouterr().out.count("asked to save: after this step") == 1
    else:
        assert seen == {step: step for step in range(20)}
    assert max(losses(tmp_path / "run")) == 20


def test_a_run_resumed_from_between_evaluations_equals_an_unbroken_one(tiny, tmp_path, unbroken):
    words = [*tiny, "--dropout=0.1"]
    train.main([*words, "--keep_every=7"])
    os.makedirs(tmp_path / "half")
    shutil.copy(tmp_path / "run" / "ckpt_step7.pt", tmp_path / "half" / "ckpt.pt")
    train.main([*words, f"--out_dir={tmp_path}/half", "--resume"])
    got, want = losses(tmp_path / "half"), losses(unbroken)
    assert list(got) == list(range(8, 21)) and all(got[step] == pytest.approx(want[step], rel=1e-6) for step in got)


@pytest.mark.parametrize("option", ["save_minutes=5.0", "keep_every=5", "keep_best=True"])
def test_options_about_saving_are_refused_without_checkpoints(tiny, option):
    with pytest.raises(ConfigError, match=f"^{option} with save=False"):
        train.main([*tiny, "--save=False", f"--{option}"])


def test_a_run_starts_from_the_weights_of_another(tiny, tmp_path, unbroken, capsys):
    """It starts at step 0 with a new schedule and new moments, and equals a run that resumes from hand-made step 0."""
    words = [*tiny, "--lr=1e-3", "--seed=5", "--max_steps=10"]
    train.main([*words, f"--init_from={unbroken}"])
    assert "weights of step 20 of" in capsys.readouterr().out
    rows = read_rows(tmp_path / "run")
    assert rows[0]["step"] == 0 and rows[0]["val_loss"] == pytest.approx(losses(unbroken, "val_loss")[20], rel=1e-6)
    assert rows[1]["lr"] == pytest.approx(1e-3 / 5) and rows[1]["loss"] < 3
    saved = checkpoint.load(unbroken)
    blank = {**saved, "step": 0, "optimizer": {}, "seconds": 0.0, "best_val_loss": math.inf}
    os.makedirs(tmp_path / "hand")
    torch.save(blank, tmp_path / "hand" / "ckpt.pt")
    train.main([*words, f"--out_dir={tmp_path}/hand", "--resume"])
    assert losses(tmp_path / "hand") == losses(tmp_path / "run")
    # A resumed run takes its own weights and ignores init_from.
    train.main([*words, f"--init_from={unbroken}", "--max_steps=12", "--resume"])
    assert "resuming from step 10" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--n_layer=1", "--n_head=1"], ["holds another model", "give --n_layer=2 --n_head=2"]),
        (["--init_from=nowhere"], ["init_from=nowhere holds no checkpoint"]),
        (["--init_from=scratch"], ["init_from=scratch", "leave it out"]),
        (["--init_from=resume"], ["init_from=resume", "--resume"]),
        (["--init_from=gpt2-xl"], ["init_from=gpt2-xl", "python -m lab.convert --source=gpt2-xl --structure=dense"]),
        (["--out_dir={unbroken}"], ["init_from=", "give another out_dir"]),
        (["--out_dir={unbroken}", "--init_from={unbroken}/ckpt_prev.pt"], ["init_from=", "give another out_dir"]),
    ],
)
def test_init_from_is_refused_where_a_run_cannot_start_from_it(tiny, unbroken, words, expected):
    before = sorted(os.listdir(unbroken))
    with pytest.raises(ConfigError) as caught:
        train.main([*tiny, f"--init_from={unbroken}", *(word.format(unbroken=unbroken) for word in words)])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in expected), message
    assert sorted(os.listdir(unbroken)) == before


class NanoGPT(torch.nn.Module):
    """nanoGPT's model, rebuilt from the names and shapes of its state_dict: one product computes q, k and v."""

    def __init__(self, layers, heads, width, context, vocabulary, bias, gelu):
        super().__init__()
        self.heads, self.gelu = heads, gelu
        linear, norm = functools.partial(torch.nn.Linear, bias=bias), functools.partial(torch.nn.LayerNorm, bias=bias)

        def attention():
            return torch.nn.ModuleDict(dict(c_attn=linear(width, 3 * width), c_proj=linear(width, width)))

        def mlp():
            return torch.nn.ModuleDict(dict(c_fc=linear(width, 4 * width), c_proj=linear(4 * width, width)))

        self.transformer = torch.nn.ModuleDict(
            dict(
                wte=torch.nn.Embedding(vocabulary, width),
                wpe=torch.nn.Embedding(context, width),
                h=torch.nn.ModuleList(
                    torch.nn.ModuleDict(dict(ln_1=norm(width), attn=attention(), ln_2=norm(width), mlp=mlp()))
                    for _ in range(layers)
                ),
                ln_f=norm(width),
            )
        )
        self.lm_head = torch.nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx):
        t = self.transformer
        x = t.wte(idx) + t.wpe(torch.arange(idx.shape[1]))
        for block in t.h:
            q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
            weights = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = weights.masked_fill(torch.ones_like(weights[0, 0]).triu(1).bool(), -math.inf).softmax(dim=-1)
            x = x + block.attn.c_proj((weights @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate=self.gelu))
        return self.lm_head(t.ln_f(x))


@pytest.mark.parametrize("bias, prefix", [(True, "_orig_mod."), (False, "")])
def test_a_nanogpt_checkpoint_gives_the_same_logits_and_can_start_a_run(tiny, tmp_path, bias, prefix, capsys):
    torch.manual_seed(1)
    theirs = NanoGPT(2, 2, 36, 32, 96, bias, "tanh")
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    args = dict(n_layer=2, n_head=2, n_embd=36, block_size=32, bias=bias, vocab_size=96, dropout=0.0)
    saved = {
        "model": {prefix + name: tensor for name, tensor in theirs.state_dict().items()},
        "optimizer": torch.optim.AdamW(theirs.parameters()).state_dict(), "model_args": args, "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare_char"},
    }  # fmt: skip
    os.makedirs(tmp_path / "nano")
    path = tmp_path / "nano" / "ckpt.pt"
    torch.save(saved, path)
    ours, meta = load_model(str(path))
    idx = torch.randint(96, (3, 32))
    torch.testing.assert_close(ours(idx)[0], theirs(idx), rtol=0, atol=1e-5)
    exact = NanoGPT(2, 2, 36, 32, 96, bias, "none")
    exact.load_state_dict(theirs.state_dict())
    assert 3e-5 < (exact(idx) - ours(idx)[0]).abs().max() < 1e-3  # nanoGPT's newest version has the exact GELU
    # A run can start from its weights, but never resumes from it.
    model = [f"--bias={bias}", "--parametrization=standard", "--structure=dense", "--max_steps=1"]
    train.main([*tiny, *model, f"--init_from={path}"])
    assert "weights of step 0" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give.* --parametrization=standard --structure=dense"):
        train.main([*tiny, f"--init_from={path}"])
    with pytest.raises(RunFailed, match="no whole checkpoint"):
        train.main([*tiny, *model, f"--out_dir={tmp_path}/nano", "--resume"])
    assert f"it is nanoGPT's: --init_from={path} starts from it" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="tokenizer .*nanoGPT's meta.pkl"):
        train.tokenizer_of(meta)


# -- devices


class NoFloat64(TorchDispatchMode):
    """Raises the error with which Apple's GPU refuses float64, here for every tensor on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{function}: Cannot convert a MPS Tensor to float64 dtype")
        return result


@pytest.mark.parametrize("script", ["train", "vision.train", "vision.regression"])
def test_a_run_needs_no_float64(tiny, tmp_path, unbroken, script):
    words = [*tiny, "--dropout=0.1", "--weight_decay=0.1"]
    if script != "train":
        words = ["--device=cpu", "--compile=False", "--max_steps=2", f"--out_dir={tmp_path}/run"]
        words += ["--dataset=digits", "--batch_size=32", "--micro_batch=32", "--d_model=16"][
            : 4 if "train" in script else 0
        ]
    if script == "vision.train":
        words += ["--image_size=8", "--channels=1", "--n_classes=10", "--structured_layers=ffn", "--crop_padding=1"]
    if script == "vision.regression":
        words += ["--d_model=16", "--batch_size=32", "--micro_batch=32", "--eval_inputs=64", "--teacher_width=8"]
    with NoFloat64():
        with pytest.raises(TypeError, match="float64"):  # the stand-in works
            torch.zeros(2, dtype=torch.float64)
        importlib.import_module(script).main(words)
    if script == "train":
        assert losses(tmp_path / "run", "val_loss") == pytest.approx(losses(unbroken, "val_loss"), rel=1e-6)


def test_auto_takes_the_best_device_and_a_missing_one_is_refused(monkeypatch):
    def choose(name, cuda=False, mps=False, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return choose_device(name).type

    assert choose("auto") == "cpu" and choose("auto", mps=True) == "mps"
    assert choose("auto", mps=True, processes=2) == "cpu" and choose("mps", mps=True) == "mps"
    assert choose_dtype("auto", torch.device("mps")) == torch.float32
    for name, message in (
        ("cuda", "torch sees no GPU: take --device=cpu"),
        ("mps", "torch sees no Apple GPU: take --device=cpu"),
        ("meta", "device='meta' is unknown: auto, cuda, cpu or mps"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(name)
    with pytest.raises(ConfigError, match="for one process, there are 2"):
        choose("mps", mps=True, processes=2)


def test_a_missing_compiler_is_one_clear_line(tiny, monkeypatch):
    from torch._inductor import config, cpp_builder

    torch._dynamo.reset()
    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(cpp_builder.get_cpp_compiler, "cache_clear") else None
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError) as caught:
        train.main([*tiny, "--compile=True"])
    message = str(caught.value)
    assert (
        message.startswith("torch.compile has no compiler (") and "--compile=False" in message and "\n" not in message
    )


# -- resuming


def test_a_killed_and_resumed_run_equals_an_unbroken_one(tiny, tmp_path, capsys):
    """SIGKILL comes some steps after the checkpoint of step 10."""
    arguments = [*tiny, "--max_steps=60", "--dropout=0.1"]
    train.main([*arguments, f"--out_dir={tmp_path}/unbroken"])
    process = start_script("train.py", *arguments)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if log.exists() and any(row["step"] >= 12 for row in runlog.read_log(log)):
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    killed_at = max(row["step"] for row in runlog.read_log(log))
    saved_at = checkpoint.load(tmp_path / "run")["step"]
    assert 10 <= saved_at < 60 and 12 <= killed_at < 60, "the run ended before it could be killed"
    train.main([*arguments, "--resume"])
    assert f"resuming from step {saved_at}" in capsys.readouterr().out
    for key in ("loss", "val_loss", "grad_norm", "lr"):
        got, want = losses(tmp_path / "run", key), losses(tmp_path / "unbroken", key)
        assert got.keys() == want.keys()
        assert all(got[step] == pytest.approx(want[step], rel=1e-6) for step in want), key
    best = [checkpoint.load(tmp_path / name)["best_val_loss"] for name in ("run", "unbroken")]
    assert best[0] == pytest.approx(best[1])


def test_resuming_without_the_optimizers_state_gives_other_losses(unbroken, tmp_path, monkeypatch):
    """So the test above can fail: it would notice if Adam's moments were lost."""
    with open(os.path.join(unbroken, "config.json")) as file:
        options = {**json.load(file), "out_dir": str(tmp_path / "run")}
    arguments = [f"--{key}={value}" for key, value in options.items() if value is not None]
    os.makedirs(tmp_path / "run")
    saved = torch.load(os.path.join(unbroken, "ckpt_prev.pt"), weights_only=True)
    assert saved["step"] == 10
    torch.save({**saved, "optimizer": {}}, tmp_path / "run" / "ckpt.pt")
    train.main([*arguments, "--resume"])
    got, want = losses(tmp_path / "run"), losses(unbroken)
    assert got[11] == pytest.approx(want[11], rel=1e-6) and abs(got[20] - want[20]) > 1e-4


def test_resume_refuses_another_model_and_prints_other_changes(tiny, tmp_path, capsys):
    train.main([*tiny, "--max_steps=2"])
    with pytest.raises(ConfigError, match="d_model=64.*36"):
        train.main([*tiny, "--resume", "--d_model=64"])
    train.main([*tiny, "--resume", "--max_steps=4", "--lr=1e-3"])
    out = capsys.readouterr().out
    assert "resumed with lr=0.001, it was 0.005" in out and "resumed with max_steps=4, it was 2" in out
    train.main([*tiny, "--resume", "--max_steps=4", "--lr=1e-3"])
    assert "resuming from step 4; max_steps=4 is already reached" in capsys.readouterr().out
    rates = losses(tmp_path / "run", "lr")
    assert max(rates) == 4 and rates[3] == pytest.approx(
        1e-3 * 3 / 5
    )  # computed from the new base rate, not from a saved one


def test_a_torn_checkpoint_is_skipped(tiny, tmp_path, capsys):
    train.main([*tiny])
    path = tmp_path / "run" / "ckpt.pt"
    os.truncate(path, os.path.getsize(path) // 2)
    train.main([*tiny, "--resume"])
    out = capsys.readouterr().out
    assert "not a whole checkpoint" in out and "resuming from step 10" in out
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        os.truncate(tmp_path / "run" / name, 10)
    with pytest.raises(RunFailed, match="no whole checkpoint"):
        train.main([*tiny, "--resume"])


def test_a_restart_resumes_its_own_run_and_no_other(tiny, tmp_path, monkeypatch, capsys):
    """All attempts under one torchrun share an id: a restart resumes without the flag, but not another torchrun's run."""
    store = dist.HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(heartbeat, "_open_store", lambda rank, limit: store)
    train.main([*tiny, "--max_steps=10"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main(tiny)
    assert "resuming from step 10" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["run"] and read_rows(tmp_path / "run")[-1]["step"] == 20

    store = dist.HashStore()
    train.main([*tiny, "--seed=7", "--max_steps=1"])
    said = capsys.readouterr().out
    assert "resuming" not in said and "resumed" not in said and "held an earlier run: moved to" in said
    assert [read_rows(tmp_path / name)[-1]["step"] for name in ("run", "run.1")] == [1, 20]
    seeds = [json.loads((tmp_path / name / "config.json").read_text())["seed"] for name in ("run", "run.1")]
    assert seeds == [7, 1337]


def test_a_restart_starts_anew_if_the_first_attempt_died_before_it_set_the_old_run_aside(
    tiny, tmp_path, monkeypatch, capsys
):
    """The first attempt dies after it has locked the folder and before it sets the old run aside."""
    store = dist.HashStore()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(heartbeat, "_open_store", lambda rank, limit: store)
    train.main([*tiny, "--max_steps=5"])
    store = dist.HashStore()
    with monkeypatch.context() as harm:
        harm.setattr(checkpoint, "set_aside", lambda *arguments: (_ for _ in ()).throw(RuntimeError("it died")))
        with pytest.raises(RuntimeError, match="it died"):
            train.main([*tiny, "--max_steps=1"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.main([*tiny, "--max_steps=1"])
    assert "resuming" not in capsys.readouterr().out
    assert [read_rows(tmp_path / name)[-1]["step"] for name in ("run", "run.1")] == [1, 5]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_in_the_folder_of_a_living_one_is_refused(tiny, tmp_path, resume):
    train.main([*tiny, "--max_steps=1"])
    files = sorted(os.listdir(tmp_path / "run"))
    owned = "from engine import ownership; ownership.own_folder({!r}, ''); print('owned', flush=True); input()"
    words = [sys.executable, "-c", owned.format(str(tmp_path / "run"))]
    how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(None))
    with subprocess.Popen(words, **how) as other:
        assert other.stdout.readline() == b"owned\n"
        with pytest.raises(ConfigError, match=f"run is in use by process {other.pid} on .*: wait for its end, or give"):
            train.main([*tiny, *resume])
    assert sorted(os.listdir(tmp_path / "run")) == files and os.listdir(tmp_path) == ["run"]
    train.main([*tiny, *resume])  # the other has died


# -- several processes


def test_two_processes_equal_one(tiny, tmp_path):
    """With the same global batch, losses are equal up to rounding; two real processes with gloo, both evaluate."""
    tiny = [*tiny, "--dropout=0.1"]  # its masks belong to a micro-batch, whichever process takes it
    train.main(tiny)
    done = run_forked("train.py", *tiny, f"--out_dir={tmp_path}/two", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20/20") == 1  # only one rank prints
    for key in ("loss", "val_loss", "grad_norm", "tokens"):
        one, two = losses(tmp_path / "run", key), losses(tmp_path / "two", key)
        assert one.keys() == two.keys() and all(two[step] == pytest.approx(one[step], rel=2e-4) for step in one), key


def test_dropout_in_a_cuda_graph_is_seeded_once_per_update():
    """If a process takes one micro-batch, the seed is the one used without a graph; further ones draw new masks."""
    seen = {}
    for as_graph in (False, True):
        for first in (0, 1, 2):
            seeds, drawn = parallel.DropoutSeeds(TrainConfig(dropout=0.1, seed=3), as_graph), []
            seeds.seed_update(7, first)
            for number in (first, first + 1):
                seeds.seed_micro_batch(number)
                drawn.append(torch.rand(4).tolist())
            seen[as_graph, first] = drawn
    assert seen[False, 0][1] == seen[False, 1][0] != seen[False, 0][0]
    assert [seen[True, first][0] for first in (0, 1, 2)] == [seen[False, first][0] for first in (0, 1, 2)]
    assert seen[True, 0][1] not in (seen[False, 0][1], seen[True, 0][0])


def test_one_process_resumes_a_run_of_two(tiny, tmp_path):
    """batch_tokens counts the tokens of all processes together, so the batch stays the same."""
    train.main(tiny)
    two = [*tiny, f"--out_dir={tmp_path}/two"]
    done = run_forked("train.py", *two, "--max_steps=10", "--schedule=constant", processes=2)
    assert done.returncode == 0, done.stderr
    train.main([*two, "--schedule=constant", "--resume"])
    train.main([*tiny, "--schedule=constant", f"--out_dir={tmp_path}/one"])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert all(two[step] == pytest.approx(one[step], rel=1e-3) for step in one)
    assert losses(tmp_path / "two", "tokens") == losses(tmp_path / "one", "tokens")


def test_a_run_sharded_over_two_resumes_sharded_over_four_and_unsharded_on_one(tiny, tmp_path):
    """FSDP2: saved by 2 processes, resumed by 4 and by 1; the losses equal those of an unbroken run on one process."""
    tiny = [*tiny, "--micro_batch=2", "--schedule=constant", "--dropout=0.0"]
    train.main([*tiny, f"--out_dir={tmp_path}/unbroken"])
    done = run_forked("train.py", *tiny, "--shard=fsdp", "--max_steps=10", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "view tensor" not in done.stderr, done.stderr  # FSDP2's warning that an in-place operation would drop hooks
    assert sorted(os.listdir(tmp_path / "run")) == [
        "ckpt.dcp",
        "ckpt_prev.dcp",
        "config.json",
        "log.jsonl",
        "loss.png",
        "run.lock",
    ]
    for name in ("four", "one"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    done = run_forked("train.py", *tiny, "--shard=fsdp", "--resume", f"--out_dir={tmp_path}/four", processes=4)
    assert done.returncode == 0 and "resuming from step 10" in done.stdout, done.stdout + done.stderr
    train.main([*tiny, "--resume", f"--out_dir={tmp_path}/one"])
    for key in ("loss", "val_loss", "grad_norm", "lr"):
        want = losses(tmp_path / "unbroken", key)
        for name in ("four", "one"):
            got = losses(tmp_path / name, key)
            assert got.keys() == want.keys() and all(got[step] == pytest.approx(want[step], rel=1e-3) for step in want)
    weights = [load_model(str(tmp_path / name))[0].state_dict() for name in ("four", "one")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


SPARE = """
import sys
import torch
import train

class WithSpare(train.GPT):
    def __init__(self, config):
        super().__init__(config)
        self.spare, self.other = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))

train.GPT = WithSpare
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("bucket", [0, 25])
def test_a_parameter_without_gradient_is_named(tiny, tmp_path, bucket):
    """One process leaves such a parameter as it is; several would have to exchange its gradient."""
    (tmp_path / "spare.py").write_text(SPARE)
    words = [tmp_path / "spare.py", *tiny, "--max_steps=2", f"--bucket_mb={bucket}"]
    done = run_forked(*words, processes=2)
    assert done.returncode != 0 and "error: spare and 1 more have no gradient" in done.stderr, done.stderr
    if bucket == 0:
        assert run_forked(*words).returncode == 0


COMPILED = """
import functools, sys
import torch
graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

torch.compile = functools.partial(torch.compile, backend=backend)
import train
train.main(sys.argv[1:])
print("graphs:", len(graphs) if train.ranks()[0] == 0 else None)
"""


def test_a_compiled_copy_has_one_graph_per_bucket(tiny, tmp_path):
    """So a bucket's exchange can begin before the backward pass ends. The losses equal those of one process."""
    (tmp_path / "compiled.py").write_text(COMPILED)
    tiny = [*tiny, "--d_model=256", "--structure=dense", "--micro_batch=2", "--max_steps=3", "--save=False"]
    train.main(tiny)
    one, graphs = losses(tmp_path / "run"), {}
    for buckets in ("--bucket_mb=1", ""):  # the default is a single bucket
        out = tmp_path / f"run{buckets}"
        words = [tmp_path / "compiled.py", *tiny, "--compile=True", *buckets.split(), f"--out_dir={out}"]
        done = run_forked(*words, processes=2)
        assert done.returncode == 0, done.stdout + done.stderr
        graphs[buckets] = int(re.search(r"graphs: (\d+)", done.stdout)[1])
        two = losses(out)
        assert two.keys() == one.keys() and all(two[step] == pytest.approx(one[step], rel=2e-4) for step in one)
    assert graphs["--bucket_mb=1"] >= graphs[""] + 2


# -- signals and faults


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_sigint_save_and_end_the_run_cleanly(tiny, tmp_path, name):
    process = start_script("train.py", *tiny, "--max_steps=100000", "--eval_interval=100000")
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= 3:
            break
    process.send_signal(name)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0 and "Traceback" not in rest, rest
    saved = checkpoint.load(tmp_path / "run")
    assert saved["step"] == max(losses(tmp_path / "run")) >= 3
    assert f"stopped at step {saved['step']}" in rest


def test_an_interrupt_during_setup_is_one_line(tiny, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "setup", interrupted)
    with pytest.raises(SystemExit) as caught:
        train.main(tiny)
    assert caught.value.code == 130 and capsys.readouterr().out.endswith("stopped, outside of training\n")


@pytest.mark.parametrize(
    "words, world, graphs",
    [("", 1, True), ("", 2, True), ("--shard=fsdp", 1, True), ("--shard=fsdp", 2, False), ("--bucket_mb=25", 1, True),
     ("--bucket_mb=25", 2, False), ("--activation_checkpointing", 2, True),
     ("--activation_checkpointing --dropout=0.1", 1, False)],
)  # fmt: skip
def test_cuda_graphs_are_the_default_wherever_they_work(words, world, graphs):
    """Asking for them where they do not work is refused, with the option that prevents them."""
    for asked in ("", "--cuda_graphs=True", "--cuda_graphs=False"):
        config = train.load_config(train.TrainConfig, [*words.split(), *asked.split()])
        choose = functools.partial(train.choose_cuda_graphs, config, torch.device("cuda"), torch.bfloat16, world)
        if asked == "--cuda_graphs=True" and not graphs:
            with pytest.raises(ConfigError, match=words.split()[0].removeprefix("--")):
                choose()
        else:
            assert choose() == (graphs and asked != "--cuda_graphs=False")


def test_a_non_finite_loss_stops_before_the_update(tiny, tmp_path, monkeypatch):
    original = train.GPT.forward

    def forward(self, idx, targets=None):
        logits, loss = original(self, idx, targets)
        if self.training and loss is not None and forward.calls == 2 * 12:  # two micro-steps per step: this is step 13
            loss = loss * math.nan
        forward.calls += self.training
        return logits, loss

    forward.calls = 0
    monkeypatch.setattr(train.GPT, "forward", forward)
    with pytest.raises(RunFailed) as caught:
        train.main(tiny)
    message = str(caught.value)
    assert "step 13" in message and "nan" in message and "ckpt.pt of step 10" in message and "lower lr" in message
    saved = checkpoint.load(tmp_path / "run")
    assert saved["step"] == 10 and all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_runs_in_float16_and_bfloat16_learn(tiny, tmp_path):
    for dtype in ("float16", "bfloat16"):
        train.main([*tiny, f"--dtype={dtype}", f"--out_dir={tmp_path}/{dtype}"])
        val = losses(tmp_path / dtype, "val_loss")
        assert val[20] < 3.2 < val[0]
    assert checkpoint.load(tmp_path / "float16")["scaler"]["scale"] > 1


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--micro_batch=16"], ["take micro_batch=8, or batch_tokens=512"]),
        (["--batch_tokens=300"], ["batch_tokens=300", "128", "take batch_tokens=256"]),
        (["--n_head=5"], ["n_head=5", "d_model=36", "take n_head="]),
        (["--vocab_size=90"], ["vocab_size=90", "96", "--vocab_size=96"]),
        (["--d_model=62"], ["attn.q", "d_in=62", "take d_model=60 or 64"]),
        (["--data_dir=nowhere"], ["nowhere", "prepare_owt.py"]),
        (["--lr=-1"], ["lr=-1", "at least 0"]),
        (["--max_steps=0"], ["max_steps=0", "at least 1"]),
        (["--device=cuda:x"], ["device", "cuda:x"]),
        (["--dtype=int8"], ["dtype", "int8", "is unknown", "bfloat16"]),
        (["--dtype=bfloat6"], ["did you mean 'bfloat16'"]),
        (["--decay_fraction=1.5"], ["decay_fraction=1.5", "less than 1"]),
        (["--cuda_graphs=True"], ["cuda_graphs=True", "device cpu", "leave it out"]),
        (["--timeout=0"], ["timeout=0", "more than 0"]),
        (["--bucket_mb=-1"], ["bucket_mb=-1", "at least 0"]),
        (["--save=False", "--sample_tokens=9"], ["sample_tokens=9", "save=False"]),
    ],
)
def test_impossible_options_are_one_clear_line(tiny, words, expected, tmp_path):
    with pytest.raises(ConfigError) as caught:
        train.main([*tiny, *words])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in expected), message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "script, options, option",
    [("train", "TrainConfig", "seed"), ("sample", "SampleConfig", "seed"), ("lab.mup_check", "CoordsConfig", "seed"),
     ("vision.regression", "RegressionConfig", "seed"), ("vision.regression", "RegressionConfig", "teacher_seed")],
)  # fmt: skip
@pytest.mark.parametrize("value", [-1, 2**63, 99999999999999999999])
def test_a_seed_out_of_torchs_range_is_refused(script, options, option, value):
    Config = getattr(importlib.import_module(script), options)
    range_or_bits = "(: make it at least 0 and less than 2.63| does not fit in 64 bits: give a number .*)$"
    with pytest.raises(ConfigError, match=f"^(--)?{option}={value}{range_or_bits}"):
        train.load_config(Config, [f"--{option}={value}"])
    assert train.load_config(Config, [f"--{option}={2**63 - 1}"])


def test_mistakes_on_the_command_line_end_without_traceback(tiny):
    done = run_script("train.py", *tiny, "--n_heads=3")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip() == "error: unknown option --n_heads: did you mean 'n_head'?"


def test_the_batch_is_split_over_processes_and_must_divide_evenly():
    config = TrainConfig(vocab_size=96, d_model=36, n_head=2, block_size=32, micro_batch=4, batch_tokens=256)
    assert train.split_batch(config, 1) == (8, 2) and train.split_batch(config, 2) == (8, 1)
    with pytest.raises(ConfigError, match="3 processes"):
        train.split_batch(config, 3)


def test_suggested_batches_and_vocabularies_are_accepted():
    draw, tried = random.Random(0), 0
    base = dict(d_model=36, n_head=2, block_size=32)
    for _ in range(100):
        options = dict(**base, vocab_size=96, micro_batch=draw.randint(1, 9), batch_tokens=draw.randint(1, 40) * 16)
        world = draw.randint(1, 4)
        try:
            train.split_batch(TrainConfig(**options), world)
        except ConfigError as error:
            for name, value in re.findall(r"(\w+)=(\d+)", str(error).split(": take ")[1]):
                train.split_batch(TrainConfig(**{**options, name: int(value)}), world)
                tried += 1
    for structure, need in (("btt", 97), ("kronecker", 257), ("btt", 50257), ("dense", 97), ("monarch", 211)):
        meta = {"vocab_size": need}
        with pytest.raises(ConfigError, match="is smaller than the") as caught:
            train.check_vocabulary(TrainConfig(**base, structure=structure, vocab_size=96), meta, print)
        taken = int(re.search(r"take --vocab_size=(\d+)$", str(caught.value))[1])
        train.check_vocabulary(TrainConfig(**base, structure=structure, vocab_size=taken), meta, print)
        assert taken >= need and (structure != "dense" or taken == need)
        said = []
        train.check_vocabulary(TrainConfig(**base, structure=structure, vocab_size=2**17), meta, said.append)
        TrainConfig(
            **base, structure=structure, vocab_size=int(re.search(r"--vocab_size=(\d+) saves work", said[0])[1])
        )
    assert tried > 30


# -- the log


def test_peak_flops_are_known_for_listed_gpus_only():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("Quadro P1000") is None


def test_a_resumed_run_keeps_its_wandb_id(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main([*tiny, "--wandb", "--max_steps=2"])
    first = checkpoint.load(tmp_path / "run")["wandb_id"]
    train.main([*tiny, "--wandb", "--max_steps=4", "--resume"])
    assert first and checkpoint.load(tmp_path / "run")["wandb_id"] == first
    assert len(os.listdir(tmp_path / "wandb")) >= 2


def test_wandb_without_a_login_is_one_line(tiny, tmp_path, monkeypatch):
    """The error comes before the run makes or moves any folder."""
    wandb = pytest.importorskip("wandb")

    def no_login(**options):
        raise wandb.errors.UsageError("No API key configured.\nmore")

    monkeypatch.setattr(wandb, "init", no_login)
    with pytest.raises(ConfigError, match="^wandb=True: No API key configured. .*WANDB_MODE=offline"):
        train.main([*tiny, "--wandb"])
    assert os.listdir(tmp_path / "run") == ["run.lock"]


def test_wandb_is_not_imported_when_off(tiny):
    code = "import sys, train; train.main(sys.argv[1:]); sys.exit('wandb' in sys.modules or 'datasets' in sys.modules)"
    done = run_script("-c", code, *tiny, "--max_steps=1")
    assert done.returncode == 0, done.stderr


def steps_logged(run):
    return [row["step"] for row in runlog.read_log(str(run / "log.jsonl"))]


def test_runs_on_one_gpu_take_turns(tiny, tmp_path):
    """A run that has compiled waits while another trains; the wait does not count as training time."""
    turn = tmp_path / "gpu0.turn"
    with open(turn, "w") as another:
        fcntl.flock(another, fcntl.LOCK_EX)
        process = start_script("train.py", *tiny, env={"GPU_TURN": str(turn)})
        while process.poll() is None and 5 not in steps_logged(tmp_path / "run"):
            time.sleep(0.05)
        time.sleep(2)
        assert process.poll() is None and max(steps_logged(tmp_path / "run")) == 5
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    seconds = {row["step"]: row["seconds"] for row in read_rows(tmp_path / "run")}
    assert seconds[6] - seconds[5] < 1.5 and max(seconds) == 20


def test_a_run_notes_when_it_starts_from_weights_for_another_tokenizer(tiny, tmp_path, char_data, capsys):
    train.main([*tiny, "--max_steps=1", f"--out_dir={tmp_path}/first"])
    other = tmp_path / "other"
    shutil.copytree(char_data, other)
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "tokenizer": "bytes"}))
    capsys.readouterr()
    words = [
        *tiny,
        f"--data_dir={other}",
        "--max_steps=1",
        f"--init_from={tmp_path}/first",
        f"--out_dir={tmp_path}/second",
    ]
    train.main(words)
    assert "note: the data's tokenizer differ" in capsys.readouterr().out
