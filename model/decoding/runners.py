"""Choice of the runner for a network."""

from model.decoding.decoder import DirectRunner, Runner
from model.network import Network
from model.state import StatePool


def new_runner(network: Network, pool: StatePool, max_rows: int) -> Runner:
    """A runner for steps of at most `max_rows` rows of the pool."""
    if network.recordable is None:
        return DirectRunner(network, pool)
    from model.decoding.cuda.decoder import GraphRunner

    return GraphRunner(network.recordable, pool, max_rows)
