"""``--ssl-certfile`` and ``--ssl-keyfile``: who speaks TLS is answered, and nobody else."""

from __future__ import annotations

import asyncio
import ssl

import httpx
import pytest

from nsa_serve.errors import ConfigError
from nsa_serve.server import serve as serve_room
from nsa_serve.server.flags import ServeFlags
from tests.server_fakes import listening

# Of nobody, for 127.0.0.1, valid from 2020 to 2120.
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgGXmmEXNbAwGnfAPr
uUI7M66Typ4GudLySXJQjkgExp2hRANCAARTfCsMaHK63sKDRGjSEd6bsNlod0mM
xnb1kakpHT7hH+bYR0KETztTiL+DR19mGTvktJGR07iX0yHnhJyyl6YP
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBWzCCAQKgAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAkxMjcuMC4w
LjEwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CTEyNy4wLjAuMTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABFN8KwxocrrewoNE
aNIR3puw2Wh3SYzGdvWRqSkdPuEf5thHQoRPO1OIv4NHX2YZO+S0kZHTuJfTIeeE
nLKXpg+jQzBBMA8GA1UdEQQIMAaHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAdBgNV
HQ4EFgQU4fUu/GvK1lXtp2IdTh3HX8qNmp8wCgYIKoZIzj0EAwIDRwAwRAIgPhfg
9J38H1QzVXXM6xoehj9xMM8Gx80uceShXWwiy3kCIHTZXeQuNDDp0KxixhVY+Dbe
HC84StnEikxTPLthGLXo
-----END CERTIFICATE-----
"""


@pytest.fixture
def files(tmp_path):
    """(certificate, key), as files."""
    paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
    for path, text in zip(paths, (CERTIFICATE, KEY), strict=True):
        path.write_text(text)
    return paths


def test_who_speaks_tls_is_answered_and_who_does_not_is_not(files):
    certificate, key = files
    flags = ServeFlags(port=0, ssl_certfile=certificate, ssl_keyfile=key)
    trust = ssl.create_default_context(cafile=certificate)

    async def scenario():
        async with listening(flags) as port, httpx.AsyncClient(verify=trust) as client:
            body = {"prompt": "Hello", "stream": True}
            url = f"https://127.0.0.1:{port}/v1/completions"
            streamed = await client.post(url, json=body)
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://127.0.0.1:{port}/health")
            async with httpx.AsyncClient() as stranger:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await stranger.get(f"https://127.0.0.1:{port}/health")
            return streamed.text

    assert asyncio.run(scenario()).endswith("data: [DONE]\n\n")


def _refusal(certificate, key):
    with pytest.raises(ConfigError) as caught:
        serve_room._check_certificate(ServeFlags(ssl_certfile=certificate, ssl_keyfile=key))
    return str(caught.value)


def test_a_certificate_that_can_not_be_served_is_refused_before_the_model_is_loaded(files):
    certificate, key = files
    assert "No such file" in _refusal(certificate.with_name("nothing"), key)
    assert "--ssl-keyfile" in _refusal(certificate, certificate)
    key.write_text("no key")
    assert str(key) in _refusal(certificate, key)


def test_without_a_certificate_there_is_nothing_to_check():
    serve_room._check_certificate(ServeFlags())
