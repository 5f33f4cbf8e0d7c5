#!/usr/bin/env bash
# Train on a SLURM cluster:
#
#   sbatch experiments/launch/slurm.sh --config stdlib
#
# Edit the lines below: one task per GPU. The number of tasks must divide data.batch_size and data.evaluation_batch_size.
# Results do not depend on it, except for rounding and for where dropout falls.
#
# SLURM sends USR1 90 seconds before the job's time is over (allow for the longest rollout). The run then writes a
# checkpoint, requeues itself and resumes. It also resumes when it is requeued after a node failure, and when you submit
# the script again. This needs a fixed run folder (trainer.logger.init_args.version, which the configurations here set).
#SBATCH --job-name=memformer
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@90
set -euo pipefail

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# srun sets the variables by which Lightning finds its processes
srun "${PYTHON:-python}" -m memformer_pl fit "$@" \
    --trainer.strategy ddp --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --ckpt_path last
