"""AWS KMS for tests: moto's, over TLS, with what moto leaves out.

moto decrypts under disabled keys and under keys that wait for their deletion, knows no imported material, and lets no
deletion come true. Here a key's state counts, as AWS documents it; every request is authenticated (Signature Version 4)
and authorised by a role's actions; and the server can be told to give a certain answer, for what it never says by itself.

    aws_server.py DIR

DIR holds srv.pem, srv.key and roles.json: {"ACCESS KEY": {"secret": "…", "actions": ["kms:Decrypt", …]}}. It is read at
every request. Writes DIR/port when it serves. Ends when stdin ends. Requests for tests, unsigned:
    POST /test/expire    every deletion that waits comes true
    POST /test/answer    {"operation": "Decrypt", "status": 400, "code": "…", "message": "…"}, or {} for the usual answers;
                         "raw": a body in place of code and message; "hang": seconds
    GET /test/calls      the operations since the last time
"""

import hashlib
import hmac
import json
import logging
import os
import pathlib
import ssl
import sys
import threading
import time
import uuid

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from moto.core.exceptions import JsonRESTError
from moto.kms import models
from moto.kms.models import KmsBackend
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

DIR = pathlib.Path(sys.argv[1])
told: dict = {}
calls: list[str] = []


def error(code, message):
    refusal = JsonRESTError(code, message)
    refusal.code = 400
    return refusal


def not_found(backend, key_id):
    arn = f"arn:aws:kms:{backend.region_name}:{backend.account_id}:key/{key_id}"
    return error("NotFoundException", f"Key '{arn}' does not exist")


def check_state(key):
    if key.key_state in ("PendingDeletion", "PendingImport"):
        words = {"PendingDeletion": "pending deletion", "PendingImport": "pending import"}[key.key_state]
        raise error("KMSInvalidStateException", f"{key.arn} is {words}.")
    if key.key_state == "Disabled" or not key.enabled:
        raise error("DisabledException", f"{key.arn} is disabled.")


plain_encrypt, plain_decrypt, plain_create = KmsBackend.encrypt, KmsBackend.decrypt, KmsBackend.create_key


def encrypt(self, key_id, plaintext, encryption_context):
    key_id = self.any_id_to_key_id(key_id)
    if key_id not in self.keys:
        raise not_found(self, key_id)
    check_state(self.keys[key_id])
    return plain_encrypt(self, key_id, plaintext, encryption_context)


def decrypt(self, ciphertext_blob, encryption_context, key_id=None):
    if key_id is None:
        raise error("ValidationException", "lethefs always names the key")
    wanted = self.any_id_to_key_id(key_id)
    if wanted not in self.keys:
        raise not_found(self, wanted)
    check_state(self.keys[wanted])
    # moto's ciphertext begins with the id of its key.
    made_by = bytes(ciphertext_blob[:36]).decode("latin1")
    if made_by != wanted:
        code = "IncorrectKeyException" if made_by in self.keys else "InvalidCiphertextException"
        raise error(code, "")
    try:
        return plain_decrypt(self, ciphertext_blob, encryption_context, key_id)
    except JsonRESTError:
        raise
    except Exception:
        raise error("InvalidCiphertextException", "") from None


def create_key(self, *args, **kwargs):
    key = plain_create(self, *args, **kwargs)
    key.key_usage = key.key_usage or "ENCRYPT_DECRYPT"
    if key.origin == "EXTERNAL":
        # Material is imported by a test's word only: what counts is the state.
        key.key_state, key.enabled = "PendingImport", False
    return key


def by_any_name(plain):
    """moto takes an ARN here and there only."""

    def changed(self, key_id, *args, **kwargs):
        known = self.any_id_to_key_id(key_id)
        if known not in self.keys:
            raise not_found(self, known)
        return plain(self, known, *args, **kwargs)

    return changed


KmsBackend.encrypt, KmsBackend.decrypt, KmsBackend.create_key = encrypt, decrypt, create_key
for name in ("schedule_key_deletion", "cancel_key_deletion", "enable_key", "disable_key"):
    setattr(KmsBackend, name, by_any_name(getattr(KmsBackend, name)))


def all_keys():
    for account in models.kms_backends.values():
        for backend in account.values():
            for key_id, key in list(backend.keys.items()):
                yield backend, key_id, key


