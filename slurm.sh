#!/usr/bin/env bash
# A run on several nodes under SLURM. The same command resumes it:
#   sbatch --nodes=4 slurm.sh config/gpt2_btt.py --out_dir=out/gpt2_btt
#   sbatch --nodes=4 slurm.sh vision/train.py vision/config/vit_s32_imagenet.py
# The first word may be a script (a file that has a __main__); the default is train.py.
# All nodes must see the folder from which it is submitted, with its .venv, data and out.
#SBATCH --job-name=nanoeinsum
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# (two minutes before its time is up the run gets SIGTERM: it saves and ends)
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
script=train.py
if [ -f "${1:-}" ] && grep -q '__name__ == "__main__"' "$1"; then script=$1 && shift; fi
if [ "$script" != lab/bench.py ]; then set -- "$@" --resume; fi  # a benchmark has nothing to resume
module=${script%.py} module=${module//\//.}  # vision/train.py as vision.train
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# One torchrun per node; the processes meet on the first node. A failure restarts all of them, once, from the newest checkpoint.
exec srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=1 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$head:$((29500 + SLURM_JOB_ID % 1000))" \
    -m "$module" "$@"
