# SPDX-License-Identifier: Apache-2.0
"""Retrains the model of one index every Sunday: train, gate, publish, notify, and prune what is old.

For Airflow 3 with the standard provider. `knn-train` has a virtual environment of its own on the workers, since
Beam and Airflow hold back each other's dependencies; KNN_TRAIN_BIN is its bin folder. A connection `opensearch`
(schema, host, port, login, password) says where the cluster is: its password goes to the commands in their environment
and is masked in logs.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, task

BIN = os.environ.get("KNN_TRAIN_BIN", "/opt/knn-train/bin")
#: request.json is here; models and temporary files go here. Workers share it; s3:// and gs:// paths do as well.
FOLDER = os.environ.get("KNN_TRAIN_FOLDER", "/var/lib/knn-train")
MODEL_ID = "products-{date}-{sha}"

COMMAND = {
    "append_env": True,
    "env": {
        "OPENSEARCH_URL": "{{ conn.opensearch.schema or 'https' }}://{{ conn.opensearch.host }}:{{ conn.opensearch.port }}",  # noqa: E501
        "OPENSEARCH_USERNAME": "{{ conn.opensearch.login or '' }}",
        "OPENSEARCH_PASSWORD": "{{ conn.opensearch.password or '' }}",
        "PATH": f"{BIN}:{os.environ.get('PATH', '')}",
    },
    # The last line that a command prints is its result.
    "output_processor": json.loads,
}

with DAG(
    "train_knn_model",
    schedule="0 3 * * 0",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    # A retry finds the model that failed under the same id, and replaces it.
    default_args={"retries": 1, "retry_delay": timedelta(minutes=10), "execution_timeout": timedelta(hours=6)},
):
    train = BashOperator(
        task_id="train",
        bash_command=(
            f"knn-train --request {FOLDER}/request.json --model_id '{MODEL_ID}' --model_dir {FOLDER}/models "
            f"--temp_location {FOLDER}/temp --overwrite --compare_to '{MODEL_ID}' --only_if_better 2%"
        ),
        **COMMAND,
    )

    @task.short_circuit
    def gate(result: dict[str, Any]) -> bool:
        """Whether there is a model to publish: a new one, or the last (`kept` says why), which is published if it did
        not get into the cluster before. What else must hold goes here; for recall there is `knn-train --min_recall`,
        below which the training fails.
        """
        return result["state"] == "created"

    publish = BashOperator(
        task_id="publish",
        bash_command=(
            'knn-models publish \'{{ ti.xcom_pull(task_ids="train")["model_id"] }}\' '
            f'--model_dir {FOLDER}/models --opensearch_url "$OPENSEARCH_URL"'
        ),
        **COMMAND,
    )

    prune = BashOperator(
        task_id="prune",
        bash_command=(
            f"knn-models prune '{MODEL_ID}' --keep 3 --delete --model_dir {FOLDER}/models "
            '--opensearch_url "$OPENSEARCH_URL"'
        ),
        **COMMAND,
    )

    @task
    def notify(trained: dict[str, Any], published: dict[str, Any]) -> str:
        """Put your channel here; the text is also this task's result."""
        return f"{trained['model_id']} is in the cluster, by {published['route']}: {published['explanation']}"

    gate(train.output) >> publish >> [prune, notify(train.output, publish.output)]
