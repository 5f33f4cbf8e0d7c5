#!/usr/bin/env bash
# Train with several processes, on one machine or on several that reach each other.
#
#   PROCESSES=4 experiments/launch/torchrun.sh --config stdlib
#
# Edit, or set in the environment:
#   PROCESSES  of each machine, one for each GPU; PROCESSES x NODES must divide data.batch_size and data.evaluation_batch_size
#   NODES      machines; start this script on each
#   MEETING    with more than one: an address and a free port of the first machine, as node0:29500
#
# Numbers do not depend on how many processes there are, apart from the last digits and from where dropout falls.
#
# Killed, start it again with the same words: it goes on from the last checkpoint of the run's folder, for which the
# folder needs a name that stays (trainer.logger.init_args.version, as the configurations here have). Another number of
# processes may go on.
set -euo pipefail

PROCESSES=${PROCESSES:-2}
NODES=${NODES:-1}
MEETING=${MEETING:-localhost:0}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # threads of each process on the CPU; more of them than cores fight
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NODES" --nproc_per_node "$PROCESSES" --rdzv_backend c10d --rdzv_endpoint "$MEETING" \
    -m memformer_pl fit "$@" \
    --trainer.strategy ddp --trainer.num_nodes "$NODES" --trainer.devices "$PROCESSES" --ckpt_path last
