"""Tests conversion and export against transformers, singular value decompositions and sums written out."""

import json
import math
import os
import re
import runpy
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import einsum_linear
import theta
import train
from configurator import ConfigError, RunFailed, load_config
from conftest import losses, read_rows, small_disk
from data import TokenData
from engine import checkpoint
from engine.huggingface import load_gpt2
from lab import convert
from model import GPT
from options import GPTConfig
from sample import load_model

SHAPE = dict(vocab_size=96, block_size=32, n_layer=2, n_head=2, d_model=36)


def add_noise(module, seed=0):
    """Add noise to every parameter, so that no zero bias or unit gain hides a mistake -> the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def save_run(folder, **options):
    """Save a random model as train.py would -> the model."""
    model = add_noise(GPT(GPTConfig(**{**SHAPE, **options})))
    meta = dict(tokenizer="char96", vocab_size=96, dtype="uint8")
    convert.save_converted(model, meta, load_config(convert.ConvertConfig, ["--source=chance", f"--out_dir={folder}"]))
    return model


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A small GPT-2 of transformers with random weights, and its folder."""
    config = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=36, n_layer=2, n_head=2)
    theirs = add_noise(transformers.GPT2LMHeadModel(config))
    folder = str(tmp_path_factory.mktemp("hugging_face") / "gpt2")
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.fixture
def idx():
    return torch.randint(96, (3, 32), generator=torch.Generator().manual_seed(1))


def read_export(folder):
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def convert_to(source, folder, *options):
    """Convert a source into a run in `folder` -> its model."""
    convert.main([f"--source={source}", f"--out_dir={folder}", *options])
    return load_model(str(folder))[0]


def read_errors(text):
    """{layer: relative error} from the lines that main printed."""
    lines = [line.split() for line in text.splitlines() if line.startswith("  ")]
    return {words[0]: float(words[1]) for words in lines}


def matrices(model):
    """{layer: its matrix (d_out, d_in)} of a dense model."""
    roles = ("attn.q", "attn.k", "attn.v", "attn.proj", "ffn.up", "ffn.down")
    names = [f"blocks.{layer}.{role}" for layer in range(2) for role in roles]
    names += ["lm_head", *(["embed"] if model.config.d_embed else [])]
    return {name: model.state_dict()[f"{name}.weight"] for name in names}


# -- Hugging Face and back


def test_converting_a_dense_gpt2_and_exporting_it_changes_nothing(hugging_face, idx, tmp_path):
    theirs, folder = hugging_face
    convert_to(folder, tmp_path / "dense", "--structure=dense")
    convert.main([f"--source={tmp_path / 'dense'}", f"--export={tmp_path / 'back'}"])
    back = read_export(tmp_path / "back")
    assert back.config.tie_word_embeddings and back.lm_head.weight is back.transformer.wte.weight
    assert back.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(back(idx).logits, theirs(idx).logits)
    assert sorted(os.listdir(tmp_path / "back"))[0] == "config.json" and (tmp_path / "back/model.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [
        dict(structure="btt", rank=2, bias=True),
        dict(structure="low_rank", rank=5, structured_layers=("attn", "ffn.down"), normalize=False),
        dict(structure="dense", bias=True),
        dict(structure="einsum", theta=(0.5, 0.25, 0.25, 0.25, 0.5, 0.25, 0), structured_layers=("ffn.up", "attn.q")),
    ],
    ids=lambda options: options["structure"],
)
def test_an_exported_model_computes_the_same_in_transformers(options, idx, tmp_path):
    ours = save_run(tmp_path / "run", parametrization="standard", **options)
    convert.main([f"--source={tmp_path / 'run'}", f"--export={tmp_path / 'exported'}"])
    theirs = read_export(tmp_path / "exported")
    tied = "lm_head" not in options.get("structured_layers", ("lm_head",)) or options["structure"] == "dense"
    assert theirs.config.tie_word_embeddings is tied
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], atol=2e-5, rtol=1e-5)


# -- from dense to structured


def test_the_error_of_low_rank_is_the_tail_of_the_singular_values(hugging_face, tmp_path, capsys):
    _, folder = hugging_face
    source = load_gpt2(folder)
    target = convert_to(folder, tmp_path / "run", "--structure=low_rank", "--rank=7")
    text = capsys.readouterr().out
    errors = read_errors(text)
    assert errors.keys() == matrices(source).keys() and len(errors) == 2 * 6 + 1
    for name, W in matrices(source).items():
        s = torch.linalg.svdvals(W.double())
        assert errors[name] == pytest.approx((s[7:].norm() / s.norm()).item(), rel=1e-3), name  # printed to 4 digits
        own = (W - target.get_submodule(name).materialize()).norm() / W.norm()
        assert own.item() == pytest.approx(errors[name], rel=1e-3)
    state, kept = target.state_dict(), source.state_dict()
    for name, tensor in kept.items():
        if name.removesuffix(".weight") not in errors:
            assert torch.equal(state[name], tensor), name  # embeddings, norms, biases
    assert (
        f"{sum(p.numel() for p in source.parameters()):,} parameters -> {sum(p.numel() for p in target.parameters()):,}"
        in text
    )


