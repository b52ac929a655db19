"""One program for each client, run in the client's own environment (.venv-clients): `python -m tests.clients.NAME` with a Site as JSON on
standard input; what became of each deed is printed as JSON. tests/engine/test_every_client.py starts them and judges."""
