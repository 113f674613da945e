#!/usr/bin/env bash
# A coordinator and three hospitals on this machine, each with a folder and processes of its own, from nothing
# to an adapter. What stands between the two marks is the README's example, word for word.
#
#   deploy/walkthrough.sh FOLDER [PORT]      PORT is the coordinator's, 9443 if left out
#
# Needs `consilium` on PATH. Everything it started has ended when it ends.
set -euo pipefail
mkdir -p "$1"
cd "$1"
export PORT="${2:-9443}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
MODEL="$(python3 -c 'from simulations.embedded import embedded_model_dir as d; print(d())')"
stop() {
    kill $(jobs -p) 2>/dev/null || true
    wait
}
trap stop EXIT

# Three hospitals' records, a test set and a run, made up.
consilium simulate init study --sites 3
sed -i "s|^name = .*|name = \"$MODEL\"|; s|^rounds = .*|rounds = 3|; s|^local-steps = .*|local-steps = 4|" study/run.toml

# --- README begins
# At the coordinator.
consilium server init coordinator --address 127.0.0.1:$PORT
consilium server up coordinator > coordinator.log 2>&1 &
until consilium server status coordinator | grep -q 'Nodes: none'; do sleep 1; done

# At each hospital. The enrolment and the bundle travel by mail; fingerprints are compared by telephone.
for name in harbour north st-anne; do
    consilium client init $name --name $name --declared-size 1400 \
        --data study/sites/$name/records.jsonl --model $MODEL
    sed -i 's/approval = "ask"/approval = "auto"/' $name/site.toml
    consilium server enroll $name/enrolment.json coordinator --yes
    consilium client join bundle-$name.json --site $name --yes
    consilium client check --site $name
    consilium client up --site $name > $name.log 2>&1 &
done

# At the coordinator: what it will cost, the run, what became of it.
consilium server plan study/run.toml coordinator
consilium server run study/run.toml coordinator
consilium server status coordinator

# At a hospital: what runs, what left, what it has spent.
consilium client status --site north
consilium client log --site north --verify
consilium client ledger --site north
# --- README ends
