#!/usr/bin/env bash
# One container, one role:
#   head                     Ray's head node; holds no worker
#   worker                   a node that trains and serves with all its cores and GPUs
#   gateway CONFIG [ARGS …]  joins Ray without resources and runs `introvert serve CONFIG`
#   anything else            is run as it stands, such as `introvert train CONFIG`
# head and worker listen on RAY_PORT (default 6379); worker and gateway join RAY_ADDRESS (default head:6379).
set -euo pipefail

port=${RAY_PORT:-6379}
address=${RAY_ADDRESS:-head:$port}

case "${1:-}" in
head)
    exec ray start --head --port="$port" --num-cpus=0 --num-gpus=0 --dashboard-host=0.0.0.0 \
        --disable-usage-stats --block
    ;;
worker)
    # Ray would run its workers, engines with them, at niceness 15
    RAY_worker_niceness=0 exec ray start --address="$address" --disable-usage-stats --block
    ;;
gateway)
    shift
    ray start --address="$address" --num-cpus=0 --num-gpus=0 --disable-usage-stats
    export RAY_ADDRESS=$address
    exec introvert serve "$@" --set gateway.host=0.0.0.0
    ;;
*)
    exec "$@"
    ;;
esac
