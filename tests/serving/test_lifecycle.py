"""Starting and stopping: no request is lost, and errors at the start are one sentence."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.bundles import copy_bundle
from support.serving import INFER, PATIENCE, ROOT, Server, binary, refused, serving, tensor, together, until
from support.serving_clients import Clients

from bnexport.bundle import Bundle
from bnexport.cli.main import run


def test_sigterm_loses_nothing(models: Path, tmp_path: Path, images: np.ndarray, logits: np.ndarray) -> None:
    with serving(models, tmp_path / "log", "--grace", "4") as server, Clients(server, images, logits) as clients:
        until(lambda: len(clients.answers) > 50)
        server.drain()
        state = server.ask("GET", "/v2/health/ready").json
        before = len(clients.answers)
        assert server.process.wait(PATIENCE) == 0
    assert state == {"ready": False, "reason": "the server is stopping"}
    assert clients.failures == []
    assert len(clients.answers) > before, "it still answered after the signal"
    assert [event["event"] for event in server.events() if "event" in event][-1] == "stopped"


def test_an_idle_server_stops_at_once(models: Path, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving(models, tmp_path / "log", "--grace", "1000") as server:
            idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
            server.ask("GET", "/v2/health/live", connection=idle)  # an idle connection does not keep it
            assert server.stop(number) == 0
            idle.close()


def test_sigterm_while_models_are_loaded_ends_it_at_once(models: Path) -> None:
    """Also as a container's first process, for which the system ignores unhandled signals."""
    slow = "repository.open_served = lambda *_: (print('loading', flush=True), time.sleep(60))"
    code = f"import sys, time; from bnexport.serving import repository; {slow}; from bnexport.cli.main import main"
    words = [sys.executable, "-c", f"{code}; sys.exit(main(sys.argv[1:]))", "serve", str(models), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "loading\n"
            process.terminate()
            out, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, out, "Traceback" in errors) == (130, "", False)
    assert errors.lstrip().startswith("Interrupted.")


#: Middleware that changes nothing, but makes the engines of its process slow.
SLOW = """
import time
from bnexport.runtimes.base import Runner

def wrap(app):
    Runner.run_fitting = lambda self, feeds: time.sleep(600)
    return app
"""


@pytest.mark.sampled(4, 3)
@pytest.mark.parametrize("words", [(), ("--processes", "2")])
@pytest.mark.parametrize("signals", [1, 2])
def test_an_engine_that_does_not_come_back_is_not_waited_for(
    models: Path, tmp_path: Path, images: np.ndarray, words: tuple[str, ...], signals: int
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    words = (*words, "--grace", "1" if signals == 1 else "1000", "--workers", "2", "--middleware", "slow:wrap")
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with (
        serving(models, tmp_path / "log", *words, env=env) as server,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)) as client,
    ):
        client.request("POST", INFER, *binary(images))
        until(lambda: "bnexport_http_requests_active 2.0" in server.metrics())
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            until(server.stopping)
        assert server.process.wait(PATIENCE) == 0


def test_a_request_whose_body_is_on_its_way_is_answered(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    body, headers = binary(images)
    with serving(models, tmp_path / "log", "--grace", "20") as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        client.putrequest("POST", INFER)
        for name, value in (headers | {"content-length": str(len(body))}).items():
            client.putheader(name, value)
        client.endheaders(body[:1000])
        until(lambda: "bnexport_http_requests_active 2.0" in server.metrics())
        server.drain()
        client.send(body[1000:])
        answer = client.getresponse()
        assert (answer.status, answer.getheader("connection")) == (200, "close")
        assert json.loads(answer.read())["outputs"][0]["shape"] == [12, 10]
        client.close()
        assert server.process.wait(PATIENCE) == 0


def test_one_bundle_goes_by_its_own_name(models: Path, tmp_path: Path) -> None:
    with serving(models / "bn_lenet" / "1", tmp_path / "log") as server:
        assert server.ask("GET", "/v2/models/bn_lenet/versions/1/ready").status == 200


def test_a_token(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    token = "correct-horse-battery-staple"
    (tmp_path / "token").write_text(token + "\n")
    with serving(models, tmp_path / "log", "--token-file", str(tmp_path / "token")) as server:
        assert server.infer({"inputs": [tensor(images)]}, authorization=f"Bearer {token}").status == 200
        for given in (None, token, "Bearer " + token[:-1], "Bearer é"):
            answer = server.infer({"inputs": [tensor(images)]}, **({"authorization": given} if given else {}))
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert token not in answer.error
        for path in ("/metrics", "/v2/models/bn_lenet", "/v2"):
            assert server.ask("GET", path).status == 401
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert server.ask("GET", path).status == 200
    assert token not in server.log.read_text()


def test_a_full_queue(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    """Two sessions run in threads, so that the queue is real; one request of it may wait."""
    few = ["--workers", "2", "--max-batch", "1", "--limit", "queue=1"]
    with serving(models, tmp_path / "log", *few) as server:
        big = np.tile(images, (60, 1, 1, 1))
        body, headers = binary(big)
        statuses: list[tuple[int, str | None]] = []

        def ask(_: int) -> None:
            for _ in range(6):
                answer = server.ask("POST", INFER, body, headers)
                statuses.append((answer.status, answer.headers.get("retry-after")))

        together(8, ask)
        assert set(statuses) == {(200, None), (503, "1")}
        assert server.infer({"inputs": [tensor(images)]}).status == 200


def test_connections_up_to_the_limit(models: Path, tmp_path: Path) -> None:
    """Also with a low default limit of open files, which a process may raise."""
    started = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard})); "
        "runpy.run_module('bnexport', run_name='__main__')"
    )
    for hard, count in ((400, 100), (300, 20)):
        program = (sys.executable, "-c", started.format(hard=hard))
        with (
            serving(models, tmp_path / "log", "--limit", "connections=110", program=program) as server,
            contextlib.ExitStack() as stack,
        ):
            for _ in range(count):
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE))
            assert server.ask("GET", "/v2/health/live").status == 200
            logged = [(event["allowed"], event["wanted"]) for event in server.events("few files")]
            assert logged == ([(300, 366)] if hard == 300 else [])


