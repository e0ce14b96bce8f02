from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import openai
import pytest

from prefscan.endpoints.chat_client import retry_after


def status_error(header: str | None) -> openai.APIStatusError:
    headers = {} if header is None else {"Retry-After": header}
    response = httpx.Response(429, headers=headers, request=httpx.Request("POST", "http://127.0.0.1:9/"))
    return openai.RateLimitError("slow down", response=response, body=None)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3), ("0.5", 0.5), ("0", 0), ("-4", 0), ("100000", 100000), ("inf", float("inf"))]
    + [(header, 0) for header in (None, "", "nan", "soon", "Thu, 01 Jan 1970 00:00:00 GMT")],
)
def test_the_wait_that_a_server_asks_for(header: str | None, seconds: float) -> None:
    assert retry_after(status_error(header)) == seconds


@pytest.mark.parametrize(("milliseconds", "seconds"), [("1500", 1.5), ("", 3), ("soon", 0), ("-1", 0), ("1e9", 1e6)])
def test_milliseconds_go_before_seconds(milliseconds: str, seconds: float) -> None:
    found = status_error("3")
    found.response.headers["retry-after-ms"] = milliseconds
    assert retry_after(found) == seconds


def test_the_wait_until_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 80 < retry_after(status_error(date)) <= 90


@pytest.mark.parametrize(
    "error", [None, OSError(), openai.APIConnectionError(request=httpx.Request("POST", "http://x"))]
)
def test_an_error_without_a_reply_asks_for_no_wait(error: BaseException | None) -> None:
    assert retry_after(error) == 0
