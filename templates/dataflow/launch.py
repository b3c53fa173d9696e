# SPDX-License-Identifier: Apache-2.0
"""What the launcher of a flex template runs. Not `pipelines/train.py` itself: functions of `__main__` travel badly."""

from pipelines.train import main

if __name__ == "__main__":
    main()
