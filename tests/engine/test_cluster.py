"""Tests slurm.sh with real torchruns and stand-ins for srun and scontrol, against a run on one process."""

import os
import stat
import subprocess

import pytest

import train
from conftest import ROOT, losses
from engine import checkpoint

SRUN = """#!/usr/bin/env bash
# Like srun on two nodes: it runs the command once per node and returns the larger status.
"$@" & first=$!
"$@" & second=$!
wait $first; a=$?
wait $second; b=$?
exit $((a > b ? a : b))
"""
SCONTROL = "#!/usr/bin/env bash\necho localhost\necho elsewhere\n"


def job_environment(tmp_path, srun, scontrol=SCONTROL):
    """The environment variables of a job on two nodes, with stand-ins for srun and scontrol."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(stat.S_IRWXU)
    job = dict(SLURM_JOB_ID=str(os.getpid()), SLURM_NNODES="2", SLURM_JOB_NODELIST="localhost,elsewhere")
    return {**os.environ, **job, "PATH": f"{bin_dir}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "words, ran",
    [
        ("config/gpt2_btt.py --lr=1e-3", "-m train config/gpt2_btt.py --lr=1e-3 --resume"),
        ("", "-m train --resume"),
        ("train.py config/gpt2_btt.py", "-m train config/gpt2_btt.py --resume"),
        (
            "vision/train.py vision/config/vit_s32_imagenet.py",
            "-m vision.train vision/config/vit_s32_imagenet.py --resume",
        ),
        ("vision/regression.py --d_model=64", "-m vision.regression --d_model=64 --resume"),
        ("lab/bench.py step config/gpt2_btt.py", "-m lab.bench step config/gpt2_btt.py"),
    ],
)
def test_slurm_script_runs_any_script(tmp_path, words, ran):
    env = job_environment(tmp_path, srun="#!/usr/bin/env bash\necho $@\n")
    done = subprocess.run(["bash", "slurm.sh", *words.split()], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("torchrun --nnodes=2"), done.stderr
    assert done.stdout.strip().partition(f"localhost:{29500 + os.getpid() % 1000} ")[2] == ran


def test_slurm_script_trains_on_two_nodes_and_resumes(tiny, tmp_path):
    environment = job_environment(tmp_path, SRUN)
    for steps in (10, 20):
        words = ["bash", "slurm.sh", *tiny, f"--max_steps={steps}", "--schedule=constant"]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert checkpoint.load(tmp_path / "run")["step"] == steps
    assert "resuming from step 10" in done.stdout
    train.main([*tiny, "--schedule=constant", f"--out_dir={tmp_path}/alone"])
    want, got = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert want.keys() == got.keys() and all(got[step] == pytest.approx(want[step], rel=1e-3) for step in want)
