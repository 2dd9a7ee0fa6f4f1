"""Where the packages lie; everything else is in pyproject.toml.

The folder plugins/ installs as `doge_plugins`, which a static list of packages could say only by naming every room.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["doge_deploy", "doge_deploy.*"]),
        "doge_plugins",
        *(f"doge_plugins.{name}" for name in find_packages("plugins")),
    ],
    package_dir={"doge_plugins": "plugins"},
)
