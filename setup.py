"""Three top folders, one import package: ``mixers``, ``mixers.backends`` and ``mixers.autotune``."""

from setuptools import find_packages, setup

homes = {"mixers": "mixers", "mixers.backends": "backends", "mixers.autotune": "autotune"}
packages = [name for home, where in homes.items() for name in (home, *(f"{home}.{p}" for p in find_packages(where)))]
setup(packages=packages, package_dir=homes)
