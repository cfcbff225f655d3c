"""A Hub on this machine: what huggingface_hub asks for when it creates, fills and reads model repositories, over real HTTP.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(cache)})
        hub.repos["me/model"].commits[-1].files["config.json"]

Repositories live in memory. Writing needs the token of `environment`, and so does reading a private repository.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import yaml


TOKEN, USER = "hf_of_this_test", "me"
LFS_SUFFIXES = {".safetensors", ".bin", ".png", ".gif"}
# What the Hub knows, as far as our cards could say it.
LICENSES = {"mit", "apache-2.0", "bsd-3-clause", "cc-by-4.0", "openrail", "other", "unknown"}
PIPELINES = {
    "text-generation",
    "text-classification",
    "fill-mask",
    "feature-extraction",
    "token-classification",
    "other",
}


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch or of an oid, of which the first digits will do."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid.startswith(revision)), None)

    def commit(self, title: str, files: dict[str, bytes]) -> Commit:
        content = repr((len(self.commits), title, sorted(files.items()))).encode()
        self.commits.append(Commit(hashlib.sha1(content).hexdigest(), title, files))
        return self.commits[-1]


class HubServer:
    """Serves until the end of its `with`.

    Attributes:
        repos (`dict[str, Repo]`): by name.
        log (`list[tuple[str, str]]`): method and path of each request.
    """

    def __init__(self):
        self.repos, self.large_files, self.log = {}, {}, []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, with_token: bool = True) -> dict[str, str]:
        """Variables for a process that is to use this Hub and keep its downloads in the folder `home`."""
        token = {"HF_TOKEN": TOKEN} if with_token else {"HF_TOKEN": ""}
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            **token,
        }


def find_errors(content: str) -> list[str]:
    """What the Hub would refuse in the metadata of a model card."""
    header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if header is None:
        return ["no metadata"]
    try:
        data = yaml.safe_load(header.group(1))
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = []
    if data.get("license", "unknown") not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("pipeline_tag", "other") not in PIPELINES:
        errors.append(f'"pipeline_tag" must be one of {sorted(PIPELINES)}')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    for number, model in enumerate(data.get("model-index", [])):
        where = f"model-index[{number}]"
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            errors.append(f"{where} needs a name and a list of results")
        for result in model.get("results") or []:
            task, dataset = result.get("task", {}), result.get("dataset", {})
            if task.get("type") not in PIPELINES:
                errors.append(f"{where}.results.task.type is unknown: {task.get('type')}")
            if not isinstance(dataset.get("type"), str) or not isinstance(dataset.get("name"), str):
                errors.append(f"{where}.results.dataset needs a type and a name")
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), (int, float, str)):
                    errors.append(f"{where}.results.metrics need a type and a value")
    return errors


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._route("GET")

    def do_HEAD(self):
        self._route("HEAD")

    def do_POST(self):
        self._route("POST")

    def do_PUT(self):
        self._route("PUT")

    ROUTES = [
        ("POST", r"/api/repos/create", "_create"),
        ("POST", r"/api/validate-yaml", "_validate"),
        ("GET", r"/api/whoami-v2", "_whoami"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "_preupload"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "_large_files"),
        ("PUT", r"/large-files/(?P<oid>[0-9a-f]{64})", "_store_large_file"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "_commit"),
        ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "_resolve"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "_tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "_info"),
    ]

    def _route(self, method):
        path = urlsplit(self.path).path
        self.hub.log.append((method, unquote(path)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.is_user = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for methods, pattern, handler in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in methods.split("|"):
                arguments = {name: unquote(value) for name, value in match.groupdict().items() if value}
                # Large files go to a storage of their own, whose addresses are secret instead.
                if method == "POST" and handler != "_validate" and not self.is_user:
                    return self._fail(401, None, "Invalid username or password.")
                if "repo" in arguments:
                    name, repo = arguments["repo"], self.hub.repos.get(arguments["repo"])
                    if repo is None or (repo.private and not self.is_user):
                        return self._fail(404 if self.is_user else 401, "RepoNotFound", f"Repository {name} not found")
                    arguments["repo"] = repo
                    revision = arguments.pop("revision", "main")
                    arguments["at"] = repo.at(revision)
                    if arguments["at"] is None:
                        return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return getattr(self, handler)(**arguments)
        self._fail(404, None, f"this Hub knows nothing of {method} {path}")

    def _create(self):
        request = json.loads(self.body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return self._answer(url, status=409)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        repo = self.hub.repos[name] = Repo(private)
        repo.commit("initial commit", {".gitattributes": b""})
        self._answer(url)

    def _validate(self):
        errors = find_errors(json.loads(self.body)["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._answer(answer, status=400 if errors else 200)

    def _whoami(self):
        if not self.is_user:
            return self._fail(401, None, "Invalid username or password.")
        self._answer({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _preupload(self, repo, at):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if PurePosixPath(file["path"]).suffix in LFS_SUFFIXES else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._answer({"files": modes})

    def _large_files(self, repo, at):
        objects = [
            {
                "oid": file["oid"],
                "size": file["size"],
                **(
                    {}
                    if file["oid"] in self.hub.large_files
                    else {"actions": {"upload": {"href": f"{self.hub.url}/large-files/{file['oid']}"}}}
                ),
            }
            for file in json.loads(self.body)["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _store_large_file(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._fail(400, None, "this is not the file of that hash")
        self.hub.large_files[oid] = self.body
        self._answer({})

    def _commit(self, repo, at):
        files, title = dict(at.files), ""
        for line in self.body.splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                return self._fail(400, None, f"this Hub knows nothing of {key}")
        oid = repo.commit(title, files).oid
        url = f"{self.hub.url}/{self._name(repo)}/commit/{oid}"
        self._answer({"success": True, "commitOid": oid, "commitUrl": url})

    def _resolve(self, repo, at, file):
        content = at.files.get(file)
        if content is None:
            return self._fail(404, "EntryNotFound", f"{file} does not exist", {"X-Repo-Commit": at.oid})
        etag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": at.oid, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        if PurePosixPath(file).suffix in LFS_SUFFIXES:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag}"'}
        self._send(200, headers, content)

    def _info(self, repo, at):
        siblings = [{"rfilename": path} for path in at.files]
        info = {
            "_id": at.oid[:24],
            "id": self._name(repo),
            "sha": at.oid,
            "private": repo.private,
            "siblings": siblings,
        }
        self._answer(info | {"tags": [], "downloads": 0, "likes": 0})

    def _name(self, repo):
        return next(name for name, each in self.hub.repos.items() if each is repo)

    def _tree(self, repo, at, folder=""):
        here = {path: content for path, content in at.files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not here:
            return self._fail(404, "EntryNotFound", f"{folder} does not exist on this revision")
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in here.items()
        ]
        self._answer(entries)

    def _answer(self, answer, status=200):
        self._send(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _fail(self, status, code, message, headers=()):
        headers = {"Content-Type": "application/json", "X-Error-Message": message, **dict(headers)}
        if code is not None:
            headers["X-Error-Code"] = code
        self._send(status, headers, json.dumps({"error": message}).encode())

    def _send(self, status, headers, content):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
