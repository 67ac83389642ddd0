"""The image's health check: exits with 0 if the server in this container answers 200 to GET /readyz (or GET /livez).

Called by: the Dockerfile, every few seconds, with `python -I -S`. A bare socket starts in a tenth of the time that an
HTTP client takes to import, and no proxy variable applies to it. With TLS it shows the certificate of the server, which
may ask clients for one, and does not check it: it is not issued for 127.0.0.1.
"""

import os
import socket
import sys

REQUEST = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

setting = os.environ.get("SLATEWISE_PORT", "")
port = int(setting) if setting.isdecimal() else 8000  # a Kubernetes service link is no port
path = b"/livez" if sys.argv[1:] == ["/livez"] else b"/readyz"
certificate = os.environ.get("SLATEWISE_TLS_CERTIFICATE")
try:
    with socket.create_connection(("127.0.0.1", port), timeout=1) as plain:
        connection = plain
        if certificate:
            import ssl  # takes 10 ms

            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.load_cert_chain(certificate, os.environ.get("SLATEWISE_TLS_KEY"))
            connection = context.wrap_socket(plain)
        connection.sendall(REQUEST % path)
        status = connection.makefile("rb").readline().split()[1]
except (OSError, IndexError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
sys.exit(status != b"200")
