#!/usr/bin/env bash
# Runs a command beside an Apache Spark of one master and two workers, all on this host:
#   tests/spark/cluster.sh PYTHON COMMAND [ARGUMENT...]
# PYTHON has pyspark. The command finds the master's URL in SPARK_MASTER. State and logs are in a folder that is removed at
# the end.
set -euo pipefail

python=$1
shift
SPARK_HOME=$("$python" -c 'import os, pyspark; print(os.path.dirname(pyspark.__file__))')
export SPARK_HOME PYSPARK_PYTHON=$python SPARK_LOCAL_IP=127.0.0.1
folder=$(mktemp --directory)
export SPARK_WORKER_DIR=$folder/work

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

processes=()
stop() {
    kill "${processes[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -r "$folder"
}
trap stop EXIT

port=$(free_port)
export SPARK_MASTER=spark://127.0.0.1:$port
start() { # CLASS ARGUMENTS...
    "$SPARK_HOME/bin/spark-class" "org.apache.spark.deploy.$1" "${@:2}" >>"$folder/log" 2>&1 &
    processes+=($!)
}
start master.Master --host 127.0.0.1 --port "$port" --webui-port "$(free_port)"
for _ in 1 2; do
    start worker.Worker "$SPARK_MASTER" --cores 1 --memory 3g --webui-port "$(free_port)"
done
deadline=$((SECONDS + 120))
until [ "$(grep -c 'Registering worker' "$folder/log" || true)" -ge 2 ]; do
    if ((SECONDS >= deadline)); then
        cat "$folder/log" >&2
        echo "cluster.sh: no two workers within 120 seconds" >&2
        exit 1
    fi
    sleep 0.2
done
"$@"
