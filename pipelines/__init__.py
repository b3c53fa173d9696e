# SPDX-License-Identifier: Apache-2.0
"""The programs: `knn-train` and `knn-models`."""

import logging

# Beam says on import that it can do without an optional package; a user who sees it looks for a mistake of their own.
logging.getLogger().addFilter(lambda record: not str(record.msg).startswith("apitools not found"))
