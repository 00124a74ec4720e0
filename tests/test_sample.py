"""Tests sampling from a checkpoint, as a function and as a command, against the form of the text it was trained on."""

import json
import os
import re
import shlex
import shutil

import pytest
import torch

import prepare_owt
import sample
import train
from configurator import ConfigError, RunFailed
from conftest import ROOT, run_forked
from data import CharTokenizer, read_meta
from engine.huggingface import GPT2_BLOCK_NAMES
from generate import sample_token
from model import GPT
from options import GPTConfig


@pytest.fixture(scope="module")
def run(char_data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sample") / "run")
    options = dict(
        data_dir=char_data, out_dir=folder, vocab_size=96, n_layer=2, n_head=2, d_model=64, block_size=32, micro_batch=16,
        batch_tokens=512, max_steps=300, eval_interval=300, eval_tokens=1000, warmup_steps=20, lr=1e-2, device="cpu",
        compile=False, log_interval=100,
    )  # fmt: skip
    train.main([f"--{key}={value}" for key, value in options.items()])
    return folder


def test_sampled_text_has_the_form_of_the_data(run):
    """Lines of the data read `a + b = c`, and so must those of a trained model."""
    model, _ = sample.load_model(run)
    config = sample.SampleConfig(max_new_tokens=300, temperature=0.5)
    (text,) = sample.sample(model, CharTokenizer(), [0], config, torch.device("cpu"))
    lines = text.split("\n")[1:-1]
    well_formed = [
        line for line in lines if [part.isdigit() for part in line.split(" ")] == [True, False, True, False, True]
    ]
    assert len(lines) > 10 and len(well_formed) / len(lines) > 0.8, text


def test_a_prompt_from_text_and_from_a_file_give_the_same_samples(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("12 + 3")
    texts = []
    for start in ("12 + 3", f"FILE:{tmp_path}/prompt.txt"):
        done = run_forked(
            "sample.py", f"--out_dir={run}", "--start", start, "--num_samples=2", "--max_new_tokens=40", "--top_k=5"
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1] and texts[0].count("12 + 3") >= 2 and texts[0].count("-" * 68) == 2


def test_the_seed_determines_the_samples(run, capsys):
    outs = []
    for seed in (1, 1, 2):
        sample.main([f"--out_dir={run}", f"--seed={seed}", "--max_new_tokens=60", "--temperature=1.0"])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--start=a\tb"], ["start", r"'\t'", "position 1"]),
        (["--start=FILE:/nowhere.txt"], ["start", "nowhere.txt"]),
        (["--temperature=-1"], ["temperature=-1"]),
        (["--max_new_tokens=2000000000", "--num_samples=2000000"], ["max_new_tokens=2000000000", "out of memory"]),
        (["--max_new_tokens=100000000000000"], ["max_new_tokens=100000000000000", "at most 2147483648"]),
        (["--num_samples=100000000000000000000"], ["num_samples=1", "does not fit in 64 bits"]),
        (["--temperature=1e50"], ["temperature=1e+50", "at most 1e+30"]),
        (["--top_p=1.5"], ["top_p=1.5"]),
        (["--top_k=0"], ["top_k=0"]),
        (["--out_dir=nowhere"], ["nowhere", "no checkpoint"]),
    ],
)
def test_mistakes_are_one_clear_line(run, words, expected):
    with pytest.raises(ConfigError) as caught:
        sample.main([f"--out_dir={run}", *words])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in expected), message


def test_a_prompt_longer_than_the_context_is_cropped_to_its_end(run, capsys):
    """The model reads 32 characters, but the whole prompt is printed."""
    start = "99 + 99 = 0\n" * 5 + "12 + 3"
    texts = []
    for words in (start, start[-32:]):
        sample.main([f"--out_dir={run}", "--start", words, "--max_new_tokens=20", "--temperature=0"])
        said = capsys.readouterr()
        assert said.out.startswith(words)
        texts.append((said.out.removeprefix(words), said.err))
    assert texts[0][0] == texts[1][0]
    assert f"start has {len(start)} tokens, but the model reads only the last 32" in texts[0][1] and not texts[1][1]


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    """A new model's logits are all equal, and a quarter of its 128 ids have no character."""
    model = GPT(GPTConfig(vocab_size=128, n_layer=1, n_head=2, d_model=36, block_size=16))
    for options in (dict(temperature=1.0), dict(temperature=1.0, top_k=100), dict(temperature=1.0, top_p=0.99)):
        config = sample.SampleConfig(max_new_tokens=200, num_samples=2, **options)
        for text in sample.sample(model, CharTokenizer(), [0], config, torch.device("cpu")):
            assert len(text) == 200 and len(set(text)) > 50


def test_temperatures_at_the_limits_of_float32_work():
    logits = torch.tensor([[0.0, 3.0, 2.9, -1.0]]).repeat(200, 1)
    for temperature in (0.0, 1e-50, 1e-38, 1e-31, 1e-30, 1e-20):
        assert (sample_token(logits, temperature) == 1).all(), temperature
    drawn = sample_token(logits, 1e30, generator=torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3}


