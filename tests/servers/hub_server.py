"""A small Hub on loopback that speaks the protocol of huggingface_hub, for the tests.

Repositories with commits, branches and pull requests, files in git or in LFS (whole or in parts), access by token, and
the errors of the real Hub. Everything is kept in memory. Xet storage is not spoken: clients set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


MY_TOKEN = "hf_thisIsTheSecretOfTheUserMe"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png")


class HubError(Exception):
    """An answer other than 200, with the code by which huggingface_hub chooses its exception."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Blob:
    size: int
    oid: str  # of git: sha1 over the content, or over the pointer of a file in LFS
    content: bytes | None = None
    sha256: str | None = None  # where the content is in LFS

    @classmethod
    def regular(cls, content):
        return cls(len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), content)

    @classmethod
    def lfs(cls, sha256, size):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(size, cls.regular(pointer).oid, sha256=sha256)

    @property
    def etag(self):
        return self.sha256 or self.oid

    def describe(self, path):
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        return entry


@dataclass
class Repository:
    kind: str  # "model", "dataset" or "space"
    id: str
    private: bool
    commits: dict = field(default_factory=dict)  # commit -> path -> Blob
    messages: dict = field(default_factory=dict)  # commit -> its summary
    refs: dict = field(default_factory=dict)  # "main", a branch, or "refs/pr/1" -> commit

    def commit(self, ref, files, message):
        content = json.dumps([self.id, ref, len(self.commits), sorted((p, b.oid) for p, b in files.items())])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid], self.messages[oid], self.refs[ref] = files, message, oid
        return oid

    def resolve(self, revision):
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class HubServer(ThreadingHTTPServer):
    """The server. Its attributes may be looked at and changed while it runs.

    Attributes:
        users (`dict[str, str]`): Token -> name of the user.
        repositories (`dict[tuple[str, str], Repository]`): (kind, id) -> repository.
        objects (`dict[str, bytes]`): The contents in LFS, by their sha256.
        log (`list[tuple[str, str]]`): Method and path of every request.
        part_size (`int`): Files in LFS of more bytes than this are uploaded in parts.
        stall_upload (`Callable`): Given the sha256, whether this upload shall get no answer.
    """

    daemon_threads = True
    request_queue_size = 100

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn_url = f"http://localhost:{self.server_port}"  # another host than the Hub's, as the real one
        self.stalled, self.released = threading.Event(), threading.Event()
        self.reset()

    def reset(self):
        self.users = {MY_TOKEN: "me"}
        self.repositories, self.objects, self.parts, self.log = {}, {}, {}, []
        self.part_size = 1 << 20
        self.stall_upload = lambda sha256: False
        self.released.set()  # let go of an upload that was stalled
        self.stalled, self.released = threading.Event(), threading.Event()

    def handle_error(self, request, client_address):
        pass  # a client that goes away is part of the tests

    def start(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    routes: list = []

    def log_message(self, *args):
        pass

    def handle_request(self):
        self.server.log.append((self.command, self.path))
        self._body = None
        url = urlsplit(self.path)
        self.query = parse_qs(url.query, keep_blank_values=True)
        try:
            for method, pattern, function in self.routes:
                match = pattern.fullmatch(url.path)
                if match and self.command in method:
                    return function(self, *(unquote(group) if group else "" for group in match.groups()))
            raise HubError(404, f"there is no {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.body()  # the connection is used again: nothing may be left in it
            self.answer({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def body(self):
        if self._body is None:
            self._body = self.read_body()
        return self._body

    def read_body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content=b"", status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = headers or {}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self, required=True):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        if not token and required:
            raise HubError(401, "Invalid username or password.")
        return self.server.users.get(token)

    def repository(self, kind, repo_id, write=False):
        user = self.user(required=write)
        repository = self.server.repositories.get((kind.removesuffix("s"), repo_id))
        owner = repo_id.split("/")[0]
        if repository is None or (repository.private and user != owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HubError(403, f"You don't have the right to write to {repo_id}")
        return repository

    # Account and repositories

    def whoami(self):
        self.answer({"type": "user", "name": self.user(), "auth": {"type": "access_token"}})

    def create_repository(self):
        user, body = self.user(), json.loads(self.body())
        kind, repo_id = body.get("type", "model"), f"{body.get('organization') or user}/{body['name']}"
        if repo_id.split("/")[0] != user:
            raise HubError(403, f"You don't have the rights to create a {kind} under the namespace {repo_id}")
        if kind == "space" and body.get("sdk") not in ("gradio", "docker", "static"):
            raise HubError(400, "a Space needs an sdk")
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.server.repositories:
            return self.answer({"url": url, "error": "You already created this repo"}, 409)
        repository = Repository(
            kind, repo_id, "private" in (body.get("visibility"), body.get("private") and "private")
        )
        repository.commit("main", {".gitattributes": Blob.regular(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.server.repositories[kind, repo_id] = repository
        self.answer({"url": url, "name": repo_id, "id": repo_id})

    def list_repositories(self, kind):
        author = self.query.get("author", [""])[0]
        found = [r for (k, _), r in self.server.repositories.items() if k + "s" == kind and not r.private]
        self.answer([{"id": r.id, "sha": r.refs["main"]} for r in found if r.id.startswith(author)])

    def repository_info(self, kind, repo_id, revision):
        repository = self.repository(kind, repo_id)
        oid = repository.resolve(revision or "main")
        siblings = [
            {"rfilename": path, "size": blob.size, "blobId": blob.oid}
            for path, blob in repository.commits[oid].items()
        ]
        self.answer(
            {
                "id": repo_id,
                "sha": oid,
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
                "author": "me",
            }
        )

    def refs(self, kind, repo_id):
        refs = self.repository(kind, repo_id).refs
        listed = [
            {"name": name, "ref": name if "/" in name else f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in refs.items()
        ]
        branches = [ref for ref in listed if not ref["name"].startswith("refs/pr/")]
        self.answer({"branches": branches, "tags": [], "converts": [], "pullRequests": listed[len(branches) :]})

    def create_branch(self, kind, repo_id, branch):
        repository = self.repository(kind, repo_id, write=True)
        if branch in repository.refs:
            raise HubError(409, f"Reference {branch} already exists")
        start = json.loads(self.body() or b"{}").get("startingPoint", "main")
        repository.refs[branch] = repository.resolve(start)
        self.answer({})

    def tree(self, kind, repo_id, revision, folder):
        repository = self.repository(kind, repo_id)
        files = repository.commits[repository.resolve(revision)]
        prefix = folder.rstrip("/") + "/" if folder else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries, folders = [], {}
        for path, blob in inside.items():
            parts = path.removeprefix(prefix).split("/")
            for i in range(1, len(parts)):
                name = prefix + "/".join(parts[:i])
                folders[name] = {
                    "type": "directory",
                    "path": name,
                    "size": 0,
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
            entries.append(blob.describe(path))
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = [
                entry for entry in [*folders.values(), *entries] if "/" not in entry["path"].removeprefix(prefix)
            ]
        self.answer(entries)

    def paths_info(self, kind, repo_id, revision):
        repository = self.repository(kind, repo_id)
        files = repository.commits[repository.resolve(revision)]
        body = self.body().decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        self.answer([files[path].describe(path) for path in paths if path in files])

    # Commits

    def validate_yaml(self):
        errors = []
        match = re.match(r"---\n(.*?)\n---", json.loads(self.body())["content"], re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
            for name, kinds in {"license": str, "library_name": str, "pipeline_tag": str, "tags": list}.items():
                if name in data and not isinstance(data[name], kinds):
                    errors.append({"message": f'"{name}" must be a {kinds.__name__}'})
            for model in data.get("model-index", []):
                for result in model["results"]:
                    if not all((result["task"]["type"], result["dataset"]["name"], result["dataset"]["type"])):
                        errors.append({"message": "a result needs a task and a dataset"})
                    if not all(metric["type"] and "value" in metric for metric in result["metrics"]):
                        errors.append({"message": "a metric needs a type and a value"})
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            errors.append({"message": f"{type(error).__name__}: {error}"})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind, repo_id, revision):
        repository = self.repository(kind, repo_id, write=True)
        present = repository.commits[repository.resolve(revision)]
        files = []
        for file in json.loads(self.body())["files"]:
            path, large = file["path"], file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 << 20
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if path in present:
                files[-1]["oid"] = present[path].etag
        self.answer({"files": files})

    def create_commit(self, kind, repo_id, revision):
        repository = self.repository(kind, repo_id, write=True)
        files = dict(repository.commits[repository.resolve(revision)])
        summary = ""
        for line in self.body().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                summary = value["summary"]
                if value.get("parentCommit") not in (None, repository.resolve(revision)):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = Blob.regular(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise HubError(400, f"{value['path']}: its content was not uploaded")
                files[value["path"]] = Blob.lfs(value["oid"], len(self.server.objects[value["oid"]]))
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {
                    path: blob for path, blob in files.items() if not path.startswith(value["path"].rstrip("/") + "/")
                }
        answer = {"success": True, "hookOutput": ""}
        url = f"{self.server.url}/{'' if repository.kind == 'model' else repository.kind + 's/'}{repo_id}"
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        elif revision not in repository.refs:
            raise HubError(404, f"{revision} is not a branch", "RevisionNotFound")
        oid = repository.commit(revision, files, summary)
        self.answer({**answer, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"})

    # LFS

    def lfs_batch(self, prefix, repo_id):
        self.repository(prefix.rstrip("/") or "models", repo_id, write=True)
        objects = []
        for item in json.loads(self.body())["objects"]:
            oid, size = item["oid"], item["size"]
            if oid not in self.server.objects:
                url, header = f"{self.server.url}/lfs/{oid}", {}
                if size > self.server.part_size:
                    parts = -(-size // self.server.part_size)
                    header = {str(part): f"{url}/{part}" for part in range(1, parts + 1)}
                    header["chunk_size"] = str(self.server.part_size)
                item = {**item, "actions": {"upload": {"href": url, "header": header}}}
            objects.append(item)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid, part):
        if self.server.stall_upload(oid):
            released = self.server.released
            self.server.stalled.set()
            released.wait(60)
            self.close_connection = True
            return
        content = self.body()
        if part:
            self.server.parts[oid, int(part)] = content
        elif hashlib.sha256(content).hexdigest() == oid:
            self.server.objects[oid] = content
        else:
            raise HubError(400, "the content does not have the hash that was announced")
        self.answer(headers={"ETag": hashlib.md5(content).hexdigest()})

    def lfs_complete(self, oid):
        numbers = [part["partNumber"] for part in json.loads(self.body())["parts"]]
        content = b"".join(self.server.parts.pop((oid, number)) for number in numbers)
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "the parts do not have the hash that was announced")
        self.server.objects[oid] = content
        self.answer({})

    # Downloads

    def resolve(self, prefix, repo_id, revision, path):
        repository = self.repository(prefix.rstrip("/") or "models", repo_id)
        oid = repository.resolve(revision)
        blob = repository.commits[oid].get(path)
        headers = {"X-Repo-Commit": oid}
        if blob is None:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        if blob.sha256:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            return self.answer(b"", 302, headers | {"Location": f"{self.server.cdn_url}/cdn/{blob.sha256}"})
        self.answer(blob.content, headers=headers | {"ETag": f'"{blob.oid}"'})

    def cdn(self, sha256):
        content, headers, status = self.server.objects[sha256], {"ETag": f'"{sha256}"'}, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self.answer(content, status, headers)


def _route(methods, pattern, function):
    pattern = pattern.replace("{kind}", "(models|datasets|spaces)").replace("{repo}", "([^/]+/[^/]+)")
    HubHandler.routes.append((methods.split(), re.compile(pattern), function))


_route("GET", "/api/whoami-v2", HubHandler.whoami)
_route("POST", "/api/validate-yaml", HubHandler.validate_yaml)
_route("POST", "/api/repos/create", HubHandler.create_repository)
_route("GET", "/api/{kind}", HubHandler.list_repositories)
_route("GET", "/api/{kind}/{repo}(?:/revision/([^/]+))?", HubHandler.repository_info)
_route("GET", "/api/{kind}/{repo}/refs", HubHandler.refs)
_route("POST", "/api/{kind}/{repo}/branch/([^/]+)", HubHandler.create_branch)
_route("GET", "/api/{kind}/{repo}/tree/([^/]+)(?:/(.+))?", HubHandler.tree)
_route("POST", "/api/{kind}/{repo}/paths-info/([^/]+)", HubHandler.paths_info)
_route("POST", "/api/{kind}/{repo}/preupload/([^/]+)", HubHandler.preupload)
_route("POST", "/api/{kind}/{repo}/commit/([^/]+)", HubHandler.create_commit)
_route("POST", r"/(datasets/|spaces/)?{repo}\.git/info/lfs/objects/batch", HubHandler.lfs_batch)
_route("PUT", "/lfs/([0-9a-f]{64})(?:/([0-9]+))?", HubHandler.lfs_put)
_route("POST", "/lfs/([0-9a-f]{64})", HubHandler.lfs_complete)
_route("GET HEAD", "/(datasets/|spaces/)?{repo}/resolve/([^/]+)/(.+)", HubHandler.resolve)
_route("GET HEAD", "/cdn/([0-9a-f]{64})", HubHandler.cdn)
