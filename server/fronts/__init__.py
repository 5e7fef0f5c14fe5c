"""Processes that own the clients' connections, so that HTTP costs the engine's process little.

    client <-HTTP-> front process <-frames on a Unix socket-> core process: the app, the engine

A front reads and writes HTTP and carries ASGI messages; it knows no session and decides nothing.
The core keeps the fronts running and runs the app for what they carry.
"""
