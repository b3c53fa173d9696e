# SPDX-License-Identifier: Apache-2.0
"""For Beam's --setup_file and older tools; everything else is in pyproject.toml."""

from setuptools import setup

# Here, because there is no way to say it in pyproject.toml that all versions of setuptools on workers understand.
setup(license="Apache-2.0")
