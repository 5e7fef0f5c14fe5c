"""Load tests for servers with OpenAI's API, and verification of latentd's guarantees.

    python -m loadtest --help

`bench`, `capacity` and `compare` measure any such server; the other commands start latentd.
"""
