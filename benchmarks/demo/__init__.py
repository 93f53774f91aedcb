"""A byte-level language model of Lattice layers, trained on the source of Python's own standard library.

python -m benchmarks.demo [--seconds 45] [--out runs/demo]
"""
