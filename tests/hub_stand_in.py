"""A server on this machine that answers as the hub does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn:
    """`with StandIn(config) as hub`: a hub at `hub.url`.

    It keeps the `files` committed to it, the repositories `created`, the `tokens` given and the paths `asked` for.
    me/gated is gated, me/pickled has weights in a pickle alone, other repositories do not exist.
    """

    def __init__(self, config):
        self.files, self.created, self.tokens, self.asked = {}, [], set(), []
        self.pickled = {"config.json": config, "diffusion_pytorch_model.bin": b"cos\nsystem\n"}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, status, content=b"", **headers):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def do_GET(self):
                hub.asked.append(self.path)
                if self.path.startswith(("/api/models/me/gated", "/api/models/me/pickled")):
                    return self.answer(200, {"id": self.path[12:], "sha": "0" * 40, "siblings": []})
                if self.path.startswith("/me/gated/resolve"):
                    return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="ask first")
                if self.path.startswith("/me/pickled/resolve"):
                    content = hub.pickled.get(self.path.rpartition("/")[2])
                    if content is None:
                        return self.answer(404, X_Error_Code="EntryNotFound")
                    return self.answer(200, content, ETag='"1"', X_Repo_Commit="0" * 40)
                return self.answer(401, X_Error_Code="RepoNotFound")

            do_HEAD = do_GET

            def do_POST(self):
                hub.tokens.add(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/api/validate-yaml":
                    return self.answer(200, {"errors": [], "warnings": []})
                if self.path == "/api/repos/create":
                    hub.created.append(json.loads(body))
                    if hub.created[-1].get("organization") == "them":
                        return self.answer(403, {"error": "not yours"})
                    return self.answer(200, {"url": f"{hub.url}/me/vae", "name": "me/vae", "id": "me/vae"})
                if "/preupload/" in self.path:
                    files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                             for f in json.loads(body)["files"]]  # fmt: skip
                    return self.answer(200, {"files": files})
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = {"commitUrl": f"{hub.url}/me/vae/commit/1", "commitOid": "1", "success": True}
                return self.answer(200, commit)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
