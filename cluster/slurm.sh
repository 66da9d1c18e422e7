#!/usr/bin/env bash
# A Slurm job: Ray on its nodes, one run of ctrl_ray on that Ray, and no Ray any more at the end.
#
#   source venv/bin/activate                  # the same environment under the same path on every node
#   sbatch cluster/slurm.sh --preset stable-diffusion --control NAME=classifiers/NAME --data data.parquet \
#     --output-dir /SHARED/runs/mine
#   sbatch --nodes=4 cluster/slurm.sh ...                               # four nodes of eight GPUs
#   sbatch --gpus-per-node=1 --cpus-per-task=8 cluster/slurm.sh ...     # one GPU
#   scancel --batch --signal=TERM JOB         # ends it with a checkpoint; scancel alone leaves no time for one
#
# What stands before the file is for sbatch, what stands behind it is for ctrl_ray.train. The time limit and the signal
# above leave a checkpoint, and the log ends with the command that goes on. The exit status is that of ctrl_ray.train.
# Every node must see --output-dir under the same path: a shared folder, or s3://BUCKET/runs/mine.
#
#   CTRL_RAY_JOIN_TIMEOUT_S  seconds until every node must have joined (default 180)
#   CTRL_RAY_HEAD_ADDRESS    IPv4 address of the first node on the network that the nodes share (default: what its name
#                            means on the last node)
#
# Sites differ: add --partition, --account and the like here or before the file, and what loads your modules below.
#SBATCH --job-name=ctrl-ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# 4 for each of eight workers, 1 for each of eight reward actors, and some for Ray and the driver:
#SBATCH --cpus-per-task=48
#SBATCH --time=12:00:00
# To this script alone, five minutes before the limit; a checkpoint follows the update under way:
#SBATCH --signal=B:USR1@300
# A lost node is no reason to end a run with --scaling.min-workers; and a second try would need --resume:
#SBATCH --no-kill
#SBATCH --no-requeue
#SBATCH --output=ctrl-ray-%j.log
set -uo pipefail

readonly CORRECTABLE=2 FAILED=1 INTERRUPTED=130 # as ctrl_ray.train has them
say() { printf 'slurm.sh: %s\n' "$*"; }
fail() {
    local status=$1
    shift
    printf 'slurm.sh: error: %s\n' "$*" >&2
    exit "$status"
}

# -- What must be there

if [[ -z ${SLURM_JOB_ID:-} || -z ${SLURM_JOB_NODELIST:-} ]]; then
    fail $CORRECTABLE "SLURM_JOB_ID or SLURM_JOB_NODELIST is not set, so this is no Slurm job; submit it:" \
        "sbatch cluster/slurm.sh --preset stable-diffusion ..."
fi
for tool in srun scontrol getent python ray; do
    command -v "$tool" >/dev/null || fail $CORRECTABLE "$tool is not on PATH of $(hostname);" \
        "$(case $tool in python | ray) echo "activate the environment that has ctrl_ray before sbatch" ;;
        *) echo "this must run on a node of a Slurm cluster" ;; esac)"
done
python=$(command -v python)
ray=$(command -v ray)
"$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("ctrl_ray", "ray"))))' ||
    fail $CORRECTABLE "$python does not have ctrl_ray and ray; activate the environment that has them before sbatch," \
        "or run sbatch in the repository's root"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#nodes[@]} > 0)) || fail $FAILED "scontrol show hostnames '$SLURM_JOB_NODELIST' names no node"
head=${nodes[0]}
here=${SLURMD_NODENAME:-$(hostname -s)}
[[ $here == "$head" ]] || fail $CORRECTABLE "this runs on $here, but the job's first node is $head, where the driver must be;" \
    "submit it by sbatch, which starts it there"

# -- What Ray is told

# Between the ports of services and those that the system gives away; ten for each job.
port=$((20000 + SLURM_JOB_ID % 1200 * 10))
temp=/tmp/ctrl-ray-$SLURM_JOB_ID # short, as Ray's sockets need it
join_timeout_s=${CTRL_RAY_JOIN_TIMEOUT_S:-180}
# Whoever shares the machines could otherwise run code as this user. srun hands it on in the environment.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
# Without the address Ray would still report once that its usage statistics are switched off.
export RAY_USAGE_STATS_ENABLED=0 RAY_USAGE_STATS_REPORT_URL=http://127.0.0.1:9/
# A lost node is noticed after about 10 s (default: over a minute), and a lost head after 20 s.
export RAY_health_check_initial_delay_ms=2000 RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000
export RAY_health_check_failure_threshold=3 RAY_gcs_rpc_server_reconnect_timeout_s=20
# As in cluster/job.yaml.
export RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.3 RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=15