def refuse_signature(environ, body):
    """The code and words of a refusal, or None; and the role."""
    fields = dict(part.strip().split("=", 1) for part in
                  environ.get("HTTP_AUTHORIZATION", "").removeprefix("AWS4-HMAC-SHA256").split(",") if "=" in part)
    if not {"Credential", "SignedHeaders", "Signature"} <= fields.keys():
        return ("MissingAuthenticationTokenException", "Request is missing Authentication Token"), None
    access_key, _, region, service, _ = fields["Credential"].split("/")
    role = json.loads((DIR / "roles.json").read_text()).get(access_key)
    if role is None:
        return ("UnrecognizedClientException", "The security token included in the request is invalid."), None
    if role.get("expired"):
        return ("ExpiredTokenException", "The security token included in the request is expired"), None
    headers = {}
    for name in fields["SignedHeaders"].split(";"):
        variable = name.upper().replace("-", "_")
        headers[name] = environ.get(variable if variable in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + variable, "")
    request = AWSRequest("POST", f"https://{environ['HTTP_HOST']}{environ['PATH_INFO']}", headers, body)
    request.context["timestamp"] = environ["HTTP_X_AMZ_DATE"]
    signer = SigV4Auth(Credentials(access_key, role["secret"]), service, region)
    # botocore adds no header here: only what was signed is signed again.
    canonical = "\n".join([
        "POST", "/", "",
        *(f"{name}:{' '.join(value.split())}" for name, value in sorted(headers.items())), "",
        fields["SignedHeaders"], hashlib.sha256(body).hexdigest(),
    ])
    signature = signer.signature(signer.string_to_sign(request, canonical), request)
    if not hmac.compare_digest(signature, fields["Signature"]):
        return ("InvalidSignatureException", "The request signature we calculated does not match"), None
    return None, role


def reply(start, status, body, kind="application/x-amz-json-1.1"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    start(f"{status} X", [("Content-Type", kind), ("Content-Length", str(len(data))), ("x-amzn-RequestId", "test-request")])
    return [data]


moto = DomainDispatcherApplication(create_backend_app)


def control(environ, start, body):
    what = environ["PATH_INFO"].removeprefix("/test/")
    if what == "expire":
        for backend, key_id, key in all_keys():
            if key.key_state == "PendingDeletion":
                del backend.keys[key_id]
    elif what == "answer":
        told.clear()
        told.update(json.loads(body))
    elif what == "state":
        change = json.loads(body)
        for _, key_id, key in all_keys():
            if key_id == change["key"]:
                key.key_state, key.enabled = change["state"], change["state"] == "Enabled"
    elif what == "calls":
        seen, calls[:] = list(calls), []
        return reply(start, 200, seen)
    return reply(start, 200, {})


def application(environ, start):
    length = int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read(length)
    if environ["PATH_INFO"].startswith("/test/"):
        return control(environ, start, body)
    operation = environ.get("HTTP_X_AMZ_TARGET", "").removeprefix("TrentService.")
    calls.append(operation)
    if told and told.get("operation") in (operation, "*"):
        if "hang" in told:
            time.sleep(told["hang"])
        elif "raw" in told:
            return reply(start, told["status"], told["raw"].encode() * told.get("times", 1), "text/plain")
        else:
            return reply(start, told["status"], {"__type": told["code"], "message": told["message"]})
    refusal, role = refuse_signature(environ, body)
    if refusal is None and f"kms:{operation}" not in role["actions"]:
        words = f"User: arn:aws:iam::123456789012:user/u is not authorized to perform: kms:{operation} on this resource"
        refusal = ("AccessDeniedException", words)
    if refusal is not None:
        return reply(start, 400, {"__type": refusal[0], "message": refusal[1]})
    environ["wsgi.input"] = __import__("io").BytesIO(body)

    def numbered(status, headers, *rest):
        # As AWS: a number of its own for each request, which its own log (here: DIR/requests) has too.
        number = str(uuid.uuid4())
        with open(DIR / "requests", "a") as log:
            log.write(f"{number} {operation} {status}\n")
        headers = [(name, value) for name, value in headers if name.lower() != "x-amzn-requestid"]
        return start(status, [*headers, ("x-amzn-RequestId", number)], *rest)

    return moto(environ, numbered)


def main():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "server")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(DIR / "srv.pem", DIR / "srv.key")
    server = make_server("127.0.0.1", 0, application, threaded=True, ssl_context=context)
    (DIR / "port.new").write_text(str(server.server_port))
    (DIR / "port.new").rename(DIR / "port")
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


main()
