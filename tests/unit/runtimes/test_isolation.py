"""Runners in a separate process: the same numbers and errors, a clean environment, and no process that stays."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.bundles import copy_bundle, network

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import BnexportError, BundleError, FeedError, RuntimeUnavailable, UsageError
from bnexport.runtimes import isolation
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import RUNNERS, runner_spec
from bnexport.runtimes.isolation import ENVIRONMENT, IsolatedRunner, child_environment
from bnexport.tensors import DTYPES, Signature, TensorSpec

X = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)
ISOLATED = RunSettings(isolated=True)
QUICK = "onnxruntime-cpu"
#: The engines whose child imports torch take seconds.
CPU = [
    pytest.param(spec.name, marks=[] if spec.engine in ("onnxruntime", "openvino", "torch") else pytest.mark.slow)
    for spec in RUNNERS
    if spec.device == "cpu"
]


def is_gone(process: int) -> bool:
    """Return True if a process ends within minutes; a reaped process is gone at once."""
    for _ in range(4800):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{process}/stat").exists() and ") Z " in Path(f"/proc/{process}/stat").read_text():
            return True  # dead; a container without an init reaps no orphans
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", CPU)
def test_the_numbers_are_those_of_this_process(bundle: Bundle, name: str) -> None:
    with runner_spec(name).open(bundle) as here, runner_spec(name).open(bundle, settings=ISOLATED) as there:
        assert isinstance(there, IsolatedRunner)
        for feed in (X, X[:1]):
            np.testing.assert_array_equal(there.run({"input": feed})["logits"], here.run({"input": feed})["logits"])
        assert (there.name, there.effective_device) == (name, "cpu")
        assert there.description == {**here.description, "process": "its own"}
        process = there.process
    assert is_gone(process)
    with pytest.raises(UsageError, match="closed"):
        there.run({"input": X})
    there.close()  # a second time does no harm


def test_a_live_module_runs_here_and_the_description_states_it(bundle: Bundle) -> None:
    foreign = Bundle(bundle.path, replace(bundle.manifest, network={"source": "mine.py:net"}))
    with runner_spec("torch-cpu").open(foreign, module=network(), settings=ISOLATED) as runner:
        assert "live module" in runner.description["process"]
        assert runner.run({"input": X})["logits"].shape == (5, 10)


@pytest.mark.parametrize(
    "spoil",
    [lambda folder: (folder / MODEL_ONNX).unlink(), lambda folder: (folder / MODEL_ONNX).write_bytes(b"no model")],
    ids=["missing", "damaged"],
)
def test_an_error_of_opening_is_the_same_as_here(
    bundle: Bundle, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(copy_bundle(bundle, tmp_path / "1"))
    spoiled = Bundle(tmp_path / "1", bundle.manifest)
    seen = []
    for settings in (RunSettings(), ISOLATED):
        with pytest.raises(BnexportError) as caught:
            runner_spec(QUICK).open(spoiled, settings=settings)
        seen.append((type(caught.value), caught.value.message, caught.value.remedy))
    assert seen[0] == seen[1]
    assert seen[0][0] is BundleError


def test_an_error_of_a_run_is_the_same_as_here_and_the_child_lives_on(bundle: Bundle) -> None:
    # Sizes that vary are not tried when a file is opened.
    loose = Signature((TensorSpec("input", "float32", ("batch", 1, "height", 28)),), bundle.manifest.signature.outputs)
    opened = Bundle(bundle.path, replace(bundle.manifest, signature=loose))
    spec = runner_spec("torchscript-cpu")
    with spec.open(opened) as here, spec.open(opened, settings=ISOLATED) as there:
        reported = []
        for runner in (here, there):
            with pytest.raises(BundleError) as caught:
                runner.run({"input": X[:, :, :27]})
            reported.append((caught.value.message, caught.value.remedy))
        assert reported[0] == reported[1]
        np.testing.assert_array_equal(here.run({"input": X})["logits"], there.run({"input": X})["logits"])
        with pytest.raises(FeedError):
            there.run({"input": X[:, 0]})


def test_the_opened_file_is_the_checked_one_and_not_a_changed_manifest(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    opened = Bundle.open(folder)
    (folder / "manifest.json").write_text("{}")
    with runner_spec(QUICK).open(opened, settings=ISOLATED) as runner:
        assert runner.signature == bundle.manifest.signature


def test_variables_that_change_numbers_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in ENVIRONMENT:
        monkeypatch.setenv(row.name.replace("*", "FP16_ENABLE"), "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    strict, tf32 = child_environment("float32"), child_environment("tf32")
    assert strict["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "NVIDIA_TF32_OVERRIDE" not in tf32
    for environment in (strict, tf32):
        assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert environment["CUDA_VISIBLE_DEVICES"] == "3"
        left = {row.name for row in ENVIRONMENT} & set(environment)
        assert left <= {"NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"}
        assert not [name for name in environment if name.startswith(("ORT_TENSORRT_", "CUBLAS_EMULATE_"))]
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "1"
    assert all(row.reason for row in ENVIRONMENT)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the system does not show a process's environment")
def test_the_child_has_that_environment(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with IsolatedRunner(QUICK, bundle, ISOLATED) as runner:
        found = Path(f"/proc/{runner.process}/environ").read_bytes().split(b"\0")
    assert b"NVIDIA_TF32_OVERRIDE=0" in found
    assert not [item for item in found if item.startswith(b"ONEDNN_")]


@pytest.mark.parametrize(("device", "kind"), [("cpu", BundleError), ("cuda:0", RuntimeUnavailable)])
def test_a_child_that_dies_is_one_sentence(bundle: Bundle, device: str, kind: type[BnexportError]) -> None:
    with IsolatedRunner(QUICK, bundle, ISOLATED) as runner:
        runner.effective_device = device
        os.kill(runner.process, signal.SIGKILL)
        for _ in range(2):  # the error is the same at every later call
            with pytest.raises(kind, match="killed by SIGKILL, perhaps because memory was full") as caught:
                runner.run({"input": X})
            assert type(caught.value) is kind
            assert "\n" not in caught.value.message
            assert caught.value.remedy


CHILDREN = {
    "crashing": (
        "import os, sys\nprint('cuda driver: bad', file=sys.stderr, flush=True)\nos.abort()", BundleError,
        r"killed by SIGABRT \(cuda driver: bad\)",
    ),
    "leaving": ("raise SystemExit(7)", BundleError, "exit code 7"),
    "babbling": ("import time\nprint('hello world ' * 99, flush=True)\ntime.sleep(9999)", BundleError, "killed by"),
    "hanging": ("import time\ntime.sleep(9999)", RuntimeUnavailable, "did not answer for 1 s and was stopped"),
}  # fmt: skip


@pytest.mark.parametrize("child", CHILDREN)
def test_a_child_that_is_not_a_runner(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: str
) -> None:
    source, kind, words = CHILDREN[child]
    (tmp_path / f"{child}_child.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(isolation, "_CHILD", f"{child}_child")
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    with pytest.raises(kind, match=words) as caught:
        IsolatedRunner(QUICK, bundle, ISOLATED, deadline=1.0 if child == "hanging" else 100.0)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    assert started[0].poll() is not None


def test_without_a_python_to_start_the_error_states_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RuntimeUnavailable, match="can't start a separate process"):
        IsolatedRunner(QUICK, bundle, ISOLATED)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Restore the usual Ctrl-C where the tests run in the background and their shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_child_and_no_later_answer_is_taken_for_another(bundle: Bundle) -> None:
    with IsolatedRunner(QUICK, bundle, ISOLATED) as runner:
        os.kill(runner.process, signal.SIGSTOP)
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            runner.run({"input": X})
        timer.join()
        with pytest.raises(RuntimeUnavailable, match="was interrupted"):
            runner.run({"input": X})
        process = runner.process
    assert is_gone(process)


def test_a_runner_that_is_forgotten_leaves_no_process(bundle: Bundle) -> None:
    runner = IsolatedRunner(QUICK, bundle, ISOLATED)
    process = runner.process
    del runner
    gc.collect()
    assert is_gone(process)


SCRIPT = """
import os, signal, sys
import numpy as np
from bnexport import Bundle
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.base import RunSettings
runner = runner_spec("onnxruntime-cpu").open(Bundle.open({bundle!r}), settings=RunSettings(isolated=True))
print(runner.run({{"input": np.zeros((2, 1, 28, 28), np.float32)}})["logits"].shape, runner.process, flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("raise SystemExit(4)", 4), ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL)],
    ids=["ends", "leaves", "is killed"],
)
def test_a_script_without_a_main_guard(bundle: Bundle, tmp_path: Path, end: str, code: int) -> None:
    """The script runs once, whatever is in the working directory, and its child ends with it in every case."""
    (tmp_path / "script.py").write_text(SCRIPT.format(bundle=str(bundle.path), end=end))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "numpy.py").write_text("raise RuntimeError('the wrong numpy')")
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    shape, _, process = lines[0].rpartition(" ")
    assert shape == "(2, 10)"
    assert is_gone(int(process))


