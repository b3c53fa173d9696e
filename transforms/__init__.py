# SPDX-License-Identifier: Apache-2.0
"""Beam transforms that sample vectors and train OpenSearch k-NN models."""
