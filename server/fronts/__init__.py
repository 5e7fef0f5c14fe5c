"""Front processes: they own the clients' connections, so that the engine's process is free of HTTP.

    client <-HTTP-> front process <-frames on a Unix socket-> core process: the app, the engine

A front parses and writes HTTP and forwards ASGI messages; it keeps no other state. The core keeps
the fronts running and runs the app for the requests that they forward.
"""
