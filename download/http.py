"""One request over a bad network: it ends, within bounds, in a body or in an exception that says why and what helps.

Fault and Unavailable are worth another try, Refused is not (throttle.py waits and tries). A proxy is taken from
HTTP_PROXY, HTTPS_PROXY and NO_PROXY, a certificate bundle from REQUESTS_CA_BUNDLE, as everywhere in requests.
"""
import contextlib
import email.utils
import http.client
import io
import logging
import ssl
import time
from datetime import UTC, datetime
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from download.throttle import Fault, Refused, Unavailable

TIMEOUTS = (10, 30)  # seconds to connect, and between two pieces of an answer
SLOW_AFTER, MIN_RATE = 20, 1000  # an answer slower than MIN_RATE (bytes/s) is given up SLOW_AFTER seconds from its start
MAX_HEAD_SECONDS = 60  # from the first byte to the last header, whatever the rate
MAX_REDIRECTS = 5
BUSY = (429, 502, 503, 504)  # statuses that speak of the server, not of the file
TRANSIENT = (408, 425, 500)  # statuses of one request that another try may change
CHUNK = 1 << 16  # bytes
MAX_REASON = 200  # letters of a message, part of which a server may have written


class SteadyReader(io.RawIOBase):
    """The bytes of one answer, head and body: TimeoutError when they drip, which a time-out between pieces never sees."""

    def __init__(self, raw):
        self.raw, self.start, self.num_bytes, self.in_head = raw, time.monotonic(), 0, True

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            size = self.raw.readinto(buffer)
        except TimeoutError:
            raise TimeoutError(f"no data for {TIMEOUTS[1]} s") from None
        self.num_bytes += size or 0
        seconds = time.monotonic() - self.start
        if seconds > SLOW_AFTER and self.num_bytes < MIN_RATE * seconds:
            raise TimeoutError(f"slow: {self.num_bytes} bytes in {seconds:.0f} s")
        if self.in_head and seconds > MAX_HEAD_SECONDS:
            raise TimeoutError(f"no end of the headers in {seconds:.0f} s")
        return size

    def close(self):
        self.raw.close()
        super().close()


class SteadyResponse(http.client.HTTPResponse):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steady = SteadyReader(self.fp.detach())
        self.fp = io.BufferedReader(self.steady, CHUNK)

    def begin(self):
        super().begin()
        self.steady.in_head = False


class SteadyHTTPConnection(HTTPConnection):
    response_class = SteadyResponse


class SteadyHTTPSConnection(HTTPSConnection):
    response_class = SteadyResponse


class SteadyHTTPPool(HTTPConnectionPool):
    ConnectionCls = SteadyHTTPConnection


class SteadyHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = SteadyHTTPSConnection


class SteadyAdapter(HTTPAdapter):
    """requests' adapter whose answers, direct or through a proxy, may not drip."""
    pools = {"http": SteadyHTTPPool, "https": SteadyHTTPSPool}

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self.pools

    def proxy_manager_for(self, proxy, **kwargs):
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):  # those bring their own sockets
            manager.pool_classes_by_scheme = self.pools
        return manager


class Session(requests.Session):
    def get_redirect_target(self, response):
        return None  # ask() follows: requests would read the body of a redirect, however large


def open_session(connections):
    """One pool of kept-alive connections for as many threads."""
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it prints tracebacks of servers' malformed headers
    session = Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, SteadyAdapter(pool_maxsize=connections))
    session.headers["Accept-Encoding"] = "identity"  # a packed body has no size that could be checked
    return session


