#!/usr/bin/env bash
# Turns AWS's spot interruption notice into a drain of this Ray node. Ray itself does not: without this a run would
# learn of the loss only when the node is gone, and lose the updates since its last checkpoint.
#
# AWS publishes the notice about two minutes ahead at the instance's metadata address. On instances that are not spot
# there is never one, and the watcher does nothing. Rebalance recommendations are ignored: they are not interruptions.
# It ends when the notice has been passed on, or when this node's raylet ends.
#
#   SPOT_WATCH_METADATA    base of the metadata service (default http://169.254.169.254)
#   SPOT_WATCH_INTERVAL_S  seconds between two looks (default 5, as AWS advises)
#   SPOT_WATCH_LOG         default /tmp/ray/spot-watch.log
#   SPOT_WATCH_RAYLET_PID  the raylet to watch for (default: the newest one of this machine)
# `ray` must be on PATH, with RAY_AUTH_MODE=token in the environment where the cluster wants a token.
set -uo pipefail

metadata=${SPOT_WATCH_METADATA:-http://169.254.169.254}
interval=${SPOT_WATCH_INTERVAL_S:-5}
log=${SPOT_WATCH_LOG:-/tmp/ray/spot-watch.log}
start_wait_s=60
mkdir -p "$(dirname "$log")"
exec >>"$log" 2>&1 </dev/null

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*"; }

# By starting time (field 22 of stat): process ids start anew when they run out.
newest_raylet() {
    local stat newest= latest=-1
    local -a fields
    for stat in /proc/[0-9]*/stat; do
        { read -r -a fields <"$stat"; } 2>/dev/null || continue
        [[ ${fields[1]} == "(raylet)" ]] || continue
        ((fields[21] > latest)) && latest=${fields[21]} newest=${fields[0]}
    done
    [[ -n $newest ]] && echo "$newest"
}

alive() { [[ -d /proc/$1 ]] && ! grep -q '^State:[[:space:]]*[ZX]' "/proc/$1/status" 2>/dev/null; }

# The raylet's own command line says which node it is and where the cluster's head is. Either spelling of an option.
option_of() { tr '\0' '\n' <"/proc/$1/cmdline" | sed -n "s/^--$2[-_]$3=//p" | head -n 1; }

request() { curl --silent --max-time 2 --noproxy '*' "$@"; }

# Sets `status` and `body` of the notice. IMDSv2: a session token first, a new one when the old one is refused.
token=
look() {
    local answer
    status=000 body=
    if [[ -z $token ]]; then
        token=$(request --fail --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 21600' \
            "$metadata/latest/api/token") || { token= && return; }
    fi
    answer=$(request --write-out '\n%{http_code}' --header "X-aws-ec2-metadata-token: $token" \
        "$metadata/latest/meta-data/spot/instance-action") || return
    status=${answer##*$'\n'}
    body=${answer%$'\n'*}
    [[ $status != 401 ]] || token=
}

# Seconds until the time in a notice such as {"action": "terminate", "time": "2026-01-31T12:00:00Z"}.
seconds_left() {
    local time end
    time=$(sed -n 's/.*"time"[[:space:]]*:[[:space:]]*"\([^"]*\)".*/\1/p' <<<"${1//$'\n'/ }")
    if [[ -z $time ]] || ! end=$(date -u -d "$time" +%s 2>/dev/null); then
        echo 110 # AWS promises two minutes, and the last look was a few seconds ago
        return
    fi
    local left=$((end - $(date -u +%s)))
    echo $((left > 0 ? left : 0))
}

raylet=${SPOT_WATCH_RAYLET_PID:-}
for ((waited = 0; waited < start_wait_s; waited++)); do
    [[ -n $raylet ]] && break
    raylet=$(newest_raylet) || sleep 1
done
if [[ -z $raylet ]] || ! alive "$raylet"; then
    say "no raylet here: nothing to watch for"
    exit 1
fi
node=$(option_of "$raylet" node id)
address=$(option_of "$raylet" gcs address)
if [[ ! $node =~ ^[0-9a-f]{56}$ || -z $address ]]; then
    say "raylet $raylet does not say its node id ('$node') and the head's address ('$address'): give up"
    exit 1
fi
say "watching for a spot notice on node $node of $address (raylet $raylet)"

last=
while alive "$raylet"; do
    look
    if [[ $status == 200 && $body == *'"action"'* ]]; then
        left=$(seconds_left "$body")
        say "notice: ${body//$'\n'/ } ($left s left)"
        if timeout 60 ray drain-node --address "$address" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
            --reason-message "AWS spot interruption notice" --deadline-remaining-seconds "$left"; then
            say "drain accepted"
            exit 0
        fi
        say "drain not accepted, trying again"
    elif [[ $status != "$last" && $status != 404 ]]; then
        say "the metadata service answered $status; watching on"
    fi
    last=$status
    sleep "$interval"
done
say "raylet $raylet has ended"
