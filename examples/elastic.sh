#!/usr/bin/env bash
# torchrun on every host: hosts may come and go, and the run goes on with those that are there.
# Usage, the same on each host: RENDEZVOUS=node001:29400 examples/elastic.sh RECIPE [--a.b VALUE ...]
set -euo pipefail

recipe=${1:?give a recipe: a shipped name or a .toml file}
rendezvous=${RENDEZVOUS:?name one host and a free port on it, such as node001:29400}
export OMP_NUM_THREADS=1

exec torchrun \
    --nnodes "${HOSTS:-1:64}" \
    --nproc-per-node "${GPUS:-8}" \
    --max-restarts 100 \
    --rdzv-backend c10d \
    --rdzv-endpoint "$rendezvous" \
    --rdzv-id "${RUN:-unicl}" \
    -m unicl train "$recipe" "${@:2}"
