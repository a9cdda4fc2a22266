"""
Talking to the Hub: every request is tried again where that helps, and what is left ends in one sentence that says what
to do. A token appears in none of them.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, parse_ratelimit_headers

Value = TypeVar("Value")
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
LONGEST_WAIT = 300.0  # a limit that is lifted later than this ends the program
TEMPORARY = (408, 429, 500, 502, 503, 504)


class Hub:
    """
    The client, a token, and the manners above.

    Args:
        notify: gets a sentence when something is tried again.

    Raises:
        ValueError: if there is no token, or the network is turned off.
    """

    def __init__(self, repository: str, token: str | None, notify: Callable[[str], None]) -> None:
        if constants.is_offline_mode():
            raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.")
        self.repository, self.notify = repository, notify
        self.token = token or get_token()
        if not self.token:
            raise ValueError(
                "There is no token for the Hub: make one that may write at https://huggingface.co/settings/tokens, and "
                "log in by `hf auth login` or set HF_TOKEN."
            )
        check_token(self.token)
        if not constants.ENDPOINT.startswith(("http://", "https://")):
            raise ValueError(f"HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address of a Hub: unset it.")
        self.api = HfApi(token=self.token)
        if not sys.stderr.isatty():
            disable_progress_bars()
        self.user = ""

    def try_to(self, what: str, call: Callable[[], Value], waits: tuple[float, ...] = WAITS) -> Value:
        """
        Calls, and again after a pause where the fault is the Hub's or the network's.

        Args:
            what: completes the sentence "could not ...".

        Raises:
            ValueError: for what only the user can set right.
            ConnectionError: for what may be right later.
        """
        for wait in (*waits, None):
            try:
                with self.retries_of_the_client():
                    return call()
            except Exception as error:
                cause = cause_of(error)
                if cause is None and isinstance(error, RuntimeError):  # what hf_xet raises, whatever happened
                    raise ConnectionError(
                        f"Could not {what}: {self.redacted(str(error))}. Give the same command again; what is uploaded "
                        f"is not sent twice."
                    ) from error
                if cause is None:
                    raise
                asked = seconds_asked(cause)
                if not is_temporary(cause) or wait is None or asked > LONGEST_WAIT:
                    raise self.explained(what, cause) from error
                pause = max(wait, asked)
                self.notify(f"The Hub {trouble_of(cause)}; next try in {pause:.0f} s.")
                time.sleep(pause)
        raise AssertionError  # the last try returns or raises

    @contextlib.contextmanager
    def retries_of_the_client(self) -> Iterator[None]:
        """The client tries uploads again by itself, and logs addresses that are signed: only its waiting is shown."""
        logger = logging.getLogger("huggingface_hub")
        handler, others, propagates = Waiting(self.notify), list(logger.handlers), logger.propagate
        logger.handlers, logger.propagate = [handler], False
        try:
            yield
        finally:
            logger.handlers, logger.propagate = others, propagates

    def explained(self, what: str, error: Exception) -> Exception:
        """What went wrong and what to do."""
        name, user = self.repository, self.user or "your name"
        if isinstance(error, OfflineModeIsEnabled):
            return ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.")
        if not isinstance(error, HfHubHTTPError):
            reason = "it answered what is no JSON" if isinstance(error, json.JSONDecodeError) else reason_of(error)
            return ConnectionError(
                f"Could not {what}: {constants.ENDPOINT} cannot be reached ({self.redacted(reason)}). Look at the "
                f"network, and give the same command again; what is uploaded is not sent twice."
            )
        status, answer = error.response.status_code, self.redacted(message_of(error))
        if status == 401:
            return ValueError(
                f"Could not {what}: the Hub does not accept the token (401). Make one that may write at "
                f"https://huggingface.co/settings/tokens, and log in by `hf auth login` or set HF_TOKEN."
            )
        if status in (402, 403):
            return ValueError(
                f"Could not {what}: the token may not write to {name!r} ({status}: {answer}). Use a token with the "
                f"role 'write' for it, push to {user}/{name.split('/')[-1]}, or propose the files with --create_pr."
            )
        if status == 404:
            return ValueError(f"Could not {what}: the Hub does not find it (404: {answer}). Look at the name.")
        if status in (409, 412):
            return ValueError(
                f"Could not {what}: {name!r} was changed by someone else meanwhile ({status}: {answer}). Look at what "
                f"is there, and give the same command again."
            )
        if status == 429:
            asked = seconds_asked(error)
            later = f"in {asked:.0f} s" if asked else "in some minutes"
            return ConnectionError(
                f"Could not {what}: the Hub had too many requests from you (429). Give the same command again {later}; "
                f"what is uploaded is not sent twice."
            )
        if status >= 500 or status == 408:
            return ConnectionError(
                f"Could not {what}: the Hub has trouble of its own ({status}: {answer}). Give the same command again "
                f"later; what is uploaded is not sent twice. https://status.huggingface.co says how it is."
            )
        return ValueError(f"Could not {what}: the Hub refuses it ({status}: {answer}).")

    def redacted(self, text: str) -> str:
        """The text in one line, without the token and without the signed part of addresses."""
        words = (word.split("?")[0] if "://" in word else word for word in text.replace(self.token, "***").split())
        return " ".join(words).rstrip(".")


def check_token(token: str) -> None:
    """Raises ValueError, without repeating it, for what can be no token."""
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("The token has characters that no token has: copy it again.")


class Waiting(logging.Handler):
    """Hands on, of what the client logs, how long it waits before it tries again."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.tell = notify

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "[Retry " in message:
            self.tell(f"The Hub did not take a part of it: {message[0].lower()}{message[1:]}")


def cause_of(error: BaseException | None) -> Exception | None:
    """The answer or the broken connection that an error came from; the client wraps those of an upload."""
    while error is not None:
        if isinstance(error, HfHubHTTPError | httpx2.TransportError | json.JSONDecodeError | OfflineModeIsEnabled):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def is_temporary(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TEMPORARY
    return not isinstance(error, OfflineModeIsEnabled)


def trouble_of(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return "is asked too often (429)" if status == 429 else f"has trouble of its own ({status})"
    return f"cannot be reached ({reason_of(error)})"


def reason_of(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def message_of(error: HfHubHTTPError) -> str:
    return error.server_message or error.response.reason_phrase or "no reason given"


def seconds_asked(error: Exception) -> float:
    """How long the Hub asks to wait, or 0."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers: Any = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if error.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = headers.get("Retry-After", "")
    return float(after) if after.isdigit() else 0.0
