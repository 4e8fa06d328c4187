"""Launchers: each executes prepared run directories; what a run computes never depends on which one did it."""
