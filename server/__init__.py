"""The inference server: engine, sessions, HTTP and the command line."""

__version__ = "0.1.0"
