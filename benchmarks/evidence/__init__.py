"""What the mixers learn: six experiments, each a script, its JSON, and a page that is drawn from it.

    python -m benchmarks.evidence.recall        associations remembered, against the size of the state
    python -m benchmarks.evidence.chunk_size    Lattice at chunks of 1 to 256 tokens: loss and speed
    python -m benchmarks.evidence.slots         memory slots below, at and above the width, Lattice and TTT
    python -m benchmarks.evidence.redundancy    what slots do over time, under orthogonal and plain updates
    python -m benchmarks.evidence.low_rank      singular values of keys and values beside what Lattice keeps
    python -m benchmarks.evidence.bytes         a byte-level language model of every mixer

Each writes ``benchmarks/results/evidence/<name>.json`` as runs end, and begins where that file stops.
"""
