"""Which runner launches the steps of a network."""

from model.decoding.decoder import DirectRunner, Runner
from model.network import Network
from model.state import StatePool


def new_runner(network: Network, pool: StatePool, max_rows: int) -> Runner:
    """For steps of up to so many of the pool's rows at a time."""
    if network.recordable is None:
        return DirectRunner(network, pool)
    from model.decoding.cuda.decoder import GraphRunner

    return GraphRunner(network.recordable, pool, max_rows)