def test_threads_get_their_own_answers(bundle: Bundle) -> None:
    with IsolatedRunner(QUICK, bundle, ISOLATED) as runner:
        expected = [runner.run({"input": X[i : i + 1]})["logits"] for i in range(5)]
        wrong: list[int] = []

        def ask(i: int) -> None:
            answers = [runner.run({"input": X[i : i + 1]})["logits"] for _ in range(20)]
            wrong.extend(i for answer in answers if not np.array_equal(answer, expected[i]))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_prints_of_an_engine_do_not_get_between_the_messages() -> None:
    code = (
        "import os; from bnexport.runtimes.isolation import child_pipes\n"
        "_, answers = child_pipes(); print('noise', flush=True); os.system('echo more noise')\n"
        "answers.write(b'clean'); answers.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"clean"
    assert done.stderr.split() == [b"noise", b"more", b"noise"]


def test_messages_carry_every_element_type_and_shape() -> None:
    arrays = {dtype: np.arange(12).reshape(3, 4).astype(dtype) for dtype in DTYPES}
    arrays |= {"none": np.zeros((0, 3), np.float32), "scalar": np.array(7, np.int64), "turned": arrays["float32"].T}
    isolation.send(stream := io.BytesIO(), {"word": "\u00e9"}, arrays)
    stream.seek(0)
    head, found = isolation.receive(stream)
    assert head == {"word": "\u00e9"}
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)
    whole = stream.getvalue()
    for cut in (0, 5, 20, len(whole) - 1):
        with pytest.raises(EOFError):
            isolation.receive(io.BytesIO(whole[:cut]))