def test_the_error_of_btt_is_the_tail_of_every_block(hugging_face, tmp_path, capsys):
    _, folder = hugging_face
    options = ("--structure=btt", "--rank=2", "--structured_layers=ffn")
    target = convert_to(folder, tmp_path / "run", *options)
    source, errors = load_gpt2(folder), read_errors(capsys.readouterr().out)
    for name, W in matrices(source).items():
        layer = target.get_submodule(name)
        if "ffn" not in name:
            assert errors[name] == 0 and torch.equal(layer.weight, W)
            continue
        alpha, _, gamma, _, epsilon, phi, _ = layer.sizes
        blocks = W.double().view(phi, epsilon, gamma, alpha).transpose(1, 2)  # one of rank 2 for every φ and γ
        s = torch.linalg.svdvals(blocks)
        assert errors[name] == pytest.approx((s[..., 2:].norm() / s.norm()).item(), rel=1e-3), name
        own = (W - layer.materialize()).norm() / W.norm()
        assert own.item() == pytest.approx(errors[name], rel=1e-3)
    assert target.lm_head.weight is target.token_embedding.weight


@pytest.mark.parametrize(
    "options",
    [
        "--structure=monarch --num_blocks=2 --structured_layers=attn,ffn",
        "--structure=monarch --align_heads --structured_layers=attn",
        "--structure=btt --num_cores=3 --rank=2 --structured_layers=ffn",
        "--structure=tt --rank=3 --overrides={'attn.q':'dense','embed':{'structure':'low_rank','rank':24}}",
    ],
)
def test_every_structure_reports_the_error_of_its_matrix(options, tmp_path, capsys, idx):
    """The source is a muP model with a narrow embedding, whose projection is converted like other layers."""
    source = save_run(tmp_path / "dense", structure="dense", d_embed=24)
    target = convert_to(tmp_path / "dense", tmp_path / "run", *options.split())
    errors, changed = read_errors(capsys.readouterr().out), set()
    assert errors.keys() == matrices(source).keys()
    for name, W in matrices(source).items():
        ours = target.get_submodule(name).materialize().detach()
        if torch.equal(ours, W):
            assert errors[name] == 0
            continue
        changed.add(name.split(".")[-1])
        if name.endswith((".q", ".k")):  # equal up to a scale
            ours = ours * torch.linalg.lstsq(ours.reshape(-1, 1), W.reshape(-1, 1)).solution
        expected = ((W - ours).norm() / W.norm()).item()
        assert errors[name] == pytest.approx(expected, rel=2e-3, abs=1e-6) and expected < 1
    attn, ffn = {"q", "k", "v", "proj"}, {"up", "down"}
    if "overrides" in options:
        assert changed == (attn | ffn | {"lm_head", "embed"}) - {"q"} and errors["embed"] < 1e-6
    else:
        assert changed == ({*attn} if "attn" in options else set()) | (ffn if "ffn" in options else set())
    assert target(idx)[0].isfinite().all() and target.config.d_embed == 24


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parametrization", ["standard", "mup"])
def test_a_model_converted_at_full_rank_computes_the_same(parametrization, bias, idx, tmp_path):
    """Also under muP, where queries and keys are capped and their LayerNorm restores the scale."""
    source = save_run(tmp_path / "dense", structure="dense", parametrization=parametrization, bias=bias)
    with torch.no_grad():
        source.blocks[0].attn.q.weight *= 20  # far beyond the cap
    argv = [f"--source={tmp_path / 'dense'}", "--out_dir=none", "--structure=low_rank", "--rank=36"]
    target, errors = convert.convert(source, load_config(convert.ConvertConfig, argv))
    assert max(errors.values()) < 1e-5 and not hasattr(target.lm_head, "weight")
    with torch.no_grad():
        torch.testing.assert_close(target(idx)[0], source(idx)[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("capped_before", [False, True])
@pytest.mark.parametrize(
    "options", [["--normalize_dense"], [], ["--structured_layers=ffn", "--structure=low_rank", "--rank=36"]]
)
def test_capped_dense_layers_convert_to_and_from_others(capped_before, options, idx, tmp_path):
    source = save_run(tmp_path / "dense", structure="dense", normalize_dense=capped_before)
    with torch.no_grad():
        source.blocks[0].attn.v.weight *= 20  # far beyond the cap
    structure = [] if "--structure=low_rank" in options else ["--structure=dense"]
    argv = [f"--source={tmp_path / 'dense'}", "--out_dir=none", *structure, *options]
    target, errors = convert.convert(source, load_config(convert.ConvertConfig, argv))
    assert max(errors.values()) < 1e-5
    assert (target.blocks[0].attn.v.gains is not None) == ("--normalize_dense" in options)
    with torch.no_grad():
        torch.testing.assert_close(target(idx)[0], source(idx)[0], atol=1e-3, rtol=1e-3)


def test_converted_checkpoint_is_a_run_of_step_0_with_its_options(hugging_face, tmp_path, capsys):
    _, folder = hugging_face
    for _ in range(2):
        convert_to(folder, tmp_path / "run", "--structure=btt", "--rank=2")
    assert sorted(os.listdir(tmp_path)) == ["run", "run.1"] and "moved to" in capsys.readouterr().out
    saved = checkpoint.load(tmp_path / "run")
    assert (saved["step"], saved["seconds"], saved["best_val_loss"], saved["wandb_id"]) == (0, 0.0, math.inf, None)
    assert saved["meta"] == dict(tokenizer="gpt2", vocab_size=50257, dtype="uint16")
    options = runpy.run_path(str(tmp_path / "run" / "config.py"))
    assert {name: options[name] for name in saved["config"]} == saved["config"]
    assert saved["config"]["parametrization"] == "standard" and saved["config"]["bias"] and saved["config"]["rank"] == 2


def test_training_starts_from_a_converted_checkpoint(tiny, char_data, tmp_path):
    dense, converted = tmp_path / "dense", tmp_path / "btt"
    train.main([*tiny, "--structure=dense", "--parametrization=standard", "--max_steps=2", f"--out_dir={dense}"])
    convert.main([f"--source={dense}", f"--out_dir={converted}", "--structure=btt", "--rank=2"])
    model, meta = load_model(str(converted))
    with open(os.path.join(char_data, "meta.json")) as file:
        assert json.load(file).items() <= meta.items()  # train.py adds fingerprints of the data
    data = TokenData(char_data, 32)
    x, y = data.val_batch(data.val_rows(1000))
    with torch.no_grad():
        expected = F.cross_entropy(model(x)[0].flatten(0, 1).double(), y.flatten()).item()
    shape = {f"--{name}" for name in SHAPE}
    training = [word for word in tiny if word.partition("=")[0] not in {*shape, "--out_dir", "--max_steps"}]
    training = [word for word in training if not word.startswith("--lr=")]
    train.main([str(converted / "config.py"), *training, "--max_steps=2"])
    assert [row["lr"] for row in read_rows(converted) if "lr" in row] == pytest.approx(
        [3e-5 / 5, 2 * 3e-5 / 5]
    )  # warm-up
    val = losses(converted, "val_loss")
    assert list(val) == [0, 2] and val[0] == pytest.approx(expected, abs=1e-5) and val[2] != val[0]
    assert checkpoint.load(converted)["step"] == 2


def test_padded_vocabulary_keeps_logits_and_costs_little(idx, tmp_path, capsys):
    """97 has no factorisation. The old logits are far below 0, like GPT-2's, and stay the same; new ones are their mean."""
    source = save_run(tmp_path / "dense", structure="dense", parametrization="standard", bias=True, vocab_size=97)
    with torch.no_grad():
        source.final_norm.bias += 5
        source.token_embedding.weight -= 1  # the head is tied: this adds about -180 to every logit
    argv = [f"--source={tmp_path / 'dense'}", "--out_dir=none", "--structure=dense", "--vocab_size=108"]
    target, _ = convert.convert(source, load_config(convert.ConvertConfig, argv))
    with torch.no_grad():
        (ours, loss), (theirs, before) = target(idx, idx.roll(-1, 1)), source(idx, idx.roll(-1, 1))
    assert theirs.max() < -100 and ours.shape == (3, 32, 108)
    torch.testing.assert_close(ours[..., :97], theirs, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(ours[..., 97:], theirs.mean(-1, keepdim=True).expand(-1, -1, 11), atol=1e-3, rtol=1e-5)
    assert before < loss <= before + math.log(108 / 97) + 1e-4

    with pytest.raises(ConfigError, match="lm_head.*97") as error:
        convert_to(tmp_path / "dense", tmp_path / "btt", "--structure=btt")
    offered = int(re.search(r"pad the vocabulary .*--vocab_size=(\d+)$", str(error.value))[1])
    target = convert_to(tmp_path / "dense", tmp_path / "btt", "--structure=btt", f"--vocab_size={offered}")
    assert target.config.vocab_size == target.lm_head.out_features == offered > 97
    assert f"padded by {offered - 97} rows" in capsys.readouterr().out
    with pytest.raises(ConfigError) as error:  # a rank too large for other layers: no vocabulary helps
        convert_to(tmp_path / "dense", tmp_path / "wide", "--structure=low_rank", "--rank=99")
    assert "vocab_size" not in str(error.value)


def test_for_gpt2s_vocabulary_a_width_with_a_factorisation_is_offered():
    model = GPT(GPTConfig(**{**SHAPE, "vocab_size": 50257}, structure="dense"))
    config = load_config(convert.ConvertConfig, ["--source=new", "--out_dir=none", "--structure=btt"])
    with pytest.raises(ConfigError, match="--vocab_size=50304$"):
        convert.make_target(model.config, config)


# -- a user's own structure


class Mine(einsum_linear.EinsumLinear):
    """A layer that lacks the method named by `lacks`."""

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "__dict__").get("lacks"):
            raise AttributeError(name)
        return super().__getattribute__(name)


def structure_without(lacks):
    """An entry for STRUCTURES whose layers lack this method."""

    def function(d_in, d_out, options):
        def make(**kwargs):
            layer = Mine(theta.factor_sizes(d_in, d_out, theta.BTT, 1), **kwargs)
            layer.lacks = lacks
            return layer

        return make

    return theta.Structure(function)


def test_a_structure_without_load_dense_or_materialize_is_one_line(monkeypatch, tmp_path):
    save_run(tmp_path / "dense", structure="dense", parametrization="standard")
    monkeypatch.setitem(theta.STRUCTURES, "mine", structure_without("load_dense"))
    with pytest.raises(ConfigError, match="blocks.0.attn.q is a Mine, which has no load_dense: add that method"):
        convert_to(tmp_path / "dense", tmp_path / "mine", "--structure=mine")
    save_run(tmp_path / "mine", structure="mine", parametrization="standard")
    with pytest.raises(ConfigError, match="blocks.0.attn.q is Mine, not dense: convert from a dense model"):
        convert_to(tmp_path / "mine", tmp_path / "btt", "--structure=btt")
    monkeypatch.setitem(theta.STRUCTURES, "mine", structure_without("materialize"))
    with pytest.raises(ConfigError, match="blocks.0.attn.q is a Mine, which has no materialize: add that method"):
        convert.main([f"--source={tmp_path / 'mine'}", f"--export={tmp_path / 'theirs'}"])
    assert sorted(os.listdir(tmp_path)) == ["dense", "mine"]
    monkeypatch.setitem(theta.STRUCTURES, "mine", structure_without(None))
    assert convert_to(tmp_path / "dense", tmp_path / "whole", "--structure=mine").config.structure == "mine"


def test_a_zero_head_stays_zero(tmp_path, idx):
    model = GPT(GPTConfig(**SHAPE, structure="dense"))  # under muP the head starts at zero
    argv = ["--source=new", "--out_dir=none", "--structure=low_rank", "--rank=2"]
    target, errors = convert.convert(model.eval(), load_config(convert.ConvertConfig, argv))
    assert errors["lm_head"] == 0 and not target(idx)[0].any()


# -- mistakes: one line with a remedy


@pytest.fixture
def runs(tmp_path):
    """A folder with a muP run, a run with d_head, a structured run, and a folder that is not empty."""
    save_run(tmp_path / "mup", structure="dense")
    save_run(tmp_path / "wide_heads", structure="dense", parametrization="standard", d_head=20)
    save_run(tmp_path / "btt", structure="btt", parametrization="standard")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    return tmp_path


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--source={runs}/mup", "give exactly one"),
        ("--source={runs}/mup --out_dir={runs}/a --export={runs}/b", "give exactly one"),
        ("--out_dir={runs}/a", "source is missing"),
        ("--source={runs}/mup --out_dir={runs}/mup/", "is the source"),
        ("--source={runs}/mup --out_dir={runs}/full/notes", "is a file"),
        ("--source={runs}/nothing --out_dir={runs}/a", "nothing does not exist"),
        ("--source={runs}/full --out_dir={runs}/a", "full holds no checkpoint and no GPT-2"),
        ("--source={runs}/mup --export={runs}/a", "parametrization='mup'.*standard"),
        ("--source={runs}/wide_heads --export={runs}/a", "d_head=20.*18"),
        ("--source={runs}/btt --export={runs}/full", "exists and is not empty"),
        ("--source={runs}/btt --export={runs}/a --rank=2", "rank=2 with export.*leave it out"),
        ("--source={runs}/btt --out_dir={runs}/a", "blocks.0.attn.q is EinsumLinear, not dense"),
        ("--source={runs}/mup --out_dir={runs}/a --vocab_size=95", "vocab_size=95 is less than the source's 96"),
        ("--source={runs}/mup --out_dir={runs}/a --n_layer=3", "unknown option --n_layer"),
        ("--source={runs}/mup --out_dir={runs}/a --structure=low_rank --rank=99", "rank 99"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(words, expected, runs):
    before = sorted(os.listdir(runs))
    with pytest.raises(ConfigError, match=expected) as error:
        convert.main(words.format(runs=runs).split())
    assert "\n" not in str(error.value) and sorted(os.listdir(runs)) == before


# -- Hugging Face sources that are not a whole GPT-2


def spoil_weights(change):
    """A function of a Hugging Face folder that applies change(tensors) to its model.safetensors."""

    def spoil(folder):
        tensors = load_file(f"{folder}/model.safetensors")
        change(tensors)
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})

    return spoil


def spoil_config(**changes):
    """A function of a Hugging Face folder that changes keys of its config.json, or removes them (None)."""

    def spoil(folder):
        with open(f"{folder}/config.json") as file:
            config = {**json.load(file), **changes}
        with open(f"{folder}/config.json", "w") as file:
            json.dump({key: value for key, value in config.items() if value is not None}, file)

    return spoil


UP = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (spoil_weights(lambda tensors: tensors.pop(UP)), f"lacks {UP}: take"),
        (spoil_weights(lambda tensors: tensors.update({UP: torch.zeros(3)})), "holds no checkpoint and no GPT-2"),
        (spoil_weights(lambda tensors: tensors[UP].fill_(math.nan)), "blocks.1.ffn.up.weight is not finite"),
        (spoil_config(n_layer=3), "lacks transformer.h.2.attn.c_attn.bias and 11 more: take"),
        (spoil_config(n_layer=1), "has layers beyond its n_layer: transformer.h.1"),
        (spoil_config(model_type="llama"), "has model_type=llama, but this GPT-2 needs gpt2"),
        (spoil_config(model_type=None), "has model_type=None"),
        (spoil_config(n_layer="two"), "holds no checkpoint and no GPT-2 .*n_layer"),
        (spoil_config(n_head=0), "holds no checkpoint and no GPT-2"),
        (lambda folder: os.truncate(f"{folder}/model.safetensors", 1000), "holds no checkpoint and no GPT-2"),
        (lambda folder: os.truncate(f"{folder}/config.json", 100), "holds no checkpoint and no GPT-2"),
        (lambda folder: open(f"{folder}/config.json", "w").write("[]"), "holds no checkpoint and no GPT-2"),
        (lambda folder: os.remove(f"{folder}/model.safetensors"), "holds no checkpoint and no GPT-2"),
    ],
)
def test_a_folder_without_a_whole_gpt2_is_refused(spoil, expected, hugging_face, tmp_path):
    """transformers itself would fill missing weights with random numbers and take other models for GPT-2."""
    folder = shutil.copytree(hugging_face[1], tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(ConfigError, match=expected) as error:
        convert.main([f"--source={folder}", f"--out_dir={tmp_path / 'out'}", "--structure=btt"])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


# -- disks


def test_a_full_disk_is_one_line_and_leaves_no_part(tmp_path):
    save_run(tmp_path / "run", structure="dense", parametrization="standard")
    for option in ("export", "out_dir"):
        with small_disk(20_000), pytest.raises(RunFailed, match="cannot be written .*make room") as error:
            convert.main([f"--source={tmp_path / 'run'}", f"--{option}={tmp_path / option}"])
        assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["out_dir", "run"] and os.listdir(tmp_path / "out_dir") == ["run.lock"]


@pytest.mark.parametrize("option", ["export", "out_dir"])
def test_a_folder_that_cannot_be_made_is_one_line(option, tmp_path):
    save_run(tmp_path / "run", structure="dense", parametrization="standard")
    for folder in ("/proc/no/folder", str(tmp_path / "run" / "config.py" / "folder")):
        with pytest.raises(ConfigError, match=f"{folder} cannot be written"):
            convert.main([f"--source={tmp_path / 'run'}", f"--{option}={folder}"])
