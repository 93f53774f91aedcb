"""Tests of the torch layers; without torch there is nothing to test."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