def test_a_run_with_a_larger_vocabulary_ends_with_a_sample(tiny, capsys):
    train.main([*tiny, "--vocab_size=128", "--max_steps=2", "--sample_tokens=100"])
    out = capsys.readouterr().out
    assert "- sample -" in out and "no sample" not in out


def test_a_failure_of_the_last_sample_does_not_fail_the_run(tiny, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("no room for a sample")

    monkeypatch.setattr(train, "sample", fail)
    train.main([*tiny, "--max_steps=2", "--sample_tokens=100"])
    out = capsys.readouterr().out
    assert "no sample (OutOfMemoryError): no room for a sample" in out and "- sample -" not in out
    assert os.path.exists(tmp_path / "run" / "loss.png")


def test_a_model_of_pixels_has_no_text(tiny, char_data, tmp_path, capsys):
    pixels = shutil.copytree(char_data, tmp_path / "pixels")
    meta = read_meta(char_data)
    (pixels / "meta.json").write_text(json.dumps({**meta, "tokenizer": "pixels", "row_tokens": 49}))
    train.main([*tiny, f"--data_dir={pixels}", "--max_steps=2", "--sample_tokens=20"])
    assert "no sample" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="run: its tokens are pixels of images"):
        sample.main([f"--out_dir={tmp_path}/run"])


def test_the_readmes_three_commands_for_your_own_text_work(tmp_path, monkeypatch, capsys):
    """The commands are read from README and run with fewer steps."""
    readme = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
    section = readme.partition("## Your own text in three commands\n")[2].partition("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^ {4}(python .*)$", section, re.MULTILINE)]
    assert [words[1] for words in commands] == ["prepare_owt.py", "train.py", "sample.py"]
    monkeypatch.chdir(tmp_path)
    os.symlink(os.path.join(ROOT, "config"), "config")
    (source,) = (word.partition("=")[2] for word in commands[0] if word.startswith("--source="))
    with open(source, "w", encoding="utf-8") as file:
        file.write("Ein Text mit Umlauten: äöü, ein paar Zeilen lang.\n" * 200)
    prepare_owt.main(commands[0][2:])
    short = ["--max_steps=2", "--warmup_steps=1", "--eval_tokens=64", "--sample_tokens=5", "--device=cpu"]
    train.main([*commands[1][2:], *short])
    capsys.readouterr()
    sample.main([*commands[2][2:], "--max_new_tokens=5", "--device=cpu"])
    (start,) = (word.partition("=")[2] for word in commands[2] if word.startswith("--start="))
    assert capsys.readouterr().out.startswith(start)


def test_a_nanogpt_checkpoint_can_be_sampled_by_its_folder(tmp_path, capsys):
    """The file has the same name as a run's checkpoint."""
    config = GPTConfig(n_layer=1, n_head=2, d_model=36, block_size=8, vocab_size=96, bias=True, parametrization="standard",
                       structure="dense")  # fmt: skip
    torch.manual_seed(0)
    ours = GPT(config)
    args = dict(n_layer=1, n_head=2, n_embd=36, block_size=8, vocab_size=96, bias=True, dropout=0.0)
    theirs = dict(model={}, model_args=args)
    for name, tensor in gpt2_names(ours).items():
        theirs["model"][f"_orig_mod.{name}"] = tensor
    torch.save(theirs, tmp_path / "ckpt.pt")
    for out_dir in (tmp_path, tmp_path / "ckpt.pt"):
        model, meta = sample.load_model(str(out_dir))
        x = torch.arange(8)[None]
        assert torch.equal(model(x)[0], ours(x)[0]) and meta["vocab_size"] == 96
    os.truncate(tmp_path / "ckpt.pt", 1000)
    with pytest.raises(RunFailed):
        sample.load_model(str(tmp_path))


def gpt2_names(model):
    """The weights of a dense standard GPT of one block under nanoGPT's names: q, k and v joined, matrices (d_out, d_in)."""
    state = model.state_dict()
    theirs = {f"lm_head.{kind}": state[f"lm_head.{kind}"] for kind in ("weight", "bias") if f"lm_head.{kind}" in state}
    for our_name, name in (("token_embedding", "wte"), ("position_embedding", "wpe"), ("final_norm", "ln_f")):
        theirs |= {f"transformer.{name}.{key.split('.')[-1]}": state[key] for key in state if key.startswith(our_name)}
    for kind in ("weight", "bias"):
        for our_name, name in GPT2_BLOCK_NAMES.items():
            theirs[f"transformer.h.0.{name}.{kind}"] = state[f"blocks.0.{our_name}.{kind}"]
        qkv = [state[f"blocks.0.attn.{part}.{kind}"] for part in "qkv"]
        theirs[f"transformer.h.0.attn.c_attn.{kind}"] = torch.cat(qkv)
    return theirs


@pytest.mark.parametrize("wrong", [{"n_layer": "two"}, {"structured_layers": 7}, {"overrides": [1]}, {"d_model": None}])
def test_a_checkpoint_with_wrong_options_is_one_line(run, tmp_path, wrong):
    saved = torch.load(os.path.join(run, "ckpt.pt"), weights_only=True)
    torch.save({**saved, "config": {**saved["config"], **wrong}}, tmp_path / "ckpt.pt")
    with pytest.raises(ConfigError) as caught:
        sample.load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