def test_an_unservable_model_ends_with_a_sentence(models: Path) -> None:
    assert "not a positive number" in refused(str(models), "--limit", "queue=-3", code=2)


#: Words after the folder of models -> exit code, and a part of the sentence. No server is started for any of them.
BAD = {
    ("--limit", "bodies=3"): (2, "the server has no limit 'bodies'"),
    ("--port", "0", "--token-file", "short"): (2, "contains no token"),
    **{
        (option, value): (2, f"{value} is not a number of seconds")
        for option in ("--grace", "--poll")
        for value in ("nan", "inf")
    },
    ("--tls-cert", "x.pem"): (2, "only one of"),
    ("--port", "0", "--tls-cert", "x.pem", "--tls-key", "y.pem"): (2, "the TLS files x.pem and y.pem can't be used"),
    ("--port", "8765", "--grpc-port", "8765"): (2, "are both 8765"),
    ("--workers", "three"): (2, "'three' is neither auto nor a number"),
    ("--port", "0", "--middleware", "nowhere:x"): (2, "the middleware 'nowhere:x'"),
    ("--port", "0", "--runtime", "onnxruntime-tensorrt"): (3, "can't run here"),
}


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_the_other_sentences(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    """In this process, which is quicker."""
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("x")
    code, sentence = BAD[words]
    assert run(["serve", str(models), *words]) == code
    assert sentence in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("empty", "contains no bundle"), ("nowhere", "does not exist"), ("short", "short is not a folder")],
)
def test_a_folder_that_holds_no_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_text("x")
    assert run(["serve", str(tmp_path / name)]) == 2
    assert sentence in capfd.readouterr().err


def test_folders_that_are_not_models_are_named_in_the_log(models: Path, tmp_path: Path) -> None:
    bundle, folder = Bundle.open(models / "bn_lenet" / "1"), tmp_path / "m"
    for name in ("good/1", "good/.2.part", "good/02", "unversioned", "a name/1", "late/latest"):
        copy_bundle(bundle, folder / name)
    (folder / "triton" / "1").mkdir(parents=True)
    (folder / ".git").mkdir()
    with serving(folder, tmp_path / "log") as server:
        left = {event["folder"]: event["reason"] for event in server.events("folder left out")}
        assert set(left) == {str(folder / n) for n in ("triton", "unversioned", "good/02", "a name/1", "late/latest")}
        assert all("NAME/VERSION/manifest.json" in reason for reason in left.values())
        assert server.ask("GET", "/v2/models/good").json["versions"] == ["1"]


def test_a_port_that_is_taken(server: Server, models: Path) -> None:
    message = refused(str(models), "--port", str(server.port), code=2)
    assert f"port {server.port} can't be used: Address already in use." in message
    assert "Choose another --host or --port." in message


def test_two_servers_share_a_port(models: Path, tmp_path: Path, images: np.ndarray) -> None:
    with serving(models, tmp_path / "a", "--reuse-port") as first:
        words = ["--reuse-port", "--port", str(first.port)]
        with serving(models, tmp_path / "b", *words) as second:
            assert first.port == second.port
            value = {"inputs": [tensor(images)]}
            until(lambda: first.infer(value).status == 200 and all(map(_answered, (first, second))))
            assert second.stop() == 0
        assert {first.infer(value).status for _ in range(20)} == {200}, "what is left answers all"


def _answered(server: Server) -> bool:
    return any(event.get("status") == 200 for event in server.events())


def test_middleware_wraps_the_application(models: Path, tmp_path: Path) -> None:
    (tmp_path / "tracing.py").write_text(
        "class Trace:\n"
        "    def __init__(self, app):\n"
        "        self.app = app\n"
        "    async def __call__(self, scope, receive, send):\n"
        "        async def marked(message):\n"
        "            if message['type'] == 'http.response.start':\n"
        "                message['headers'].append((b'x-span', scope['path'].encode()))\n"
        "            await send(message)\n"
        "        await self.app(scope, receive, marked)\n"
    )
    words = ["--middleware", "tracing:Trace"]
    with serving(models, tmp_path / "log", *words, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as server:
        assert server.ask("GET", "/v2").headers["x-span"] == "/v2"


def test_tls(models: Path, tmp_path: Path, certified: tuple[Path, Path]) -> None:
    import ssl

    certificate, key = certified
    with serving(models, tmp_path / "log", "--tls-cert", str(certificate), "--tls-key", str(key)) as server:
        context = ssl.create_default_context(cafile=str(certificate))
        client = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=PATIENCE, context=context)
        assert server.ask("GET", "/v2/health/ready", connection=client).status == 200
        client.close()
    locked, words = tmp_path / "locked.pem", ["--port", "0", "--tls-cert", str(certificate), "--tls-key"]
    made = ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", str(key), "-out", str(locked)]
    subprocess.run(made, check=True, capture_output=True, timeout=PATIENCE)
    message = refused(str(models), *words, str(locked), code=2)
    assert f"the key in {locked} has a passphrase" in message
    assert "Enter" not in message
    assert f"{certificate} and {certificate} can't be used" in refused(str(models), *words, str(certificate), code=2)