OBJECTS = b'{"arrays": [["x", "object", [1]]]}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff" * 8 + b"x", "a message has 18446744073709551615 bytes"),
        ((2).to_bytes(8, "little") + b"xx", "Expecting value"),
        (len(OBJECTS).to_bytes(8, "little") + OBJECTS + bytes(8), "'object'"),
    ],
    ids=["too large", "no json", "objects"],
)
def test_bytes_that_are_not_a_message_are_refused(content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        isolation.receive(io.BytesIO(content))


IMPORTS = """\
import json, sys
from bnexport.errors import BnexportError
from bnexport.runtimes import isolated_child
try:
    isolated_child._open(json.loads(sys.argv[1])).close()
except BnexportError as error:
    print(type(error).__name__)
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("name", [spec.name for spec in RUNNERS if spec.engine == "onnxruntime"])
def test_a_child_that_needs_onnxruntime_alone_does_not_import_torch(bundle: Bundle, name: str) -> None:
    """CUDA's libraries come from NVIDIA's own packages. Without a GPU the child reports that the device is missing."""
    request = {"runtime": name, "bundle": str(bundle.path), "manifest": bundle.manifest.to_json()}
    command = [sys.executable, "-P", "-c", IMPORTS, json.dumps({**request, "settings": {"precision": "float32"}})]
    environment = child_environment("float32")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *errors, imported = done.stdout.split()
    assert errors in ([], ["RuntimeUnavailable"])
    assert imported == "False"