def check_address(flag, url):
    """Raise ValueError unless `url` begins with http:// or https:// and names a host."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"{flag} '{url}' is no address: it begins with http:// or https:// and a host's name")


@contextlib.contextmanager
def ask(session, url, accept=(200,), headers=None):
    """Yield the answer to a GET of `url`, its status in `accept` and its body unread, after MAX_REDIRECTS at most."""
    for _ in range(MAX_REDIRECTS + 1):
        with network_errors(Unavailable):
            response = session.get(url, headers=headers, stream=True, timeout=TIMEOUTS, allow_redirects=False)
        with response:
            if response.status_code in accept:
                response.raw.enforce_content_length = False  # read_pieces says in words what is short
                yield response
                return
            with contextlib.suppress(OSError, urllib3.exceptions.HTTPError):
                response.raw.read(CHUNK)  # a short body read to its end leaves the connection usable
            if not (response.is_redirect or response.is_permanent_redirect):
                raise status_error(response)
        url = urljoin(url, response.headers["Location"])
    raise Refused(f"more than {MAX_REDIRECTS} redirects")


def status_error(response):
    """The exception for an answer that is not the wanted one."""
    reason, status = f"status {response.status_code}", response.status_code
    if status in BUSY:
        return Unavailable(reason, spoke=True, retry_after=wanted_pause(response.headers))
    return Fault(reason) if status in TRANSIENT else Refused(reason)


def wanted_pause(headers):
    """Seconds from now that Retry-After asks for, given in seconds or as a date; 0 where it says nothing readable."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdecimal():
        return int(text[:9])
    try:
        until = email.utils.parsedate_to_datetime(text)
        try:  # by the server's own clock, which may be wrong in both
            now = email.utils.parsedate_to_datetime(headers.get("Date", ""))
        except ValueError:
            now = datetime.now(UTC)
        return max(0.0, (until - now).total_seconds())
    except (ValueError, TypeError, OverflowError):  # no date; or one with a time zone, the other without
        return 0


@contextlib.contextmanager
def network_errors(kind):
    """What requests, urllib3 and ssl raise becomes `kind`, or Refused where the same request fails again for sure."""
    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, TimeoutError) as error:
        root = root_cause(error)
        reason = getattr(root, "strerror", None) or str(root) or type(root).__name__
        reason = "".join(letter if letter.isprintable() else "?" for letter in reason[:MAX_REASON])
        if isinstance(root, ssl.SSLCertVerificationError):
            raise Refused(f"its certificate is not trusted ({root.verify_message})") from error
        if isinstance(error, requests.exceptions.InvalidProxyURL | requests.exceptions.InvalidURL
                      | requests.exceptions.InvalidSchema | requests.exceptions.MissingSchema):
            raise Refused(reason) from error
        if isinstance(error, requests.ConnectTimeout):
            reason = f"no connection within {TIMEOUTS[0]} s"
        raise kind(f"no answer: {reason}" if kind is Unavailable else reason) from error


def root_cause(error):
    """The exception that `error` goes back to: urllib3 and requests wrap it several times, or put it into the arguments."""
    wrapped = next((value for value in error.args if isinstance(value, Exception)), None)
    deeper = error.__cause__ or (None if error.__suppress_context__ else error.__context__) or wrapped
    return root_cause(deeper) if deeper else error


def announced_size(response):
    """Bytes of the body by its Content-Length; None where that is absent or no number."""
    text = response.headers.get("Content-Length", "").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def read_pieces(response, most):
    """Yield the body in pieces of CHUNK bytes at most.

    Raises Refused once it is, or says that it is, larger than `most` bytes, and Fault where it breaks off, drips, or
    is shorter than announced.
    """
    announced, received = announced_size(response), 0
    if announced is not None and announced > most:
        raise Refused(f"a body of {announced:,} bytes, more than {most:,}")
    while True:
        with network_errors(Fault):
            piece = response.raw.read(CHUNK, decode_content=False)
        if not piece:
            break
        received += len(piece)
        if received > most:
            raise Refused(f"a body of more than {most:,} bytes")
        yield piece
    if announced is not None and received < announced:
        raise Fault(f"{received:,} of {announced:,} bytes came")


def read_body(response, most, max_seconds):
    """The whole body, of `most` bytes at most; Fault when it takes longer than `max_seconds`. See read_pieces."""
    pieces, start = [], time.monotonic()
    for piece in read_pieces(response, most):
        pieces.append(piece)
        if time.monotonic() - start > max_seconds:
            raise Fault(f"not whole after {max_seconds} s")
    return b"".join(pieces)
