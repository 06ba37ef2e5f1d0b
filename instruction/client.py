"""One request to an OpenAI-compatible endpoint, which ends in a reply, a reason to try again, or a refusal.

The `openai` client speaks the protocol; its own retries are off, because tries, time and spend are counted by the
caller. The key is handed in, is in no record, and is taken out of whatever the endpoint says.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

from harness.run.errors import ConfigError

DEFAULT_URL = "https://api.openai.com/v1"
RETRIED = {408, 409, 425, 429}
HOPELESS = {401, 402, 403, 404}
LIMIT, OLD_LIMIT = "max_completion_tokens", "max_tokens"
LONGEST_REASON = 200
SHORTEST_SECRET = 8


class UnavailableError(Exception):
    """No reply this time; `wait_seconds` is what the endpoint asks for, `may_cost` whether it may be charged."""

    def __init__(self, reason: str, wait_seconds: float | None = None, may_cost: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.may_cost = may_cost


class RefusedError(Exception):
    """The endpoint will not answer this request, and asking again is no use."""


@dataclass(frozen=True)
class Reply:
    """What a judge wrote, and the tokens of request and reply together; None where the endpoint does not say."""

    text: str
    tokens: int | None


class Endpoint:
    """An OpenAI-compatible endpoint; may be used from several threads."""

    def __init__(self, base_url: str | None, api_key: str | None, timeout_seconds: float) -> None:
        """Check what the environment gave; raises ConfigError, never showing the key."""
        url, key = base_url or DEFAULT_URL, (api_key or "").strip()
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port or a bracket that cannot be
            is_address = False
        if not is_address or not url.isascii() or not url.isprintable():
            raise ConfigError("OPENAI_BASE_URL: found no http or https address, wanted the endpoint's, as in .../v1")
        if not key:
            raise ConfigError("OPENAI_API_KEY: not set; an endpoint that needs no key takes any word")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError("OPENAI_API_KEY: found white space or signs that no key has (not shown)")
        try:
            import openai
        except ImportError:
            raise ConfigError("--judge: needs a package that is not installed (pip install openai)") from None
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        # A shorter key is the "none" or "EMPTY" of a local server: replacing it would spoil replies with that word.
        self._secrets = [text for text in (key, parts.password or "", parts.query) if len(text) >= SHORTEST_SECRET]
        self._openai = openai
        self._knows_old_limit = False
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout_seconds)

    def ask(self, request: Mapping[str, Any]) -> Reply:
        """Send one chat completion; raises UnavailableError, RefusedError, or ConfigError where none can succeed."""
        try:
            completion = self._complete(request)
        except self._openai.APIStatusError as error:
            self._explain(error)
        except self._openai.APIConnectionError as error:
            # A connection cut off in mid-reply may have been paid for.
            raise UnavailableError(self._plain(f"{type(error).__name__}: {error}"), may_cost=True) from None
        except (self._openai.OpenAIError, ValueError, RecursionError) as error:
            raise UnavailableError(self._plain(f"a reply that is not JSON ({error})"), may_cost=True) from None
        choices = getattr(completion, "choices", None)
        if not isinstance(choices, list):
            raise UnavailableError("a reply that is not a chat completion", may_cost=True)
        message = getattr(choices[0], "message", None) if choices else None
        content = getattr(message, "content", None)
        usage = getattr(completion, "usage", None)
        counts = [_count(getattr(usage, name, None)) for name in ("prompt_tokens", "completion_tokens")]
        known = [count for count in counts if count is not None]
        text = self._without_secrets(content) if isinstance(content, str) else ""
        return Reply(text, sum(known) if len(known) == len(counts) else None)

    def _complete(self, request: Mapping[str, Any]) -> Any:
        """Send a request, with the older name of a reply's limit once the endpoint has objected to the newer one."""
        sent = dict(request)
        if self._knows_old_limit:
            sent[OLD_LIMIT] = sent.pop(LIMIT)
        try:
            return self._client.chat.completions.create(**sent)
        except self._openai.APIStatusError as error:
            if LIMIT not in sent or error.status_code not in (400, 422) or LIMIT not in str(error):
                raise
        self._knows_old_limit = True
        return self._complete(request)

    def _explain(self, error: Any) -> NoReturn:
        status = int(error.status_code)
        reason = self._plain(f"HTTP {status}: {error.message}")
        if status in HOPELESS:
            raise ConfigError(f"{self.name}: {reason}") from None
        if status in RETRIED or status >= 500:
            raise UnavailableError(reason, retry_after(error.response.headers.get("retry-after"))) from None
        raise RefusedError(reason) from None

    def _plain(self, text: str) -> str:
        """Return an endpoint's message on one short line, without the key."""
        line = "".join(c if c.isprintable() else " " for c in self._without_secrets(text))
        return line[:LONGEST_REASON]

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def retry_after(header: str | None) -> float | None:
    """Read a Retry-After header, seconds or a date (RFC 9110, section 10.2.3); None where it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            when = parsedate_to_datetime(header)
        except (ValueError, TypeError):
            return None
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
