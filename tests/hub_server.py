"""A small Hugging Face Hub on loopback, real enough for the stock `huggingface_hub` client; model repositories only.

Repositories live under a folder; users are in memory. The Hub is followed where the client can see it: a private
repository (and a missing one) is 401 for an anonymous request and 404 for somebody else's token, an unknown token is
401 everywhere, LFS uploads are checked against their sha256, a new repository begins with a commit of `.gitattributes`.

The client reads its settings when it is imported, so there are two ways to point it here: another process gets
`HubServer.client_env` as environment, this one calls `connect_client`.
"""

import base64
import hashlib
import json
import os
import re
import runpy
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import huggingface_hub
import huggingface_hub.hf_api
import pytest
import yaml
from huggingface_hub import constants

CHUNK = 1 << 16
LFS_SUFFIXES = ('.bin', '.png', '.safetensors')
REPO_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')
FRONT_MATTER = re.compile(r'\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$', re.DOTALL | re.MULTILINE)


class ApiError(Exception):
    """An answer other than success, with the headers by which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str = '', **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {}), **headers}


@dataclass
class Request:
    """One request in the log; an `Authorization` header is kept as `Bearer ***`."""

    method: str
    path: str
    headers: dict[str, str]
    status: int | None = None


@dataclass
class Fault:
    """What happens to the next `times` requests that match; see `drop_downloads` and `fail_requests`."""

    pattern: str
    times: int
    method: str | None = None
    status: int = 0
    after: int = -1
    reset: bool = False


class Entry(NamedTuple):
    """A file of a commit: git object id, size, and the sha256 when it is stored as LFS."""

    oid: str
    size: int
    sha256: str | None = None


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest()


def check_card(text: str) -> dict[str, Any]:
    """Returns the metadata of a README; 400 unless it is a YAML mapping."""
    match = FRONT_MATTER.match(text)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ApiError(400, 'YAML metadata error: ' + ' '.join(str(error).split())) from error
    if data is not None and not isinstance(data, dict):
        raise ApiError(400, 'YAML metadata error: a mapping is expected')
    return data or {}


class Repo:
    """A repository on disk: `meta.json` (refs, visibility), `commits/SHA.json` and `blobs/ID`."""

    def __init__(self, folder: Path, repo_id: str):
        self.folder, self.id = folder, repo_id

    @property
    def meta(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / 'meta.json').read_text()))

    def save(self, **changes: object) -> None:
        temporary = self.folder / f'meta.{secrets.token_hex(4)}.tmp'
        temporary.write_text(json.dumps({**(self.meta if self.exists() else {}), **changes}))
        temporary.replace(self.folder / 'meta.json')

    def exists(self) -> bool:
        return (self.folder / 'meta.json').is_file()

    def create(self, private: bool) -> None:
        for name in ('commits', 'blobs'):
            (self.folder / name).mkdir(parents=True)
        self.save(private=private, refs={}, pulls=0)
        files = {'.gitattributes': self.add_blob(b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n')}
        self.set_ref('refs/heads/main', self.add_commit(files, 'initial commit'))

    def set_ref(self, ref: str, sha: str) -> None:
        self.save(refs={**self.meta['refs'], ref: sha})

    def find_ref(self, revision: str) -> str:
        for ref in (revision, f'refs/heads/{revision}'):
            if ref in self.meta['refs']:
                return ref
        raise ApiError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def resolve(self, revision: str) -> str:
        """Returns the commit of a branch, full ref or commit hash."""
        if re.fullmatch('[0-9a-f]{40}', revision) and (self.folder / 'commits' / f'{revision}.json').is_file():
            return revision
        return str(self.meta['refs'][self.find_ref(revision)])

    def files(self, revision: str = 'main') -> dict[str, Entry]:
        record = json.loads((self.folder / 'commits' / f'{self.resolve(revision)}.json').read_text())
        return {path: Entry(*entry) for path, entry in sorted(record['files'].items())}

    def blob(self, entry: Entry) -> Path:
        return self.folder / 'blobs' / (entry.sha256 or entry.oid)

    def read(self, path: str, revision: str = 'main') -> bytes:
        return self.blob(self.files(revision)[path]).read_bytes()

    def add_blob(self, content: bytes) -> Entry:
        entry = Entry(git_hash(content), len(content))
        self.blob(entry).write_bytes(content)
        return entry

    def add_commit(self, files: Mapping[str, Entry], title: str) -> str:
        # Two equal commits within one second are still two commits.
        sha = hashlib.sha1(secrets.token_bytes(8), usedforsecurity=False).hexdigest()
        (self.folder / 'commits' / f'{sha}.json').write_text(json.dumps({'title': title, 'files': files}))
        return sha


@dataclass
class HubServer:
    """The server; a context manager.

    Attributes:
        root: Folder of all repositories.
        readme_limit: Largest README.md in bytes that a commit may hold; beyond it the answer is 413.
        requests: Log of every request since the start or the last `requests.clear()`.
    """

    root: Path
    readme_limit: int = 10_000_000
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        # Upload addresses carry their own permission: the client calls them without its token.
        self.secret = secrets.token_hex(16)
        self.users: dict[str, str] = {}
        self.faults: list[Fault] = []

    def __enter__(self) -> 'HubServer':
        self.http = _Server(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def endpoint(self) -> str:
        return f'http://127.0.0.1:{self.http.server_address[1]}'

    def add_user(self, name: str, token: str) -> None:
        self.users[token] = name

    def repo(self, repo_id: str) -> Repo:
        """Returns a repository, which may not exist, to look at what the client has stored."""
        if not REPO_ID.fullmatch(repo_id) or '..' in repo_id or '--' in repo_id:
            raise ApiError(400, f'Invalid repository name: {repo_id}')
        return Repo(self.root / repo_id, repo_id)

    def log(self, method: str, pattern: str = '') -> list[Request]:
        return [r for r in list(self.requests) if method == r.method and re.search(pattern, r.path)]

    def drop_downloads(self, path: str, after: int, times: int = 1, reset: bool = False) -> None:
        """Cuts the connection of the next downloads of a file after some bytes; it ends early, or is reset."""
        self.faults.append(Fault(r'/resolve/.*' + re.escape(quote(path)) + '$', times, 'GET', after=after, reset=reset))

    def fail_requests(self, status: int, times: int = 1, method: str | None = None, pattern: str = '') -> None:
        """Answers the next requests that match with an error."""
        self.faults.append(Fault(pattern, times, method, status))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (None, method) and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

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
            'HF_HUB_DISABLE_TELEMETRY': '1',
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    timeout = 60
    routes = (
        ('GET', r'/api/whoami-v2', 'whoami'),
        ('POST', r'/api/validate-yaml', 'validate_yaml'),
        ('POST', r'/api/repos/create', 'create_repo'),
        ('GET', r'/api/models/{id}(?:/revision/(?P<rev>[^/]+))?', 'repo_info'),
        ('GET', r'/api/models/{id}/tree/(?P<rev>[^/]+)', 'list_tree'),
        ('POST', r'/api/models/{id}/preupload/(?P<rev>[^/]+)', 'preupload'),
        ('POST', r'/api/models/{id}/commit/(?P<rev>[^/]+)', 'commit'),
        ('POST', r'/api/models/{id}/branch/(?P<rev>[^/]+)', 'create_branch'),
        ('POST', r'/{id}\.git/info/lfs/objects/batch', 'lfs_batch'),
        ('PUT', r'/storage/{id}/(?P<oid>[0-9a-f]{64})', 'lfs_upload'),
        ('GET', r'/{id}/resolve/(?P<rev>[^/]+)/(?P<path>.+)', 'download'),
    )

    def log_message(self, format: str, *args: object) -> None:
        pass  # The log is HubServer.requests.

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body_read = False
        headers = {k.title(): 'Bearer ***' if k.lower() == 'authorization' else v for k, v in self.headers.items()}
        self.entry = Request(self.command, self.path, headers)
        self.hub.requests.append(self.entry)
        self.fault = self.hub.take_fault(self.command, url.path)
        try:
            if self.fault is not None and self.fault.status:
                raise ApiError(self.fault.status, f'Injected failure {self.fault.status}')
            self.route(url.path)
        except ApiError as error:
            self.send_json({'error': error.message}, error.status, error.headers)
        except (KeyError, TypeError, ValueError) as error:
            self.send_json({'error': f'Malformed request: {error!r}'}, 400)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def route(self, path: str) -> None:
        token = self.headers.get('Authorization', '').removeprefix('Bearer ').strip()
        self.user = self.hub.users.get(token)
        if token and self.user is None:
            raise ApiError(401, 'Invalid credentials in Authorization header')
        method = 'GET' if self.command == 'HEAD' else self.command
        for verb, pattern, name in self.routes:
            match = re.fullmatch(pattern.replace('{id}', '(?P<id>[^/]+/[^/]+?)'), path)
            if verb == method and match:
                self.args = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                getattr(self, name)()
                return
        raise ApiError(404, 'Not found')

    def chunks(self) -> Iterator[bytes]:
        """Yields the request's body, of known length or chunked."""
        self.body_read = True
        chunked = self.headers.get('Transfer-Encoding', '').lower() == 'chunked'
        while size := int(self.rfile.readline() or b'0', 16) if chunked else int(self.headers['Content-Length'] or 0):
            while size:
                part = self.rfile.read(min(size, CHUNK))
                if not part:
                    raise ConnectionError('body ended early')
                size -= len(part)
                yield part
            if not chunked:
                return
            self.rfile.readline()
        if chunked:
            self.rfile.readline()

    def body(self) -> dict[str, Any]:
        return dict(json.loads(b''.join(self.chunks()) or b'{}'))

    def reply(self, status: int, headers: Mapping[str, object]) -> None:
        # What is left of the body is read first: the next request follows it.
        if not self.body_read:
            for _ in self.chunks():
                continue
        self.entry.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send_json(self, data: object, status: int = 200, headers: Mapping[str, object] | None = None) -> None:
        content = json.dumps(data).encode()
        self.reply(status, {'Content-Type': 'application/json', 'Content-Length': len(content), **(headers or {})})
        if self.command != 'HEAD':
            self.wfile.write(content)

    def repo(self, write: bool = False) -> Repo:
        """Returns the repository in the request's path, if the user may have it."""
        repo = self.hub.repo(self.args['id'])
        own = repo.id.split('/')[0] == self.user
        hidden = not repo.exists() or (repo.meta['private'] and not own)
        # The client takes a 401 of a repository's API for a missing repository, but without this code over https only.
        if hidden or (write and self.user is None):
            raise ApiError(404 if self.user else 401, 'Repository not found', 'RepoNotFound')
        if write and not own:
            raise ApiError(403, "You don't have the required permissions to perform this operation")
        return repo

    def whoami(self) -> None:
        if self.user is None:
            raise ApiError(401, 'Invalid username or password.')
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': 'write'}}
        self.send_json({'type': 'user', 'id': self.user, 'name': self.user, 'orgs': [], 'auth': auth})

    def validate_yaml(self) -> None:
        try:
            check_card(self.body()['content'])
        except ApiError as error:
            self.send_json({'errors': [{'message': error.message}], 'warnings': []}, 400)
            return
        self.send_json({'errors': [], 'warnings': []})

    def create_repo(self) -> None:
        body = self.body()
        if self.user is None:
            raise ApiError(401, 'Invalid username or password.')
        namespace = body.get('organization') or self.user
        if namespace != self.user:
            raise ApiError(403, f"You don't have the rights to create a repo under the namespace {namespace!r}")
        repo = self.hub.repo(f'{namespace}/{body["name"]}')
        reply = {'url': f'{self.hub.endpoint}/{repo.id}', 'name': repo.id}
        with self.hub.lock:
            if repo.exists():
                # With exist_ok the client reads the url of this answer too.
                self.send_json({'error': f'You already created this model repo: {repo.id}', **reply}, 409)
                return
            repo.create(body.get('private') is True or body.get('visibility') == 'private')
        self.send_json(reply)

    def repo_info(self) -> None:
        repo = self.repo()
        sha = repo.resolve(self.args.get('rev', 'main'))
        files = repo.files(sha)
        card = check_card(repo.read('README.md', sha).decode()) if 'README.md' in files else {}
        info = {
            'id': repo.id,
            'sha': sha,
            'private': repo.meta['private'],
            'lastModified': f'{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.000Z}',
            'tags': card.get('tags', []),
            'siblings': [{'rfilename': path} for path in files],
        }
        self.send_json({**info, 'cardData': card} if card else info)

    def list_tree(self) -> None:
        """Lists the files; none of our repositories has folders."""
        files = self.repo().files(self.args['rev'])
        self.send_json([{'type': 'file', 'path': p, 'oid': e.oid, 'size': e.size} for p, e in files.items()])

    def preupload(self) -> None:
        """Tells which files go to LFS, and what they are now."""
        repo = self.repo(write='create_pr' not in self.query)
        files, replies = repo.files(self.args['rev']), []
        for file in self.body()['files']:
            mode = 'lfs' if file['path'].endswith(LFS_SUFFIXES) else 'regular'
            reply = {'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False}
            if entry := files.get(file['path']):
                reply['oid'] = entry.sha256 or entry.oid
            replies.append(reply)
        self.send_json({'files': replies})

    def commit(self) -> None:
        """Reads the header of a commit, then one change a line."""
        create_pr = 'create_pr' in self.query
        repo = self.repo(write=not create_pr)
        lines = [json.loads(line) for line in b''.join(self.chunks()).splitlines() if line.strip()]
        with self.hub.lock:
            ref = repo.find_ref(self.args['rev'])
            parent = lines[0]['value'].get('parentCommit', repo.resolve(ref))
            if parent != repo.resolve(ref) and not create_pr:
                raise ApiError(412, 'A commit has happened since. Please refresh and try again.')
            files = repo.files(parent)
            for line in lines:
                if line['key'] != 'header':
                    files[line['value']['path']] = self.changed_file(repo, line['key'], line['value'])
            sha = repo.add_commit(files, lines[0]['value']['summary'])
            if create_pr:
                repo.save(pulls=repo.meta['pulls'] + 1)
                ref = f'refs/pr/{repo.meta["pulls"]}'
            repo.set_ref(ref, sha)
        url = f'{self.hub.endpoint}/{repo.id}'
        reply = {'success': True, 'commitOid': sha, 'commitUrl': f'{url}/commit/{sha}', 'hookOutput': ''}
        pull = {'pullRequestUrl': f'{url}/discussions/{repo.meta["pulls"]}'}
        self.send_json({**reply, **pull} if create_pr else reply)

    def changed_file(self, repo: Repo, key: str, value: dict[str, Any]) -> Entry:
        if '..' in value['path'].split('/') or key not in ('file', 'lfsFile'):
            raise ApiError(400, f'Invalid change: {key} {value["path"]}')
        if key == 'lfsFile':
            blob = repo.folder / 'blobs' / value['oid']
            if not re.fullmatch(r'[0-9a-f]{64}', value['oid']) or not blob.is_file():
                raise ApiError(400, f'LFS pointer of {value["path"]} points to an object that does not exist')
            size = blob.stat().st_size
            pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{value["oid"]}\nsize {size}\n'
            return Entry(git_hash(pointer.encode()), size, value['oid'])
        content = base64.b64decode(value['content'])
        if value['path'] == 'README.md':
            if len(content) > self.hub.readme_limit:
                raise ApiError(413, f'Payload too large: README.md has {len(content)} bytes')
            check_card(content.decode())
        return repo.add_blob(content)

    def create_branch(self) -> None:
        repo, ref = self.repo(write=True), 'refs/heads/' + self.args['rev']
        with self.hub.lock:
            if ref in repo.meta['refs']:
                raise ApiError(409, f'Reference already exists: {ref}')
            repo.set_ref(ref, repo.resolve(self.body().get('startingPoint') or 'main'))
        self.send_json({})

    def lfs_batch(self) -> None:
        """Tells where to upload what is not stored yet."""
        repo, replies = self.repo(), []
        for item in self.body()['objects']:
            reply: dict[str, Any] = {'oid': item['oid'], 'size': item['size'], 'authenticated': True}
            if not (repo.folder / 'blobs' / item['oid']).is_file():
                address = f'{self.hub.endpoint}/storage/{repo.id}/{item["oid"]}'
                reply['actions'] = {'upload': {'href': f'{address}?size={item["size"]}&signature={self.hub.secret}'}}
            replies.append(reply)
        self.send_json({'transfer': 'basic', 'objects': replies})

    def lfs_upload(self) -> None:
        """Keeps an LFS object only if its bytes are the announced ones."""
        content = b''.join(self.chunks())
        if self.query['signature'] != [self.hub.secret]:
            raise ApiError(403, 'The signature of the upload address is wrong')
        if hashlib.sha256(content).hexdigest() != self.args['oid'] or len(content) != int(self.query['size'][0]):
            raise ApiError(400, 'BadDigest')
        (self.hub.repo(self.args['id']).folder / 'blobs' / self.args['oid']).write_bytes(content)
        self.send_json({})

    def download(self) -> None:
        repo, path = self.repo(), self.args['path']
        sha = repo.resolve(self.args['rev'])
        entry = repo.files(sha).get(path)
        if entry is None:
            raise ApiError(404, 'Entry not found', 'EntryNotFound', **{'X-Repo-Commit': sha})
        etag = f'"{entry.sha256 or entry.oid}"'
        headers: dict[str, object] = {'ETag': etag, 'X-Repo-Commit': sha, 'Accept-Ranges': 'bytes'}
        if entry.sha256:
            headers |= {'X-Linked-Etag': etag, 'X-Linked-Size': entry.size}
        status, start = 200, 0
        if match := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', '')):
            status, start = 206, int(match[1])
            headers['Content-Range'] = f'bytes {start}-{entry.size - 1}/{entry.size}'
        self.reply(status, {'Content-Length': entry.size - start, **headers})
        if self.command != 'HEAD':
            self.send_content(repo.blob(entry).read_bytes()[start:])

    def send_content(self, content: bytes) -> None:
        """Sends a file, less of it if a fault says so."""
        if self.fault is None:
            self.wfile.write(content)
            return
        self.wfile.write(content[: self.fault.after])
        self.close_connection = True
        if self.fault.reset:
            # Closing with a linger time of zero, before the base class says goodbye, is what sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            os.close(self.connection.detach())
