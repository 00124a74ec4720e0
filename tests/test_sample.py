"""Sampling from a checkpoint, as a function and as the command users type."""

import pytest
import torch

import sample
import train
from configurator import ConfigError
from conftest import run_forked
from data import CharTokenizer


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


def test_text_looks_like_what_was_learned(run):
    """Lines of the data are `a + b = c`: a trained model writes their form."""
    model, _ = sample.load_model(run)
    config = sample.Config(max_new_tokens=300, temperature=0.5)
    (text,) = sample.sample(model, CharTokenizer(), [0], config, torch.device("cpu"))
    lines = text.split("\n")[1:-1]
    well_formed = [
        line for line in lines if [part.isdigit() for part in line.split(" ")] == [True, False, True, False, True]
    ]
    assert len(lines) > 10 and len(well_formed) / len(lines) > 0.8, text


def test_command_with_a_prompt_from_text_and_from_a_file(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("12 + 3")
    texts = []
    for start in ("12 + 3", f"FILE:{tmp_path}/prompt.txt"):
        done = run_forked(
            "sample.py", f"--out_dir={run}", "--start", start, "--num_samples=2", "--max_new_tokens=40", "--top_k=5"
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1] and texts[0].count("12 + 3") >= 2 and texts[0].count("-" * 68) == 2


def test_seed_decides(run, capsys):
    outs = []
    for seed in (1, 1, 2):
        sample.main([f"--out_dir={run}", f"--seed={seed}", "--max_new_tokens=60", "--temperature=1.0"])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--start=a\tb"], ["start", r"'\t'", "position 1"]),
        (["--start=" + "1" * 33], ["start", "33 tokens", "32"]),
        (["--start=FILE:/nowhere.txt"], ["start", "nowhere.txt"]),
        (["--temperature=-1"], ["temperature=-1"]),
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
