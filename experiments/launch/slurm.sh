#!/usr/bin/env bash
# Train on a cluster that SLURM manages:
#
#   sbatch experiments/launch/slurm.sh --config stdlib
#
# Edit the lines below: as many tasks for each node as it has GPUs to use. Their number must divide data.batch_size and
# data.evaluation_batch_size. Numbers do not depend on it, apart from the last digits and from where dropout falls.
#
# SLURM sends USR1 90 seconds before the job's time is over (allow for the longest rollout). The run then writes its last
# checkpoint and has itself queued again, and goes on from there; so it does when it is queued again after a failure of
# a node, and when you submit the script again. For that the run's folder needs a name that stays
# (trainer.logger.init_args.version, as the configurations here have).
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
# not in the job's own shell: Lightning finds its processes by what srun sets
srun "${PYTHON:-python}" -m memformer_pl fit "$@" \
    --trainer.strategy ddp --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --ckpt_path last
