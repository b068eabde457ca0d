#!/usr/bin/env python3
"""Exit 0 where the server in this container answers /health with 200, else 1.

``NSA_SERVE_PORT`` is the port; with ``NSA_SERVE_TLS=1`` the server speaks TLS, and since the check
stays inside the container the certificate's name isn't compared.
"""

import http.client
import os
import ssl
import sys

PATIENCE = 9.0  # seconds; the server itself gives a silent engine 8


def is_healthy() -> bool:
    """Whether the server answers and says that its engine does."""
    port = int(os.environ.get("NSA_SERVE_PORT", "8000"))
    connection = _connection(port)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException) as error:
        print(f"127.0.0.1:{port}: {error}", file=sys.stderr)
        return False
    finally:
        connection.close()


def _connection(port: int) -> http.client.HTTPConnection:
    if os.environ.get("NSA_SERVE_TLS") == "1":
        unverified = ssl.create_default_context()
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE, context=unverified)
    return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)


if __name__ == "__main__":
    sys.exit(not is_healthy())
