#!/usr/bin/env bash
# Train with several processes, on one machine or on several in one network.
#
#   PROCESSES=4 experiments/launch/torchrun.sh --config stdlib
#
# Edit, or set in the environment:
#   PROCESSES  processes per machine, one per GPU; PROCESSES x NODES must divide data.batch_size and
#              data.evaluation_batch_size
#   NODES      number of machines; start this script on each
#   MEETING    with several machines: address and free port of the first one, such as node0:29500
#
# Results do not depend on the number of processes, except for rounding and for where dropout falls.
#
# After an interruption, start it again with the same options: it resumes from the last checkpoint of the run folder, also
# with another number of processes. This needs a fixed run folder (trainer.logger.init_args.version, which the
# configurations here set).
set -euo pipefail

PROCESSES=${PROCESSES:-2}
NODES=${NODES:-1}
MEETING=${MEETING:-localhost:0}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # CPU threads per process; more than there are cores slow each other down
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NODES" --nproc_per_node "$PROCESSES" --rdzv_backend c10d --rdzv_endpoint "$MEETING" \
    -m memformer_pl fit "$@" \
    --trainer.strategy ddp --trainer.num_nodes "$NODES" --trainer.devices "$PROCESSES" --ckpt_path last
