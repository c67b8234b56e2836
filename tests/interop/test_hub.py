"""Models from the hub and to it, against a hub of our own on loopback that speaks what huggingface_hub asks for."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax import convert, verify
from vlm_jax.errors import UsageError, VlmError
from vlm_jax.families import make_family
from vlm_jax.inference.load import save
from vlm_jax.interop import hub
from vlm_jax.models import presets

TOKEN = "hf_secretsecretsecret"
MODEL = {
    "config.json": b'{"model_type": "llava"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "README.md": b"# Mine",
    ".gitattributes": b"",
    "modeling_llava.py": b"raise SystemExit('run')",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"pickle",
    "original/params.json": b"{}",
    "flax_model.msgpack": b"flax",
}
WANTED = {
    *("config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
}


class Hub(http.server.ThreadingHTTPServer):
    """Repositories in memory: name -> revision -> file -> content. `gated` and `private` ones want the token."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.created: list[dict[str, Any]] = []
        self.log: list[tuple[str, str, str | None]] = []
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path, _ in self.log if method == "GET" and "/resolve/" in path]


def sha_of(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        token = self.headers.get("Authorization")
        self.server.log.append((self.command, path, token))
        if self.server.broken:
            return self.send(503)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            return self.api(parts[1:], body, token)
        return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)

    do_GET = do_HEAD = do_POST = answer

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files); answers itself where there are none."""
        revisions = self.server.repos.get(repo)
        if revisions is None:
            return self.send(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        for name, files in revisions.items():
            if revision in (name, sha_of(repo, name)):
                return sha_of(repo, name), files
        return self.send(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")

    def json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def api(self, parts: list[str], body: bytes, token: str | None) -> None:
        if parts == ["repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if token != f"Bearer {TOKEN}":
                return self.send(401, X_Error_Message="Invalid credentials in Authorization header")
            self.server.created.append(asked)
            if repo in self.server.repos:
                return self.send(409, json.dumps({"url": f"{self.server.url}/{repo}"}).encode())
            self.server.repos[repo] = {"main": {}}
            return self.json({"url": f"{self.server.url}/{repo}"})
        if parts == ["validate-yaml"]:
            return self.json({"errors": [], "warnings": []})
        repo, rest = "/".join(parts[1:3]), parts[3:]
        action, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        found = self.find(repo, revision)
        if found is None:
            return None
        sha, files = found
        if action == "revision":
            return self.json({"id": repo, "sha": sha, "private": False, "siblings": [{"rfilename": f} for f in files]})
        if action == "tree":
            listed = [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in files.items()]
            folders = sorted({f.split("/")[0] for f in files if "/" in f})
            if "recursive=True" not in self.path and "recursive=true" not in self.path:
                listed = [entry for entry in listed if "/" not in entry["path"]]
            return self.json([*listed, *({"type": "directory", "path": f, "oid": "0" * 40} for f in folders)])
        if action == "preupload":
            asked = json.loads(body)["files"]
            return self.json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        assert action == "commit", parts
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        return self.json({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def file(self, repo: str, revision: str, name: str, token: str | None) -> None:
        found = self.find(repo, revision)
        if found is None:
            return None
        if repo in self.server.gated and token != f"Bearer {TOKEN}":
            return self.send(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        sha, files = found
        etag = hashlib.sha256(files[name]).hexdigest()
        return self.send(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=sha)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, with a cache and a token of its own. huggingface_hub reads the environment once, at its import."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with Hub() as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        template = started.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": started.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        for name, value in (settings | {"HF_HUB_CACHE": str(tmp_path / "cache")}).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        started.repos["someone/model"] = {"main": dict(MODEL), "v2": {**MODEL, "config.json": b'{"newer": true}'}}
        close_session()
        yield started
        started.shutdown()
        thread.join()
        close_session()


def fetched(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_weights_tokenizer_and_json_are_fetched_and_nothing_else(
    server: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = hub.fetch("someone/model")
    assert fetched(folder) == {name: MODEL[name] for name in WANTED}
    assert set(server.downloads) == WANTED
    out, err = capfd.readouterr()
    size = sum(len(MODEL[name]) for name in WANTED)
    assert err.startswith(f"someone/model: fetching {size} bytes in {len(WANTED)} files\n") and out == ""
    tokens = {token for _, path, token in server.log if "someone" in path}
    assert tokens == {f"Bearer {TOKEN}"} and TOKEN not in err

    assert hub.fetch("someone/model") == folder
    assert len(server.downloads) == len(WANTED), "what is in the cache was fetched again"
    assert "fetching" not in capfd.readouterr().err


def test_torch_files_are_fetched_where_there_are_no_others(server: Hub) -> None:
    server.repos["someone/old"] = {"main": {k: v for k, v in MODEL.items() if "safetensors" not in k}}
    names = set(fetched(hub.fetch("someone/old")))
    assert {"pytorch_model.bin", "pytorch_model.bin.index.json"} < names
    assert not names & {"training_args.bin", "modeling_llava.py", "flax_model.msgpack"}


def test_the_tokenizer_alone(server: Hub) -> None:
    names = set(fetched(hub.fetch("someone/model", weights=False)))
    assert names == {name for name in WANTED if "safetensors" not in name}
    assert set(fetched(hub.fetch("someone/model"))) == WANTED, "the weights come when they are asked for"


def test_a_revision_is_a_branch_or_a_commit(server: Hub) -> None:
    assert fetched(hub.fetch("someone/model@v2"))["config.json"] == b'{"newer": true}'
    assert fetched(hub.fetch(f"someone/model@{sha_of('someone/model', 'v2')}"))["config.json"] == b'{"newer": true}'
    assert fetched(hub.fetch("someone/model"))["config.json"] == MODEL["config.json"]


def test_each_failure_is_one_line_that_names_the_way_out(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def fails(spec: str, *says: str) -> None:
        with pytest.raises(UsageError) as error:
            hub.fetch(spec)
        text = str(error.value)
        assert all(word in text for word in says) and "\n" not in text and TOKEN not in text, text

    server.repos["someone/gated"], server.gated = {"main": dict(MODEL)}, {"someone/gated"}
    server.repos["someone/empty"] = {"main": {"config.json": b"{}", "consolidated.pth": b""}}
    fails("someone/nothing", "no folder someone/nothing here", "hf auth login")
    fails("someone/model@v3", "no revision 'v3'", "branch")
    fails("someone/empty", "no weights")
    fails("someone/mo--del", "is no name of a model")
    hub.fetch("someone/gated")  # with the token that may
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    server.repos["someone/gated"]["main"]["model-00001-of-00002.safetensors"] = b"new"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-2")
    fails("someone/gated", "is gated", f"{server.url}/someone/gated")
    server.broken = True
    fails("someone/model", "cannot be reached", constants.HF_HUB_CACHE)
    server.broken = False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails("someone/model", "HF_HUB_OFFLINE is set", constants.HF_HUB_CACHE)


@pytest.mark.parametrize("way", ["offline", "broken"])
def test_what_is_in_the_cache_needs_no_network(server: Hub, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    from huggingface_hub import constants

    folder = hub.fetch("someone/model")
    if way == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.broken = True
    assert hub.fetch("someone/model") == folder
    if way == "offline":  # huggingface_hub asks a broken hub for half a minute
        (Path(folder) / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(UsageError, match="not wholly in the cache"):
            hub.fetch("someone/model")


def test_a_folder_of_that_name_wins(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id("someone/model") and hub.is_hub_id("someone/model@v2")
    assert Path(hub.local_folder("someone/model")).name == sha_of("someone/model", "main")
    (tmp_path / "someone/model").mkdir(parents=True)
    assert not hub.is_hub_id("someone/model") and hub.local_folder("someone/model") == "someone/model"
    for path in ("/a/b", "./a", "../a/b", "~/a", "a", "a/b/c", "a/b/", "gs://bucket/a", "C:\\a", ""):
        assert not hub.is_hub_id(path), path


def test_a_push_is_one_commit_without_what_was_not_made_by_it(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in MODEL.items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    card = hub.model_card("me/mine", format="hf", base_models=["someone/model"], license="mit")
    assert hub.push(folder, "me/mine", card=card) == f"{server.url}/me/mine"
    there = server.repos["me/mine"]["main"]
    assert {k: v for k, v in there.items() if k != "README.md"} == {name: MODEL[name] for name in WANTED}
    assert there["README.md"].decode() == card
    assert server.created[0]["visibility"] == "private" and server.created[0]["name"] == "mine"
    assert sum("/commit/" in path for _, path, _ in server.log) == 1

    there["README.md"], there["data.csv"] = b"edited", b"kept"
    for name in WANTED:
        if "safetensors" in name:
            (folder / name).unlink()
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").write_bytes(b"all")
    hub.push(folder, "me/mine", card=card)
    assert {name for name in there if "safetensors" in name} == {"model.safetensors"}
    assert (there["README.md"], there["data.csv"]) == (b"edited", b"kept")


def test_a_push_without_the_right_is_one_line(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UsageError, match="refuses me/mine with status 401: log in") as error:
        hub.push(tmp_path, "me/mine", card="")
    assert "hf_other" not in str(error.value)
    with pytest.raises(UsageError, match="--push=mine is not the name of a model"):
        hub.push(tmp_path, "mine", card="")


def test_a_model_is_loaded_from_the_hub_and_pushed_to_it(
    server: Hub, tmp_path: Path, one_device: None, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2}
    model = presets.llava(vision=presets.clip_vit(**tower), connector="mlp2x_gelu", decoder=presets.llama(**text))
    abstract, draw = make_family(model).bound.abstract, np.random.default_rng(0)
    params = {path: jax.device_put(draw.normal(size=a.shape).astype("f4"), a.sharding) for path, a in abstract.items()}
    save(tmp_path / "made", params, model=model, images={"mode": "pad"}, template="plain", tokenizer=None)
    server.repos["me/made"] = {"main": {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}}

    loaded = vlm_jax.load("me/made@main").params
    assert all((np.asarray(loaded[path]) == np.asarray(value)).all() for path, value in params.items())
    convert.main(["export", "me/made", str(tmp_path / "hf"), "--push=me/hf", "--license=mit"])
    assert capsys.readouterr().out == f"{server.url}/me/hf\n"
    there = server.repos["me/hf"]["main"]
    assert set(there) == {"README.md", *(file.name for file in (tmp_path / "hf").iterdir())}
    assert json.loads(there["config.json"])["model_type"] == "llava" and b'license: "mit"' in there["README.md"]


def test_a_released_model_is_fetched_and_verified(
    server: Hub, made_llava: Path, one_device: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the name of one of which logits are recorded, which those of this one are not."""
    name = "llava-hf/llava-v1.6-mistral-7b-hf"
    server.repos[name] = {"main": {file.name: file.read_bytes() for file in made_llava.iterdir()}}
    with pytest.raises(VlmError, match=r"does not compute here what it should: logits before the image \(records\)$"):
        verify.main([f"--model={name}", "--max_new_tokens=8"])
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{name}: ") and "parameters, float32" in first
    beside = [(row.split("  ")[0], row.endswith("  ok"), "transformers" in row) for row in rows]
    assert beside == [
        *(("logits before the image", False, False), ("answer", True, False), ("tokens of the prompt", True, True)),
        *(("logits", True, True), ("logits", True, False), ("answer", True, True)),
    ]


