"""Sweeps over material that this project did not write: torch's own tables of ops and modules, and published model families."""
