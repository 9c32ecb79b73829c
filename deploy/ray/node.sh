#!/usr/bin/env bash
# Keeps Ray running on a host of the cluster and, on the head, the fleet. `ray up` calls it; settings are in node.env.
#
#   node.sh start head               as the head, in the background
#   node.sh start worker HEAD_IP     as a worker that joins the head
#   node.sh stop                     end it, Ray with it
#   node.sh run                      in the foreground, in its last role: for systemd
#
# Crashed processes are started again; after `ray stop` they stay ended, so that `ray down` works. When the host starts,
# cron starts node.sh (by an @reboot line that `start` writes), or systemd does (lorafleet-node.service).
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
state=$HOME/.lorafleet
log=$state/node.log
# shellcheck source=node.env
. "$here/node.env"

say() { echo "$(date '+%F %T') node.sh: $*"; }

is_supervised() {
    local pid
    pid=$(cat "$state/node.pid" 2> /dev/null) && [[ -r /proc/$pid/cmdline ]] \
        && tr '\0' ' ' < "/proc/$pid/cmdline" | grep -q 'node.sh run'
}

# Changes with the role, the settings and the wheel.
what_starts() { { echo "$*"; cat "$here"/node.* "$here/../dist/"*; } 2> /dev/null | sha256sum; }

stop() {
    if is_supervised; then
        kill -KILL -- "-$(cat "$state/node.pid")" 2> /dev/null
    fi
    rm -f "$state/node.pid"
    at_reboot nothing
    ray stop --force > /dev/null 2>&1
}

at_reboot() { # COMMAND, or "nothing"
    command -v crontab > /dev/null || return
    {
        crontab -l 2> /dev/null | grep -v 'node.sh run'
        [[ $1 == nothing ]] || echo "@reboot $1"
    } | crontab -
}

start() {
    case ${1-} in
        head) ;;
        worker) [[ -n ${2-} ]] || { say "which head? node.sh start worker HEAD_IP" >&2; exit 2; } ;;
        *) say "start head, or start worker HEAD_IP" >&2; exit 2 ;;
    esac
    mkdir -p "$state" && chmod 700 "$state"
    if [[ $1 == worker && $(cat "$state/started" 2> /dev/null) == "$(what_starts "$@")" ]] && is_supervised \
        && timeout 30 python "$here/hosts.py" member; then
        say "runs, and the head knows it" # a restarted head may start a node that never stopped
        return
    fi
    stop
    echo "$*" > "$state/role"
    what_starts "$@" > "$state/started"
    at_reboot "setsid $here/node.sh run >> $log 2>&1" \
        || say "without cron Ray does not come back by itself when the host restarts; see lorafleet-node.service" >&2
    setsid "$here/node.sh" run >> "$log" 2>&1 < /dev/null &
    local deadline=$((SECONDS + 60))
    until ray health-check --address "$(head_address)" > /dev/null 2>&1; do
        if ((SECONDS > deadline)); then
            say "Ray does not answer at $(head_address); the end of $log:" >&2
            tail -n 20 "$log" >&2
            exit 1
        fi
        sleep 0.5
    done
}

head_address() {
    read -r role head < "$state/role"
    [[ $role == worker ]] || head=$(ip -4 route get 192.0.2.1 2> /dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p')
    echo "${head:-127.0.0.1}:$RAY_PORT"
}

run_ray() { # ROLE; replaces the calling shell
    local role=$1 config=$HOME/ray_bootstrap_config.yaml
    # shellcheck disable=SC2086 # RAY_PORTS is several words
    if [[ $role == head ]]; then
        exec ray start --head --block --port=$RAY_PORT $RAY_PORTS --include-dashboard=false --disable-usage-stats \
            ${RAY_REDIS_PASSWORD:+--redis-password="$RAY_REDIS_PASSWORD"} \
            $([[ -f $config ]] && echo --autoscaling-config="$config")
    else
        exec ray start --block --address="$(head_address)" $RAY_PORTS --disable-usage-stats
    fi
}

# Start the fleet, or follow the running one, until `lorafleet down` ends it.
run_fleet() {
    until ray health-check --address "$(head_address)" > /dev/null 2>&1; do sleep 0.5; done
    python "$here/hosts.py" wait 120 || true
    until lorafleet up "@$here/fleet.flags" --follow; do
        say "the fleet is not up; trying again in 5 s"
        sleep 5
    done
}

run() {
    local role ray_pid fleet_pid=
    read -r role _ < "$state/role" || { say "node.sh start comes first" >&2; exit 2; }
    echo $$ > "$state/node.pid"
    is_running() { kill -0 "$ray_pid" 2> /dev/null; }
    has_raylet() { pgrep -P "$ray_pid" -x raylet > /dev/null; }
    trap 'say "stopped"; ray stop > /dev/null 2>&1; kill -KILL 0' TERM INT
    while true; do
        ray stop --force > /dev/null 2>&1 # remains of an earlier run
        say "starting Ray ($role)"
        run_ray "$role" &
        ray_pid=$!
        if [[ $role == head ]]; then
            run_fleet &
            fleet_pid=$!
        fi
        # `ray start --block` ends when one of Ray's processes crashes. After `ray stop` it stays, without a raylet.
        while is_running && ! has_raylet; do sleep 1; done
        while is_running && has_raylet; do sleep 1; done
        sleep 3
        [[ -z $fleet_pid ]] || kill_tree "$fleet_pid"
        if is_running; then
            say "Ray was stopped"
            at_reboot nothing
            [[ $role != head ]] || stop_others
            kill -KILL 0
        fi
        say "Ray ended; starting it again"
        sleep 2
    done
}

# `ray down` ends the hosts a cloud provider has created, but of your own hosts only the head.
stop_others() {
    local user key address
    python "$here/hosts.py" others | while read -r user key address; do
        say "stopping $address"
        ssh -n -i "$key" -o BatchMode=yes -o ConnectTimeout=5 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
            -o LogLevel=ERROR "$user@$address" '~/lorafleet/ray/node.sh stop'
    done
}

kill_tree() { # PID
    local child
    for child in $(pgrep -P "$1"); do kill_tree "$child"; done
    kill -KILL "$1" 2> /dev/null
}

case ${1-} in
    start) shift; start "$@" ;;
    stop) stop ;;
    run) run ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
