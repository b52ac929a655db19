"""The server of workers and of the admin API: uvicorn's life, connections of our own."""

from gateway.processes.http.server import Server, server

__all__ = ["Server", "server"]
