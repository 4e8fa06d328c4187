"""Throughput of each part on this machine; `python -m benchmark.speed --help` tells more."""
