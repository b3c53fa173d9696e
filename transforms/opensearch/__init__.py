# SPDX-License-Identifier: Apache-2.0
"""Vectors out of OpenSearch: `ReadFromOpenSearch` for pipelines, `OpenSearchVectors` for everything else."""

from transforms.opensearch.connection import OpenSearchConnection
from transforms.opensearch.reading import OpenSearchVectors, ReadFromOpenSearch
from transforms.opensearch.session import ServerError, Session

__all__ = ["OpenSearchConnection", "OpenSearchVectors", "ReadFromOpenSearch", "ServerError", "Session"]
