"""The network compiled for CPUs."""
