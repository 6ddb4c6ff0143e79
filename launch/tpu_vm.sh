#!/usr/bin/env bash
# Runs `leon train` on Cloud TPU slices (queued resources).
#
#   launch/tpu_vm.sh keep --config=configs/cm3leon_350m.py --workdir=gs://BUCKET/leon ...
#
# requests the slices, waits for them, installs the image and starts the run. After a preemption it
# repeats these steps until the run has finished. Single steps: create, ready, install, start FLAGS,
# status, logs, stop, delete. The variables below configure the run; docs/launch.md explains them.
set -euo pipefail

: "${IMAGE:?the image of launch/Dockerfile, as REGION-docker.pkg.dev/PROJECT/REPOSITORY/leon:tpu}"
: "${ZONE:?the zone of the TPUs, for example us-east5-b}"
NAME=${NAME:-leon}
SHARE=${SHARE:-} # instead of a bucket: a network file system, HOST:/FOLDER, mounted at /runs
ACCELERATOR=${ACCELERATOR:-v6e-16} # of one slice
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e}
SLICES=${SLICES:-1}
SPOT=${SPOT:-yes}
POLL=${POLL:-60} # seconds

queue() { # VERB ARGUMENTS: runs a gcloud verb on our queued resource
  gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

on_all() { # COMMAND: runs a command on all hosts of all slices in parallel
  queue ssh --node=all --worker=all --command="$1"
}

state() { # prints nothing if the request does not exist; fails if gcloud fails
  gcloud compute tpus queued-resources list --zone="$ZONE" --filter="name ~ \"/$NAME\$\"" \
    --format="value(state.state)"
}

create() {
  local nodes=(--node-id="$NAME")
  if ((SLICES > 1)); then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  if [[ $SPOT == yes ]]; then nodes+=(--spot); fi
  queue create --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${nodes[@]}"
}

ready() { # waits until the slices are active; fails if the request failed or does not exist
  local now
  while true; do
    now=$(state) || now=unknown
    echo "$NAME: ${now:-not requested}" >&2
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | "") return 1 ;;
    esac
    sleep "$POLL"
  done
}

install() { # may be repeated
  local mount=""
  if [[ -n $SHARE ]]; then
    mount="mountpoint -q /runs || {
      sudo apt-get update -qq && sudo apt-get install -qq nfs-common
      sudo mkdir -p /runs && sudo mount -t nfs $SHARE /runs
    }"
  fi
  on_all "set -e
    $mount
    sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet
    sudo docker pull --quiet $IMAGE"
}

start() { # FLAGS of `leon train`
  local flags options=()
  flags=$(printf ' %q' --distributed "$@" --config.loop.slices="$SLICES")
  # A restart takes the lock of a workdir in a bucket from its predecessor at once.
  options+=(--env=LEON_RUN="$ZONE/$NAME" --env=LEON_ATTEMPT="$(date +%s)")
  if [[ -n $SHARE ]]; then options+=(--volume=/runs:/runs); fi
  on_all "{ sudo docker stop --time=600 leon; sudo docker rm leon; } >/dev/null 2>&1
    sudo docker run --detach --name=leon --privileged --net=host ${options[*]} $IMAGE train$flags"
}

status() { # of the first host: `running 0`, `exited CODE` or `none`; fails if the host is unreachable
  queue ssh --node=0 --worker=0 --command="sudo docker inspect \
    --format='{{.State.Status}} {{.State.ExitCode}}' leon 2>/dev/null || echo none" | tail -n 1
}

logs() { queue ssh --node=0 --worker=0 --command="sudo docker logs --follow --tail=50 leon"; }

# Sends SIGTERM: the run saves a checkpoint and exits.
stop() { on_all "sudo docker stop --time=600 leon"; }

delete() { queue delete --force --quiet; }

keep() { # FLAGS of `leon train`
  local now
  while true; do
    # If the state is unknown, keep the slices and try again.
    if ! now=$(state); then sleep "$POLL"; continue; fi
    case $now in
      "") create ;;
      FAILED | SUSPENDED) delete ;; # such a request never becomes active again
      ACTIVE)
        case $(status || echo unknown) in
          running* | created* | unknown) ;;
          "exited 0") echo "$NAME: finished; delete the slices with $0 delete" >&2; return 0 ;;
          # A mistake in the flags, the config or the data; a restart would not help.
          "exited 2") echo "$NAME: stopped by a mistake; see $0 logs" >&2; return 2 ;;
          *) { install && start "$@"; } || echo "$NAME: not all hosts could start" >&2 ;;
        esac ;;
    esac
    sleep "$POLL"
  done
}

case ${1:-} in
  create | ready | install | start | status | logs | stop | delete | keep) "$@" ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
