"""Which decoder launches the steps of a network."""

from model.decoding.decoder import Decoder, DirectDecoder
from model.network import Network
from model.state import StatePool


def new_decoder(network: Network, pool: StatePool, most_rows: int) -> Decoder:
    """For steps of up to so many of the pool's rows at a time."""
    if network.recordable is None:
        return DirectDecoder(network, pool)
    from model.decoding.cuda.decoder import GraphDecoder

    return GraphDecoder(network.recordable, pool, most_rows)
