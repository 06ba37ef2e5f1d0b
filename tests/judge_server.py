"""A stand-in for a judging endpoint: it finds the merit that a test wrote into an answer, and misbehaves as told."""

import difflib
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = re.compile(r"^BEGIN (\w+) ANSWER ([A-Z])\n(.*?)\nEND \1 ANSWER \2$", re.DOTALL | re.MULTILINE)
REFERENCE = re.compile(r"^BEGIN (\w+) REFERENCE\n(.*?)\nEND \1 REFERENCE$", re.DOTALL | re.MULTILINE)
MERIT = re.compile(r"merit (-?[\d.]+)")
KEY = "sk-stand-in-7f3a9c"


class JudgeServer:
    """Serves /v1/chat/completions; attributes may be set between and during requests."""

    def __init__(self) -> None:
        self.first_bonus = 0.0
        """Points for the answer shown first."""
        self.noise = 0.0
        """Standard deviation of the scores, in points; keyed by the request."""
        self.delay_seconds = 0.0
        self.reply: Callable[[int, str], str] = lambda number, text: text
        """Changes the text of reply `number` (from 1 on)."""
        self.status: Callable[[int], tuple[int, dict[str, str]] | None] = lambda number: None
        """Returns another HTTP status and headers for a request, or `(0, {})` to drop the connection."""
        self.objects_to = ""
        """A key of a request that is answered with 422, as by an endpoint that does not know it."""
        self.usage: dict[str, Any] | None = {"prompt_tokens": 900, "completion_tokens": 100, "total_tokens": 1000}
        self.body: bytes | None = None
        """What to send instead of a chat completion."""
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.keys.add(self.headers["Authorization"])
                with judge._lock:
                    judge.requests.append(request)
                    number = len(judge.requests)
                time.sleep(judge.delay_seconds)
                status, headers = judge.status(number) or (200, {})
                if judge.objects_to in request:
                    status = 422
                if status == 0:
                    self.close_connection = True
                    return
                answer = judge.answer_to(request, number) if status == 200 else judge.error_of(status)
                body = json.dumps(answer).encode() if judge.body is None else judge.body
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *values: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def error_of(self, status: int) -> dict[str, Any]:
        """Return an error body that repeats the key, as a careless endpoint might."""
        extra = f", extra_forbidden: {self.objects_to}" if self.objects_to else ""
        return {"error": {"message": f"status {status} for key {KEY}{extra}", "type": "error"}}

    def answer_to(self, request: dict[str, Any], number: int) -> dict[str, Any]:
        """Score the answers of a request by the merit that stands in them."""
        content = request["messages"][-1]["content"]
        seed = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        draw = random.Random(seed)
        scores = {}
        for place, (_, label, text) in enumerate(ANSWER.findall(content)):
            score = self.merit_of(text, content)
            score += draw.gauss(0, self.noise) + (self.first_bonus if place == 0 else 0.0)
            scores[label] = round(min(100.0, max(0.0, score)), 3)
        text = self.reply(number, json.dumps({"comparison": "As told.", "scores": scores}))
        message = {"role": "assistant", "content": text}
        return {
            "id": f"chatcmpl-{number}", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            **({} if self.usage is None else {"usage": self.usage}),
        }  # fmt: skip

    def merit_of(self, answer: str, content: str) -> float:
        """Return the merit that stands in an answer, or how like the reference it looks."""
        if found := MERIT.search(answer):
            return float(found[1])
        reference = REFERENCE.search(content)
        return 100 * difflib.SequenceMatcher(None, answer, reference[2]).ratio() if reference else 0.0

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()
