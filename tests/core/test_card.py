"""Model cards of exports, and uploading them to a stand-in of the Hugging Face hub on this machine."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from clkit.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama):
    root = tmp_path_factory.mktemp("card")
    files = []
    for word in ("red", "blue"):
        files.append(root / f"{word}.jsonl")
        rows = [{"prompt": f"{word} {i}", "answer": "ab"[i % 2], "options": ["a", "b"]} for i in range(8)]
        files[-1].write_text("".join(json.dumps(r) + "\n" for r in rows))
    content = {
        "output_dir": str(root / "run"),
        "model": {"name": str(tiny_llama), "dtype": "float32", "lora": {"r": 2, "target_modules": ["q_proj"]}},
        "tasks": {"source": "jsonl", "tasks": [str(f) for f in files], "eval_fraction": 0.5},
        "train": {"batch_size": 4},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["run", str(root / "config.yaml"), "--quiet"]) == 0
    return root / "run"


def test_an_export_carries_a_card_with_method_tasks_matrix_metrics_and_limits(finished):
    text = (finished / "export" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head == {"library_name": "peft", "tags": ["clkit", "continual-learning", "naive"]}
    saved = json.loads((finished / "matrix.json").read_text())
    assert "`red`, `blue`" in body and "Not finished" not in body
    assert f"| after blue | {saved['matrix'][1][0]:.4f} | {saved['matrix'][1][1]:.4f} |" in body
    metrics = json.loads((finished / "metrics.json").read_text())
    assert f"| forgetting | {metrics['forgetting']:.4f} | lower |" in body
    assert "## Limits" in body and "licence" in body and "PeftModel.from_pretrained(base, '.')" in body
    assert str(finished) not in text, "a card is read elsewhere"


def test_export_again_writes_the_same_card(finished, tmp_path, capsys):
    assert main(["export", str(finished), str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "README.md").read_text() == (finished / "export" / "README.md").read_text()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload needs."""

    files: dict[str, bytes] = {}
    made: list[dict] = []
    refuse = False

    def _answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "private": True, "tags": [], "downloads": 0})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if type(self).refuse:
            self._answer({"error": "no"}, 401)
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self._answer({"url": f"http://{self.headers['Host']}/me/mine"})
        elif "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://{self.headers['Host']}/me/mine/commit/{'1' * 40}"
            self._answer({"commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": None})
        else:
            self._answer({})

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "made", [])
    monkeypatch.setattr(Hub, "refuse", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield Hub
        server.shutdown()


def test_push_uploads_the_whole_export_to_a_private_repository(finished, hub, capsys):
    assert main(["export", str(finished), "--push-to-hub", "me/mine"]) == 0
    assert "/me/mine" in capsys.readouterr().out
    made = hub.made[0]  # versions of the client say it in two ways
    assert made["name"] == "mine" and (made.get("visibility") == "private" or made.get("private") is True)
    expected = {p.name: p.read_bytes() for p in (finished / "export").iterdir()}
    assert hub.files.keys() == expected.keys()
    assert hub.files["README.md"] == expected["README.md"]
    assert hub.files["adapter_model.safetensors"] == expected["adapter_model.safetensors"]


def test_a_hub_that_refuses_is_one_clear_error(finished, hub, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "refuse", True)
    assert main(["export", str(finished), "--push-to-hub", "me/mine"]) == 2
    assert "--push-to-hub me/mine: not uploaded" in capsys.readouterr().err
    assert main(["export", str(finished)]) == 2
    assert "give a new directory" in capsys.readouterr().err
