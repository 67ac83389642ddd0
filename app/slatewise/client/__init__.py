"""The client: asks a server over HTTP. It needs httpx alone, and imports nothing of the server.

    members --> body.py, values.py --> calls.py --> client.py or async_client.py --> results.py
                (plain JSON)           (one call)    (httpx, with the rules of        or errors.py
                                                      exchange.py)

`from slatewise import Client` loads this package on first use.
"""
