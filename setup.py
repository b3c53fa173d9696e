# SPDX-License-Identifier: Apache-2.0
"""For Beam's --setup_file; everything is in pyproject.toml."""

from setuptools import setup

setup()
