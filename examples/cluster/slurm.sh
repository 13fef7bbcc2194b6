#!/bin/bash
# One node, one process per GPU:  sbatch examples/cluster/slurm.sh
# Folder of the run and of its configuration, on a file system that all nodes share: RUNS.
#SBATCH --job-name=gpt-kit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1       # the number of GPUs
#SBATCH --gpus-per-node=1         # the same number
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue                 # Slurm starts the job again after a preemption or the failure of a node
#SBATCH --open-mode=append        # and keeps the output so far
#SBATCH --output=%x-%j.out
#SBATCH --signal=TERM@180         # to the processes of the step, 180 seconds before the time limit

RUNS=/shared/runs

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT RUNS

# Without torchrun, so that each process gets the signal, and its exit code is that of the step.
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
    exec gpt-kit train --config "$RUNS/config.yaml" --output_dir "$RUNS/mine" --resume'
code=$?

# 75: saved and stopped on the signal. 143: the signal came before Python could handle it.
# `scancel` ends this shell, too, so a cancelled job does not come back.
if [ $code = 75 ] || [ $code = 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
