"""Load tests of servers that speak OpenAI's API, and proofs of what latentd promises.

    python -m loadtest --help

`bench`, `capacity` and `compare` measure any such server; the other commands start latentd.
"""
