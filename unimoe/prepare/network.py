"""Open a URL with the system's proxies and certificates, using only the standard library."""

import base64
import os
import ssl
import urllib.error
import urllib.parse
import urllib.request
from functools import cache
from http.client import HTTPResponse

from unimoe.errors import UserError

TIMEOUT = 30.0  # seconds without a byte


def ask(url: str, headers: dict[str, str] | None = None, certificates: str | None = None) -> HTTPResponse:
    """Open ``url`` (http, https or file); a user name and password in it are sent as a header.

    ``certificates``: a file of trusted certificates (pip's ``cert`` setting); default: REQUESTS_CA_BUNDLE,
    else those of the system (SSL_CERT_FILE).

    Raises:
        OSError: any error of urllib or the socket.
    """
    scheme, netloc, *rest = urllib.parse.urlsplit(url)
    login, _, host = netloc.rpartition("@")
    headers = {"User-Agent": "unimoe"} | (headers or {})
    if login:
        plain = urllib.parse.unquote(login).encode()
        headers["Authorization"] = "Basic " + base64.b64encode(plain).decode()
    request = urllib.request.Request(urllib.parse.urlunsplit((scheme, host, *rest)), headers=headers)
    bundle = certificates or os.environ.get("REQUESTS_CA_BUNDLE")
    handler = urllib.request.HTTPSHandler(context=_context(bundle))
    return urllib.request.build_opener(handler).open(request, timeout=TIMEOUT)


@cache
def _context(bundle: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=bundle)
    except OSError as error:
        raise UserError(f"trusted certificates {bundle}: cannot be read ({reason(error)})") from error


def shown(url: str) -> str:
    """``url`` without user name and password, for messages."""
    scheme, netloc, *rest = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((scheme, netloc.rpartition("@")[2], *rest))


def reason(error: OSError) -> str:
    """A short description of a network error."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(inner) or type(inner).__name__
