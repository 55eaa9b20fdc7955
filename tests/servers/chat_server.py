"""An OpenAI-compatible endpoint on loopback, for the tests."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Answers `/v1/chat/completions` by a function from the user's message to a reply, or to a status of HTTP."""

    def __init__(self, reply):
        self.requests, self.keys = [], set()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat.requests.append(body)
                chat.keys.add(self.headers["Authorization"])
                content = reply(body["messages"][-1]["content"]) if self.path == "/v1/chat/completions" else 404
                status = content if isinstance(content, int) else 200
                message = {"role": "assistant", "content": str(content)}
                answer = {
                    "id": "1",
                    "created": 0,
                    "model": body["model"],
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
                }
                if status != 200:
                    answer = {"error": {"message": f"Nothing for {sorted(body)}"}}
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
