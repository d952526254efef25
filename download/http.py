"""HTTP: a session that retries requests, and download_body(), which returns one complete body or raises the reason.

requests reads the proxies from HTTP_PROXY, HTTPS_PROXY and NO_PROXY, and a certificate bundle from REQUESTS_CA_BUNDLE.
"""
import http.client
import logging
import time
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from common.settings import printable

TIMEOUTS = (5, 15)  # seconds to connect, and to wait for the next bytes
NUM_RETRIES = 6  # of a request that got no usable answer; with 5 a busy server still loses images
BACKOFF = 0.5  # seconds: the retries wait for 0, 1, 2, 4, 8 and 16 s
MAX_RETRY_AFTER = 60  # seconds: the longest wait that a Retry-After header can ask for
RETRIED = (408, 425, 429, 500, 502, 503, 504)  # statuses worth a retry
MAX_REDIRECTS = 5
BODY_TRIES = 3  # for a body that breaks off or fails its check
CHUNK = 1 << 16  # bytes
MAX_REASON = 200  # characters
NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException)


class Unavailable(ValueError):
    """The retries are used up and the server has sent no answer, or only statuses in RETRIED."""


class CappedRetry(Retry):
    """urllib3's Retry obeys a Retry-After header for hours, and fails if it cannot be parsed."""

    def get_retry_after(self, response):
        try:
            return min(super().get_retry_after(response) or 0, MAX_RETRY_AFTER)
        except urllib3.exceptions.InvalidHeader:
            return 0


def open_session(num_connections):
    """A requests.Session that keeps `num_connections` connections and retries requests, but not bodies."""
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it logs every retry
    retry = CappedRetry(total=NUM_RETRIES, status_forcelist=RETRIED, raise_on_status=False,
                        backoff_factor=BACKOFF, backoff_jitter=BACKOFF)
    session = requests.Session()
    session.max_redirects = MAX_REDIRECTS
    session.headers["Accept-Encoding"] = "identity"  # a compressed body could unpack to any size
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=num_connections, max_retries=retry))
    return session


def check_address(flag, url):
    """Raise ValueError unless `url` begins with http:// or https:// and names a host."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"{flag} '{url}' is not an address: write http:// or https:// and a host name")


def download_body(session, url, max_bytes, max_seconds, check, bar=None):
    """The body of `url` (bytes) for which `check(body)` raises no ValueError, in at most BODY_TRIES tries.

    `bar`: a tqdm that counts the bytes. Raises Unavailable if the server does not answer, and ValueError for another status
    than 200 and for a body that breaks off, fails the check, is longer than `max_bytes`, or takes more than `max_seconds`.
    """
    deadline = time.monotonic() + max_seconds
    for num_tries in range(1, BODY_TRIES + 1):
        with request(session, url) as response:
            try:
                body = read_body(response, max_bytes, deadline, bar)
                check(body)
                return body
            except NETWORK_ERRORS as error:
                reason = describe(error)
            except ValueError as error:
                reason = str(error)
        if time.monotonic() > deadline:
            raise ValueError(f"{reason} within {max_seconds} s")
        time.sleep(BACKOFF * num_tries)
    raise ValueError(f"{reason} ({BODY_TRIES} tries)")


def request(session, url):
    """The response to a GET, status 200, body unread. Raises Unavailable or ValueError."""
    try:
        response = session.get(url, stream=True, timeout=TIMEOUTS)
    except NETWORK_ERRORS as error:
        raise Unavailable(f"no answer: {describe(error)}") from error
    if response.status_code != 200:
        response.close()
        raise (Unavailable if response.status_code in RETRIED else ValueError)(f"status {response.status_code}")
    return response


def read_body(response, max_bytes, deadline, bar):
    """The body, at most `max_bytes` long, read before `deadline` (monotonic seconds)."""
    body = bytearray()
    if bar is not None:
        bar.reset(response.raw.length_remaining)  # Content-Length, or None
    while chunk := response.raw.read1(CHUNK, decode_content=False):  # read1 does not wait until CHUNK bytes are there
        body += chunk
        if bar is not None:
            bar.update(len(chunk))
        if len(body) > max_bytes:
            raise ValueError(f"more than {max_bytes:,} bytes came")
        if time.monotonic() > deadline:
            raise ValueError(f"only {len(body):,} bytes came")
    return bytes(body)


def describe(error):
    """The message of the exception at the bottom of `error`, printable: urllib3 and requests wrap it several times."""
    while inner := error.__cause__ or error.__context__ or next((x for x in error.args if isinstance(x, Exception)), None):
        error = inner
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in printable(reason)[:MAX_REASON])
