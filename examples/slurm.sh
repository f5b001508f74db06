#!/usr/bin/env bash
# One task per GPU under Slurm; submit with: sbatch examples/slurm.sh RECIPE [--a.b VALUE ...]
#SBATCH --job-name=unicl
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# Two minutes before the limit, or when the job is preempted, every rank gets SIGUSR1 or SIGTERM,
# saves at the next step and ends with 130; the job is then queued again and goes on from there.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

recipe=${1:?give a recipe: a shipped name or a .toml file}
export OMP_NUM_THREADS=1  # loader workers and ranks are processes already

# Ranks that save end one after the other: none of them may take the others with it at once, but
# those that are left a minute after the first one wait for a dead rank.
# The run's folder must be on a file system that all nodes share.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-12}" \
    unicl train "$recipe" --out "runs/$SLURM_JOB_NAME" "${@:2}" &
step=$!
# A preempted job's shell gets SIGTERM beside its ranks, and must outlive them to queue it again.
trap 'true' USR1 TERM
while true; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

# 130: interrupted, and saved.
if [[ $code -eq 130 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
