"""A small Hugging Face Hub on loopback, real enough for the stock `huggingface_hub` client; model repositories only.

The Hub is followed where the client can see it: a private repository (and a missing one) is 401 for an anonymous
request and 404 for somebody else's token, an unknown token is 401 everywhere, a commit on another parent than the
branch is 412, a new repository begins with `.gitattributes`.

The client reads its settings when it is imported, so there are two ways to point it here: another process gets
`HubServer.client_env` as environment, this one calls `connect_client`.
"""

import base64
import hashlib
import json
import re
import runpy
import secrets
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import huggingface_hub.hf_api
import pytest
from huggingface_hub import constants

LFS_SUFFIXES = ('.bin', '.png', '.safetensors')


class ApiError(Exception):
    """An answer other than success, with the code by which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str = ''):
        super().__init__(message)
        self.status = status
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}


@dataclass
class Repo:
    """A repository: commits, each of which maps paths to contents, and branches."""

    id: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def ref(self, revision: str) -> str:
        """Returns a branch's name in full."""
        for ref in (revision, f'refs/heads/{revision}'):
            if ref in self.refs:
                return ref
        raise ApiError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def resolve(self, revision: str = 'main') -> str:
        """Returns the commit of a branch or of a commit's own name."""
        return revision if revision in self.commits else self.refs[self.ref(revision)]

    def files(self, revision: str = 'main') -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]

    def read(self, path: str) -> bytes:
        return self.files()[path]