# -- Ray on the nodes

# Becomes a command on one node, beside what else runs there, with all that the job has of it; call it in a subshell.
# limit_s: after which it is ended.
on() {
    local node=$1
    shift
    exec ${limit_s:+timeout "$limit_s"} srun --overlap --export=ALL --nodes=1 --ntasks=1 --cpu-bind=none --nodelist="$node" "$@" </dev/null
}

# On a node: `ray start` with these options until a signal comes or Ray ends; then nothing of it is left. A task gets it
# as text, because Slurm copies this file to the first node only.
# shellcheck disable=SC2329 # it is used as text
run_node() {
    local node=$1 temp=$2 ray=$3 mark="CTRL_RAY_SLURM=$SLURM_JOB_ID-$1" stopped='' pid='' gpus=${SLURM_GPUS_ON_NODE:-} status
    local -a visible left
    shift 3
    trap 'stopped=1; kill -TERM "$pid"' TERM INT HUP
    if [[ -z $gpus ]]; then
        IFS=, read -r -a visible <<<"${CUDA_VISIBLE_DEVICES:-}"
        gpus=${#visible[@]}
    fi
    local -a options=(--num-cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}" --num-gpus="$gpus" --resources="{\"slurm_node_$node\": 1}")
    # Where the job has a share of the machine's memory, in the proportions that Ray takes of a whole machine.
    if ((${SLURM_MEM_PER_NODE:-0} > 0)); then
        options+=(--memory=$((SLURM_MEM_PER_NODE * 1048576 * 7 / 10)))
        options+=(--object-store-memory=$((SLURM_MEM_PER_NODE * 1048576 * 3 / 10)))
    fi
    [[ -x $ray ]] || { echo "$ray is not on $node; the environment must be under the same path on every node" && return 1; }
    if [[ -d $temp && -O $temp && ! -L $temp ]]; then rm -rf "$temp"; fi
    mkdir -m 700 "$temp" || return
    ulimit -n "$(ulimit -Hn)"
    env "$mark" "$ray" start --block --temp-dir="$temp" "${options[@]}" "$@" &
    pid=$!
    [[ -z $stopped ]] || kill -TERM "$pid"
    wait "$pid"
    status=$?
    [[ -z $stopped ]] || status=0
    kill -TERM "$pid" 2>/dev/null
    for _ in {1..50}; do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    # Agents and workers that outlive `ray start` have its environment.
    for _ in {1..20}; do
        mapfile -t left < <(grep -lsxzF "$mark" /proc/[0-9]*/environ)
        ((${#left[@]})) || break
        kill -KILL "${left[@]//[!0-9]/}" 2>/dev/null
        sleep 0.1
    done
    rm -rf "$temp"
    return "$status"
}

declare -A tasks=() # the srun of each node
start_node() {
    local node=$1
    shift
    on "$node" bash -c "$(declare -f run_node); run_node \"\$@\"" run_node "$node" "$temp" "$ray" \
        --disable-usage-stats --dashboard-agent-listen-port=$((port + 2)) --min-worker-port=0 --max-worker-port=0 "$@" \
        >"$logs/$node.log" 2>&1 &
    tasks[$node]=$!
}

runs() { kill -0 "$1" 2>/dev/null; }

# What a node's Ray said last.
last_words() { sed "s/^/  $1: /" <(tail -n 12 "$logs/$1.log"); }

# Ends with a message when a node's Ray has ended or the time is over; else returns.
check_nodes() {
    local node
    ((!signals)) || fail $INTERRUPTED "stopped while Ray was starting; nothing was trained"
    for node in "${!tasks[@]}"; do
        runs "${tasks[$node]}" || fail $FAILED "Ray ended on $node before the run began:"$'\n'"$(last_words "$node")"
    done
}

logs=$(mktemp -d)
home_file=
training=
looking=
signals=0
forward() {
    [[ -n $training ]] || return
    say "a signal has come: the run ends with a checkpoint"
    kill -TERM "$training" 2>/dev/null
}
# shellcheck disable=SC2329 # by the trap
clean_up() {
    local node pid waited status=$?
    trap '' TERM USR1 INT
    for pid in $training $looking; do kill -KILL "$pid" && wait "$pid"; done 2>/dev/null
    for node in "${!tasks[@]}"; do kill -TERM "${tasks[$node]}" 2>/dev/null; done
    for ((waited = 0; waited < 150; waited++)); do
        for node in "${!tasks[@]}"; do runs "${tasks[$node]}" || unset "tasks[$node]"; done
        ((${#tasks[@]})) || break
        sleep 0.2
    done
    for node in "${!tasks[@]}"; do kill -KILL "${tasks[$node]}" && wait "${tasks[$node]}"; done 2>/dev/null
    [[ -z $home_file ]] || rm -f "$home_file"
    rm -rf "$logs"
    exit "$status"
}
trap clean_up EXIT
trap 'signals=$((signals + 1)) && forward' TERM USR1 INT

address=${CTRL_RAY_HEAD_ADDRESS:-}
if [[ -z $address ]]; then
    name=$(scontrol show node --oneliner "$head" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    # On the node itself its name may mean a loopback address.
    address=$(limit_s=$join_timeout_s on "${nodes[-1]}" getent ahostsv4 "${name:-$head}" | sed -n '/^127\./!s/[[:space:]].*//p' | head -n 1)
    ((${#nodes[@]} > 1)) || address=${address:-127.0.0.1}
fi
[[ -n $address ]] || fail $FAILED "${nodes[-1]} does not say an IPv4 address of $head, the job's first node; give it:" \
    "CTRL_RAY_HEAD_ADDRESS=10.1.2.3 sbatch ..."
export RAY_ADDRESS=$address:$port

# Ray's dashboard process asks cloud metadata addresses who the provider is, unless this file is there.
if (set -o noclobber && echo '{}' >~/ray_bootstrap_config.yaml) 2>/dev/null; then home_file=~/ray_bootstrap_config.yaml; fi

say "Ray on ${nodes[*]}; head $RAY_ADDRESS; stop with a checkpoint: scancel --batch --signal=TERM $SLURM_JOB_ID"
deadline=$((SECONDS + join_timeout_s))
start_node "$head" --head --node-ip-address="$address" --port=$port --include-dashboard=false \
    --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 3))
until (: <"/dev/tcp/$address/$port") 2>/dev/null; do
    check_nodes
    ((SECONDS < deadline)) ||
        fail $FAILED "the head on $head does not answer at $RAY_ADDRESS after $join_timeout_s s:"$'\n'"$(last_words "$head")"
    sleep 0.2
done
for node in "${nodes[@]:1}"; do start_node "$node" --address="$RAY_ADDRESS"; done

# Prints the nodes that have not joined in time, and the CPUs and GPUs of those that have.
"$python" - "$((deadline - SECONDS))" "${nodes[@]}" >"$logs/joined" <<'PYTHON' &
import logging, sys, time

import ray

deadline, names = time.monotonic() + float(sys.argv[1]), sys.argv[2:]
ray.init(log_to_driver=False, logging_level=logging.ERROR)
while True:
    there = {kind for node in ray.nodes() if node["Alive"] for kind in node["Resources"]}
    missing = [name for name in names if f"slurm_node_{name}" not in there]
    if not missing or time.monotonic() > deadline:
        break
    time.sleep(0.5)
total = ray.cluster_resources()
print(*missing)
print(f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs")
PYTHON
looking=$!
while runs $looking; do
    check_nodes
    sleep 0.2
done
wait $looking || fail $FAILED "the head at $RAY_ADDRESS refuses a driver on $head:"$'\n'"$(last_words "$head")"
looking=
{ read -r -a missing && read -r there; } <"$logs/joined"
if ((${#missing[@]})); then
    for node in "${missing[@]}"; do last_words "$node" >&2; done
    fail $FAILED "${#missing[@]} of ${#nodes[@]} nodes did not join Ray at $RAY_ADDRESS within $join_timeout_s s:" \
        "${missing[*]}. What they said stands above. See whether they reach that address, leave them out" \
        "(sbatch --exclude=$(IFS=, && echo "${missing[*]}")), or set CTRL_RAY_JOIN_TIMEOUT_S higher"
fi
say "${#nodes[@]} of ${#nodes[@]} nodes have joined: $there"

# -- The run

"$python" -m ctrl_ray.train "$@" &
training=$!
((!signals)) || forward
while true; do
    before=$signals
    wait "$training"
    status=$?
    ((signals > before)) || break # else a signal ended the wait, not the training
done
training=
# Before it listens, the signal simply ends it.
((!signals || status != 128 + 15)) || status=$INTERRUPTED
if ((status == INTERRUPTED || status == FAILED)); then
    resume=
    [[ " $* " == *" --resume "* ]] || resume=--resume
    say "to go on$( ((status == FAILED)) && echo ", once the cause is gone"): sbatch --nodes=${#nodes[@]} cluster/slurm.sh" \
        "${*@Q} $resume"
fi
exit "$status"
