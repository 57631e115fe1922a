"""A small Hugging Face Hub on loopback, real enough for the stock `huggingface_hub` client; model repositories only.

Answers are the Hub's: a private or missing repository is 401 for an anonymous request and 404 for somebody else's
token, an unknown token is 401, a commit on another parent than the branch is 412. All files travel inside of commits.
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
from urllib.parse import unquote

import huggingface_hub
import huggingface_hub.hf_api
import pytest
from huggingface_hub import constants


class ApiError(Exception):
    """An answer other than success, with the code by which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str = ''):
        super().__init__(message)
        self.status = status
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}


@dataclass
class Repo:
    """A repository: commits, each of which maps paths to contents, and branches."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def resolve(self, revision: str = 'main') -> str:
        """Returns the commit of a branch or of a commit's own name."""
        for sha in (revision, self.refs.get(revision), self.refs.get(f'refs/heads/{revision}')):
            if sha in self.commits:
                return sha
        raise ApiError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def files(self, revision: str = 'main') -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


class HubServer:
    """The server; a context manager. A card of more than `readme_limit` bytes is answered by 413."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users = {'hf_ann': 'ann', 'hf_bob': 'bob'}
        self.repos: dict[str, Repo] = {}
        self.readme_limit = 10_000_000
        self.requests: list[str] = []

    def __enter__(self) -> 'HubServer':
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint = f'http://127.0.0.1:{self.http.server_address[1]}'
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def connect_client(
    monkeypatch: pytest.MonkeyPatch, hub: HubServer, home: Path, token: str | None = None, offline: bool = False
) -> None:
    """Points the `huggingface_hub` of this process at a server until the test ends; again for another user or mode.

    The client reads its settings when it is imported: those that change are put into all modules that hold them.
    """
    environment = {
        'HF_ENDPOINT': hub.endpoint,
        'HF_HOME': str(home),
        'HF_HUB_CACHE': str(home / 'hub'),
        'HF_TOKEN': token or '',
        'HF_TOKEN_PATH': str(home / 'token'),
        'HF_HUB_OFFLINE': '1' if offline else '0',
        'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_PROGRESS_BARS': '1',
        'NO_PROXY': '127.0.0.1',
        'no_proxy': '127.0.0.1',
    }
    for name, value in environment.items():
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
    huggingface_hub.close_session()


_ROUTES = {
    r'POST /api/validate-yaml': 'validate_yaml',
    r'POST /api/repos/create': 'create_repo',
    r'GET /api/models/{id}(?:/revision/(?P<rev>[^/]+))?': 'repo_info',
    r'POST /api/models/{id}/preupload/(?P<rev>[^/]+)': 'preupload',
    r'POST /api/models/{id}/commit/(?P<rev>[^/]+)': 'commit',
    r'POST /api/models/{id}/branch/(?P<rev>[^/]+)': 'create_branch',
    r'GET /{id}/resolve/(?P<rev>[^/]+)/(?P<path>.+)': 'download',
}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_request(self) -> None:
        path, _, query = self.path.partition('?')
        self.create_pr = 'create_pr' in query
        self.hub.requests.append(path)
        self.body = self.rfile.read(int(self.headers['Content-Length'] or 0))
        token = self.headers.get('Authorization', '').removeprefix('Bearer ').strip()
        self.user = self.hub.users.get(token)
        try:
            if token and self.user is None:
                raise ApiError(401, 'Invalid credentials in Authorization header')
            for pattern, name in _ROUTES.items():
                pattern = pattern.replace('{id}', '(?P<id>[^/]+/[^/]+?)')
                if match := re.fullmatch(pattern, f'{self.command.replace("HEAD", "GET")} {path}'):
                    self.args = {key: unquote(value or 'main') for key, value in match.groupdict().items()}
                    with self.hub.lock:
                        return getattr(self, name)()
            raise ApiError(404, 'Not found')
        except ApiError as error:
            self.reply({'error': str(error)}, error.status, **error.headers)

    do_GET = do_HEAD = do_POST = handle_request  # noqa: N815

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
        if repo is None or (repo.private and not own) or (write and self.user is None):
            raise ApiError(404 if self.user else 401, 'Repository not found', 'RepoNotFound')
        if write and not own:
            raise ApiError(403, "You don't have the required permissions to perform this operation")
        return repo

    def validate_yaml(self) -> None:
        self.reply({'errors': [], 'warnings': []})

    def create_repo(self) -> None:
        body = json.loads(self.body)
        if body.get('organization', self.user) != self.user or self.user is None:
            raise ApiError(403, "You don't have the rights to create a repo under this namespace")
        name = f'{self.user}/{body["name"]}'
        # With exist_ok the client reads the url of a 409 too.
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            self.hub.repos[name] = Repo(body.get('private') is True or body.get('visibility') == 'private')
            self.hub.repos[name].commit('refs/heads/main', {})
        self.reply({'url': f'{self.hub.endpoint}/{name}', 'name': name}, status)

    def repo_info(self) -> None:
        repo = self.repo()
        sha = repo.resolve(self.args['rev'])
        siblings = [{'rfilename': path} for path in repo.files(sha)]
        self.reply({'id': self.args['id'], 'sha': sha, 'siblings': siblings})

    def preupload(self) -> None:
        self.repo(write=not self.create_pr)
        paths = [file['path'] for file in json.loads(self.body)['files']]
        self.reply({'files': [{'path': path, 'uploadMode': 'regular', 'shouldIgnore': False} for path in paths]})

    def commit(self) -> None:
        """Reads the header of a commit, then one change a line."""
        repo = self.repo(write=not self.create_pr)
        header, *changes = [json.loads(line)['value'] for line in self.body.splitlines()]
        head = repo.resolve(self.args['rev'])
        parent = header.get('parentCommit', head)
        if parent != head and not self.create_pr:
            raise ApiError(412, 'A commit has happened since. Please refresh and try again.')
        files = repo.files(parent) | {each['path']: base64.b64decode(each['content']) for each in changes}
        if len(files.get('README.md', b'')) > self.hub.readme_limit:
            raise ApiError(413, 'Payload too large: README.md')
        number = 1 + sum(name.startswith('refs/pr/') for name in repo.refs)
        ref = f'refs/pr/{number}' if self.create_pr else f'refs/heads/{self.args["rev"]}'
        sha, url = repo.commit(ref, files), f'{self.hub.endpoint}/{self.args["id"]}'
        pull = {'pullRequestUrl': f'{url}/discussions/{number}'} if self.create_pr else {}
        self.reply({'success': True, 'commitOid': sha, 'commitUrl': f'{url}/commit/{sha}', 'hookOutput': '', **pull})

    def create_branch(self) -> None:
        repo = self.repo(write=True)
        repo.refs['refs/heads/' + self.args['rev']] = repo.resolve()
        self.reply({})

    def download(self) -> None:
        repo, path = self.repo(), self.args['path']
        sha = repo.resolve(self.args['rev'])
        if path in repo.files(sha):
            content, missing = repo.files(sha)[path], {}
        else:
            content, missing = b'', ApiError(404, 'Entry not found', 'EntryNotFound').headers
        etag = hashlib.sha256(content).hexdigest()
        self.reply(content, 404 if missing else 200, **missing, **{'X-Repo-Commit': sha, 'ETag': f'"{etag}"'})