def object_id(path: str, content: bytes) -> str:
    """Returns the sha256 of an LFS file, and the name of any other in git."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest()


class HubServer:
    """The server; a context manager.

    Attributes:
        users: Token to name.
        repos: Name to repository.
        readme_limit: Largest README.md in bytes that a commit may hold; beyond it the answer is 413.
        requests: Paths of all requests.
        faults: Pattern of requests that fail, to the status of the answer.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users = {'hf_ann': 'ann', 'hf_bob': 'bob'}
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.readme_limit = 10_000_000
        self.requests: list[str] = []
        self.faults: dict[str, int] = {}

    def __enter__(self) -> 'HubServer':
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint = f'http://127.0.0.1:{self.http.server_address[1]}'
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def repo(self, repo_id: str) -> Repo:
        return self.repos[repo_id]

    def client_env(self, home: Path, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Returns the environment that points a new process at this server; its cache is `home/hub`."""
        return {
            'HF_ENDPOINT': self.endpoint,
            'HF_HOME': str(home),
            'HF_HUB_CACHE': str(home / 'hub'),
            'HF_TOKEN': token or '',
            'HF_TOKEN_PATH': str(home / 'token'),
            'HF_HUB_OFFLINE': '1' if offline else '0',
            # With hf_xet installed, the client would send every LFS file to Xet without asking the server.
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'NO_PROXY': '127.0.0.1',
            'no_proxy': '127.0.0.1',
        }


def connect_client(
    monkeypatch: pytest.MonkeyPatch, hub: HubServer, home: Path, token: str | None = None, offline: bool = False
) -> None:
    """Points the `huggingface_hub` of this process, and its child processes, at a server until the test ends.

    The environment is set, the client's own `constants.py` is run once more under it, and every constant that comes out
    differently is put into all modules that hold it: the result is what an import under this environment would give.
    May be called again to change user, home or mode.
    """
    for name, value in hub.client_env(home, token, offline).items():
        monkeypatch.setenv(name, value)
    fresh = runpy.run_path(constants.__file__)
    modules = [module for name, module in sys.modules.items() if name.partition('.')[0] == 'huggingface_hub']
    for name, old in list(vars(constants).items()):
        if name.isupper() and isinstance(old, bool | int | str | frozenset) and fresh[name] != old:
            for module in modules:
                if vars(module).get(name) == old:
                    monkeypatch.setattr(module, name, fresh[name])
    monkeypatch.setattr(huggingface_hub.hf_api.api, 'endpoint', hub.endpoint)
    # Connections are kept open per process; those of another server must not be used again.
    getattr(huggingface_hub, 'close_session', lambda: None)()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    timeout = 60
    routes = (
        (r'POST /api/validate-yaml', 'validate_yaml'),
        (r'POST /api/repos/create', 'create_repo'),
        (r'GET /api/models/{id}(?:/revision/(?P<rev>[^/]+))?', 'repo_info'),
        (r'POST /api/models/{id}/preupload/(?P<rev>[^/]+)', 'preupload'),
        (r'POST /api/models/{id}/commit/(?P<rev>[^/]+)', 'commit'),
        (r'POST /api/models/{id}/branch/(?P<rev>[^/]+)', 'create_branch'),
        (r'POST /{id}\.git/info/lfs/objects/batch', 'lfs_batch'),
        (r'PUT /storage/(?P<oid>[0-9a-f]{64})', 'lfs_upload'),
        (r'GET /{id}/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'download'),
    )

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        self.hub.requests.append(path)
        self.body = self.read_body()
        try:
            for pattern, status in self.hub.faults.items():
                if re.search(pattern, path):
                    raise ApiError(status, f'Injected failure {status}')
            self.route(path)
        except ApiError as error:
            self.reply({'error': str(error)}, error.status, **error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers['Content-Length'] or 0))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def route(self, path: str) -> None:
        token = self.headers.get('Authorization', '').removeprefix('Bearer ').strip()
        self.user = self.hub.users.get(token)
        if token and self.user is None:
            raise ApiError(401, 'Invalid credentials in Authorization header')
        for pattern, name in self.routes:
            pattern = pattern.replace('{id}', '(?P<id>[^/]+/[^/]+?)')
            if match := re.fullmatch(pattern, f'{self.command.replace("HEAD", "GET")} {path}'):
                self.args = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                with self.hub.lock:
                    getattr(self, name)()
                return
        raise ApiError(404, 'Not found')

    def reply(self, data: Any, status: int = 200, **headers: object) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def repo(self, write: bool = False) -> Repo:
        """Returns the repository in the request's path, if the user may have it."""
        repo = self.hub.repos.get(self.args['id'])
        own = self.args['id'].split('/')[0] == self.user
        # The client takes a 401 of a repository's API for a missing repository, but without this code over https only.
        if repo is None or (repo.private and not own) or (write and self.user is None):
            raise ApiError(404 if self.user else 401, 'Repository not found', 'RepoNotFound')
        if write and not own:
            raise ApiError(403, "You don't have the required permissions to perform this operation")
        return repo

    def validate_yaml(self) -> None:
        self.reply({'errors': [], 'warnings': []})

    def create_repo(self) -> None:
        body = json.loads(self.body)
        if self.user is None:
            raise ApiError(401, 'Invalid username or password.')
        if body.get('organization', self.user) != self.user:
            raise ApiError(403, "You don't have the rights to create a repo under this namespace")
        repo = Repo(f'{self.user}/{body["name"]}', body.get('private') is True or body.get('visibility') == 'private')
        # With exist_ok the client reads the url of a 409 too.
        status = 409 if repo.id in self.hub.repos else 200
        if status == 200:
            self.hub.repos[repo.id] = repo
            repo.commit('refs/heads/main', {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
        self.reply({'url': f'{self.hub.endpoint}/{repo.id}', 'name': repo.id}, status)

    def repo_info(self) -> None:
        repo = self.repo()
        sha = repo.resolve(self.args.get('rev', 'main'))
        siblings = [{'rfilename': path} for path in repo.files(sha)]
        self.reply({'id': repo.id, 'sha': sha, 'siblings': siblings})

    def preupload(self) -> None:
        """Tells which files go to LFS, and what they are now."""
        files, replies = self.repo(write='create_pr' not in self.query).files(self.args['rev']), []
        for path in (file['path'] for file in json.loads(self.body)['files']):
            reply = {'path': path, 'uploadMode': 'lfs' if path.endswith(LFS_SUFFIXES) else 'regular'}
            known = {'oid': object_id(path, files[path])} if path in files else {}
            replies.append({**reply, 'shouldIgnore': False, **known})
        self.reply({'files': replies})

    def commit(self) -> None:
        """Reads the header of a commit, then one change a line."""
        create_pr = 'create_pr' in self.query
        repo = self.repo(write=not create_pr)
        header, *changes = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        ref = repo.ref(self.args['rev'])
        parent = header['value'].get('parentCommit', repo.refs[ref])
        if parent != repo.refs[ref] and not create_pr:
            raise ApiError(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(repo.files(parent))
        for each in changes:
            value = each['value']
            is_lfs = each['key'] == 'lfsFile'
            files[value['path']] = self.hub.uploads[value['oid']] if is_lfs else base64.b64decode(value['content'])
        if len(files.get('README.md', b'')) > self.hub.readme_limit:
            raise ApiError(413, 'Payload too large: README.md')
        number = 1 + sum(name.startswith('refs/pr/') for name in repo.refs)
        sha = repo.commit(f'refs/pr/{number}' if create_pr else ref, files)
        url = f'{self.hub.endpoint}/{repo.id}'
        pull = {'pullRequestUrl': f'{url}/discussions/{number}'} if create_pr else {}
        self.reply({'success': True, 'commitOid': sha, 'commitUrl': f'{url}/commit/{sha}', 'hookOutput': '', **pull})

    def create_branch(self) -> None:
        repo, ref = self.repo(write=True), 'refs/heads/' + self.args['rev']
        if ref in repo.refs:
            raise ApiError(409, f'Reference already exists: {ref}')
        repo.refs[ref] = repo.resolve()
        self.reply({})

    def lfs_batch(self) -> None:
        """Tells where to upload what is not stored yet."""
        self.repo()
        objects = json.loads(self.body)['objects']
        for item in objects:
            item['actions'] = {'upload': {'href': f'{self.hub.endpoint}/storage/{item["oid"]}'}}
        self.reply({'transfer': 'basic', 'objects': objects})

    def lfs_upload(self) -> None:
        self.hub.uploads[self.args['oid']] = self.body
        self.reply({})

    def download(self) -> None:
        repo, path = self.repo(), self.args['path']
        sha = repo.resolve(self.args['rev'])
        headers = {'X-Repo-Commit': sha}
        content = repo.files(sha).get(path)
        if content is None:
            self.reply({}, 404, **ApiError(404, 'Entry not found', 'EntryNotFound').headers, **headers)
            return
        self.reply(content, ETag=f'"{object_id(path, content)}"', **headers)
