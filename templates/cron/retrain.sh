#!/bin/sh
# Trains the next model of a schedule, publishes it, and removes the old ones.
#   retrain.sh FOLDER    with FOLDER/request.json; models and temporary files are kept there too
# OPENSEARCH_* variables say where the cluster is and who you are. Exit code 0: done, or another run is at it; 1: failed;
# 2: the request is wrong. The last line on stdout says what came of it.
set -eu
cd "$1"
exec 9> retrain.lock
if ! flock -n 9; then
  echo "another run is at it" >&2
  exit 0
fi
mkdir -p temp
knn-train --request request.json --model_id 'products-{date}-{sha}' --model_dir models --temp_location temp --overwrite \
  --compare_to 'products-{date}-{sha}' --only_if_better 2% --publish auto
knn-models prune 'products-{date}-{sha}' --keep 3 --delete --model_dir models --opensearch_url "$OPENSEARCH_URL" >&2
