"""Build entry point; the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # configs/ is at the root of the clone and inside the package of a wheel.
    packages=[*find_packages(include=["speedit_plugins*"]), "speedit_plugins.configs"],
    package_dir={"speedit_plugins.configs": "configs"},
)
