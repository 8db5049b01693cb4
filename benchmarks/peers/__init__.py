"""Other servers with the same network behind them, each in a virtual environment of its own.

    python -m benchmarks.peers setup [NAME ...]     make the environments, in the versions of their requirements.txt
    python -m benchmarks.peers check [NAME ...]     start each, ask it for images, and compare them with our own
    python -m benchmarks.peers.measure              measure

Every peer speaks the contract of `benchmarks._servers` and draws by `_sampling`: with our own networks and samplers, in
float32, with one thread in each of as many processes as there are cores. What differs is how requests become batches.
"""
