#!/bin/bash
# 8 nodes of 8 GPUs under SLURM, kl_f8.yaml with as many samples as one GPU takes in 250,000 steps of 12; the learning
# rate follows the batch by itself, configs/README.md says how the rest does (On 1, 8 and 64 GPUs):
# sbatch configs/slurm.sh configs/kl_f8.yaml data.train=FOLDER output_dir=RUN train.steps=3906 \
#   loss.adversarial.disc_start=781 ema.decay=0.9936 optimizer.warmup_steps=400 validation.every=200 checkpoint.every=200
# Five minutes before the time is up SLURM sends SIGTERM; the run saves, and the same sbatch continues it.
#SBATCH --job-name=kl-autoencoder
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue

set -euo pipefail
main_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
  --rdzv_backend c10d --rdzv_endpoint "$main_node:29500" --rdzv_id "$SLURM_JOB_ID" \
  -m train "$@"