@pytest.mark.parametrize("format", ["hf", "llava", "adapter"])
def test_the_card_says_where_a_model_is_from_and_how_to_load_it(tmp_path: Path, format: str) -> None:
    from huggingface_hub import ModelCard

    groups = [["vision/.*", None], [".*", 1.0]]
    stage = {"name": "finetune", "samples": 128, "lr": 2e-5, "schedule": "cosine", "template": "v1", "groups": groups}
    run = {"init_from": None, "parts": {"decoder": "some/llm", "vision": str(tmp_path)}, "stages": [stage], "model": {}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    told = hub.origin(tmp_path)
    assert told["base_models"] == ["some/llm"], "a path of this machine is told to the world"
    assert hub.origin(tmp_path / "none", "some/base")["base_models"] == ["some/base"]
    full = hub.model_card("me/mine", format=format, license="mit", **told)
    data = ModelCard(full).data
    assert (data.base_model, data.license, data.pipeline_tag) == (["some/llm"], "mit", "image-text-to-text")
    assert data.library_name == ("peft" if format == "adapter" else "transformers")
    assert "128 samples a step, learning rate 2e-05 (cosine; `vision/.*` frozen, `.*` × 1)" in full
    assert '"me/mine"' in full
    bare = hub.model_card("me/mine", format=format)
    assert ModelCard(bare).data.license == "other" and "not stated" in bare
