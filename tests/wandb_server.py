"""A W&B server that keeps the views that are saved in it, for tests of what is sent."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serving():
    """Yield (address, name -> view) of a server on this machine."""
    views = {}

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            text = self.rfile.read(int(self.headers["Content-Length"]))
            found = {}
            if self.path == "/graphql":  # others are telemetry
                asked = json.loads(text)
                found = {"data": answer(asked["query"], asked.get("variables") or {}, views)}
            body = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", views
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(query, given, views):
    """Answer the GraphQL queries by which ``wandb_workspaces`` saves and reads views, and no other."""
    project = {
        "id": "1",
        "internalId": "1",
        "name": given.get("projectName"),
        "entityName": given.get("entityName"),
    }
    if "upsertView" in query:
        view = {key: given.get(key) for key in ("name", "displayName", "description", "type", "spec")}
        times = dict.fromkeys(("createdAt", "updatedAt"), "2026-01-01T00:00:00")
        number = base64.b64encode(f"View:{len(views):06}".encode()).decode()
        view |= {"id": number, "project": project, **times}
        views[view["id"]] = view
        return {"upsertView": {"view": view, "inserted": True}}
    if "allViews" in query:
        edges = [{"node": view} for view in views.values() if view["name"] == given["viewName"]]
        return {"project": {"allViews": {"edges": edges}}}
    if "reportId" in given:
        return {"view": views[given["reportId"]]}
    viewer = {"id": "x", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
    page = {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}
    return {
        "viewer": viewer,
        "models": page,
        "project": project,
        "upsertModel": {"project": project, "model": project},
    }
