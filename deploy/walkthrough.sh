#!/usr/bin/env bash
# A coordinator and three hospitals on this machine, each with a folder and processes of its own, from nothing
# to an adapter. What stands between the two marks is the README's example, word for word.
#
#   deploy/walkthrough.sh FOLDER [key=value...]     further settings of the run, as --set has them
#
# PORT is the coordinator's (default 9443). Everything it started has ended when it ends.
set -euo pipefail
mkdir -p "$1"
cd "$1"
shift
export MODEL="${MODEL:-$(python3 -c 'from simulations.embedded import embedded_model_dir as d; print(d())')}"
export PORT="${PORT:-9443}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
settings=(--set "model.name=$MODEL")
for one in "$@"; do settings+=(--set "$one"); done
pids=()
stop() {
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
    wait
}
trap stop EXIT
# Three hospitals' records and a test set, made up.
consilium simulate init study --sites 3

up() {
    consilium "$1" up "${@:2}" >>"up-${*: -1}.log" 2>&1 &
    pids+=($!)
}

# --- README begins
# At the coordinator.
consilium server init coordinator --address 127.0.0.1:$PORT
up server coordinator
until consilium server status coordinator | grep -q 'Nodes: none'; do sleep 1; done

# At each hospital; enrolment.json and the bundle travel by mail, the fingerprints are compared by telephone.
for name in harbour north st-anne; do
    consilium client init $name --name $name --declared-size 1400 \
        --data study/sites/$name/records.jsonl --model $MODEL
    sed -i 's/approval = "ask"/approval = "auto"/' $name/site.toml
    consilium server enroll $name/enrolment.json coordinator --yes
    consilium client join bundle-$name.json --site $name --yes
    consilium client check --site $name
    up client --site $name
done

# At the coordinator: what it will cost, then the run.
consilium server plan study/run.toml coordinator "${settings[@]}"
consilium server run study/run.toml coordinator "${settings[@]}"
consilium server status coordinator

# At a hospital: what runs, what left, what it has spent.
consilium client status --site north
consilium client log --site north --verify
consilium client ledger --site north
# --- README ends
