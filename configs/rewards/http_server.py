"""A reward server for configs/rewards/http.yaml: answers of about twelve words. `python http_server.py [PORT]`.

POST {"prompts": [...], "completions": [...], "completion_ids": [...], further columns} -> {"rewards": [...]}, one
number or null (a failed sample) for each completion.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = 12


def reward(completion: str) -> float | None:
    """1 for twelve words, less by a twelfth for each word more or fewer, at least 0; null for no words."""
    words = len(completion.split())
    return max(0.0, 1 - abs(words - WORDS) / WORDS) if words else None


class Rewards(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"rewards": [reward(text) for text in asked["completions"]]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8900
    ThreadingHTTPServer(("127.0.0.1", port), Rewards).serve_forever()
