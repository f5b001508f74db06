#!/usr/bin/env bash
# The deepspeed launcher with a host file; it reaches the hosts by ssh (pdsh).
# Usage: examples/hostfile.sh HOSTS RECIPE [--a.b VALUE ...]
set -euo pipefail

hosts=${1:?give a host file, such as examples/hosts}
recipe=${2:?give a recipe: a shipped name or a .toml file}
export OMP_NUM_THREADS=1

exec deepspeed --hostfile "$hosts" --no_local_rank --module unicl train "$recipe" "${@:3}" \
    --engine.backend deepspeed
