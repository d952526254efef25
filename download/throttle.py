"""How a download waits: which failures are worth another try, when it comes, and how many requests run meanwhile."""
import contextlib
import threading
import time

from tqdm import tqdm

WAITS = (0.5, 1, 2, 4, 8)  # seconds before each further try
MAX_PAUSE = 60  # seconds: the longest pause that a server's Retry-After gets
PATIENCE = (15, 180)  # seconds of nothing but Unavailable: from a server that never spoke, and from one that did
TOLD_PAUSE = 5  # seconds: pauses from here on are told to the user


class Refused(ValueError):
    """The same request would meet the same answer, so trying again is pointless."""


class Fault(ValueError):
    """This answer is no good, the next one may be."""


class Unavailable(Fault):
    """The server cannot be reached (not `spoke`) or asks for quiet: no fault of the file that was asked for."""

    def __init__(self, reason, spoke=False, retry_after=0):
        super().__init__(reason)
        self.spoke, self.retry_after = spoke, retry_after  # seconds


class Stopped(Exception):
    """The run has ended elsewhere: no request may begin, and nothing is to be said about it."""


class Throttle:
    """What all threads together owe one server: a pause for each of them when it has no time, and fewer at once after."""

    def __init__(self, most):
        self.most = self.limit = most  # requests at a time; the limit is halved at each pause and grows with each answer
        self.num_active = self.num_answers = self.num_pauses = 0
        self.spoke = self.stopped = False
        self.trouble_since = None  # monotonic seconds; None while the server answers
        self.quiet_until = 0.0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self):
        """Wait until a request may begin, and learn from how it ends. Raises Stopped after stop()."""
        with self.changed:
            while not self.stopped:
                pause = self.quiet_until - time.monotonic()
                if pause <= 0 and self.num_active < int(self.limit):
                    break
                self.changed.wait(pause if pause > 0 else None)  # a request that ends wakes all
            self.check_stopped()
            self.num_active += 1
        trouble = None
        try:
            yield
        except Unavailable as error:
            trouble = error
            raise
        finally:
            with self.changed:
                self.num_active -= 1
                if trouble is None:
                    self.count_answer()
                else:
                    self.slow_down(trouble)
                self.changed.notify_all()

    def count_answer(self):
        self.num_answers += 1
        self.spoke, self.trouble_since, self.num_pauses = True, None, 0
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def slow_down(self, trouble):
        """A pause for all threads: as long as the server asks, within MAX_PAUSE, at least the next of WAITS."""
        now = time.monotonic()
        self.spoke = self.spoke or trouble.spoke
        self.trouble_since = self.trouble_since or now
        if self.is_over():
            self.limit, self.quiet_until = self.most, now  # every file that is left gets its one try without delay
            return
        pause = min(trouble.retry_after, MAX_PAUSE)
        if now >= self.quiet_until:  # one step for each pause, however many threads ran into it
            self.limit = max(1, self.limit / 2)
            pause = max(pause, WAITS[min(self.num_pauses, len(WAITS) - 1)])
            self.num_pauses += 1
        if now + pause > self.quiet_until:
            self.quiet_until = now + pause
            if pause >= TOLD_PAUSE:
                tqdm.write(f"{trouble}: waiting {pause:.0f} s")

    def is_over(self):
        """Whether patience with this server is over: it has served nobody for too long."""
        return self.trouble_since is not None and time.monotonic() - self.trouble_since > PATIENCE[self.spoke]

    def rest(self, seconds):
        """Sleep. Raises Stopped, at once, after stop()."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped, seconds)
            self.check_stopped()

    def stop(self):
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def check_stopped(self):
        if self.stopped:
            raise Stopped


def persist(throttle, attempt, progress=lambda: 0, step=1):
    """attempt() until it succeeds, whose requests take turns at `throttle`; returns what it returns.

    A Fault is tried again after each of WAITS, from the first of them whenever `progress()` grew by `step` since. What
    befalls a server that serves nobody else either does not count as a try; its patience ends it. Raises Refused.
    """
    num_faults, reached = 0, progress()
    while True:
        num_answers = throttle.num_answers
        try:
            return attempt()
        except Unavailable as error:
            if throttle.is_over():
                raise Refused(f"{error} (for {PATIENCE[throttle.spoke]} s)") from error
            if throttle.num_answers == num_answers:
                continue
            last = error
        except Fault as error:
            last = error
        if progress() >= reached + step:
            num_faults, reached = 0, progress()
        if num_faults == len(WAITS):
            raise Refused(f"{last} ({num_faults + 1} tries)") from last
        throttle.rest(WAITS[num_faults])
        num_faults += 1
