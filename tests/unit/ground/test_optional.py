import contextlib
import logging
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from bnexport.errors import MissingDependency
from bnexport.optional import INSTALL, Shared, installed, need_packages, one_line, quiet, require


def test_require_gives_the_module():
    assert require("json.decoder", purpose="a test").JSONDecodeError is not None


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("no_such_package_of_bnexport", "no_such_package_of_bnexport"),
        ("onnxruntime", "onnxruntime-gpu[cuda,cudnn]"),
        ("PIL.Image", "pillow"),
        ("safetensors.torch", "safetensors"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(name, install, monkeypatch):
    if not name.startswith("no_such"):
        monkeypatch.setitem(sys.modules, name, None)  # import then raises ImportError
    with pytest.raises(MissingDependency) as caught:
        require(name, purpose="the example runner")
    assert caught.value.message.startswith(f"the example runner needs {name}, which can't be imported (")
    assert f"pip install '{install}'" in caught.value.remedy


def test_a_package_that_fails_inside_is_named_too(tmp_path, monkeypatch):
    (tmp_path / "bnexport_broken_example.py").write_text("raise ImportError('libfoo.so.3: cannot\\nopen')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match=r"\(libfoo\.so\.3: cannot open\)"):
        require("bnexport_broken_example", purpose="a test")


def test_one_line():
    assert one_line(ValueError("a\n  b\tc ")) == "a b c"
    assert one_line(ValueError("a \x1b[96mb\x1b[0m c")) == "a b c"
    assert one_line(ValueError("")) == "ValueError"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert one_line(ValueError("x" * 300)) == "x" * 300
    assert one_line(ValueError("x" * 301)) == "x" * 297 + "..."
    assert one_line(ValueError("abcdefgh"), 6) == "abc..."


def test_quiet_silences_and_puts_everything_back(capsys):
    logger = logging.getLogger("torch")
    before, stdout, filters = logger.level, sys.stdout, list(warnings.filters)

    def chat():
        with quiet():
            print("chatter")
            warnings.warn("chatter", stacklevel=1)
            logger.error("chatter")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        chat()
    assert (logger.level, sys.stdout, list(warnings.filters)) == (before, stdout, filters)
    assert capsys.readouterr() == ("", "")


def test_threads_that_are_quiet_at_the_same_time_leave_the_process_as_it_was():
    """Two models that are loaded side by side; each restored what it had found, and the output was gone for good."""
    logger = logging.getLogger("torch")
    before = logger.level, sys.stdout, sys.stderr, list(warnings.filters)
    both, first_left = threading.Barrier(2), threading.Event()

    def leaves_first():
        with quiet():
            both.wait(240)
        first_left.set()

    def leaves_last():
        with quiet():
            both.wait(240)
            assert first_left.wait(240)
            assert warnings.filters[0][0] == "ignore"

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(leaves_first), pool.submit(leaves_last)]:
            future.result(240)
    assert (logger.level, sys.stdout, sys.stderr, list(warnings.filters)) == before


def test_a_shared_setting_that_can_not_be_made_is_held_by_no_thread():
    @contextlib.contextmanager
    def broken():
        raise ZeroDivisionError
        yield

    shared = Shared(broken)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), shared:
            pass
    assert shared._inside == 0


def test_installed_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "bnexport_bare_folder").mkdir()
    (tmp_path / "bnexport_broken_example.py").write_text("raise ImportError\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed("bnexport_broken_example")
    assert installed("sys")
    assert not installed("no_such_package_of_bnexport")
    assert not installed("bnexport_bare_folder"), "a folder of that name is not a package"
    monkeypatch.setitem(sys.modules, "json", None)
    assert not installed("json")
    monkeypatch.setitem(sys.modules, "bnexport_broken_example", logging)
    assert installed("bnexport_broken_example")


def test_all_missing_packages_are_named_at_once(monkeypatch):
    need_packages("an example", "json", "logging")
    with pytest.raises(MissingDependency) as caught:
        need_packages("an example", "json", "no_such_a", "no_such_b", "no_such_c")
    assert caught.value.message == "an example needs no_such_a, no_such_b and no_such_c, which are not installed"
    assert caught.value.remedy == "Install the missing packages: pip install no_such_a no_such_b no_such_c"
    with pytest.raises(MissingDependency, match="an example needs no_such_a, which is not installed"):
        need_packages("an example", "no_such_a")


def test_without_torch_the_whole_tool_is_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(MissingDependency, match=f"needs torch and {INSTALL['onnx_ir']}, which are") as caught:
        need_packages("an example", "torch", "onnx_ir")
    assert "pip install bnexport" in caught.value.remedy
    assert "pip uninstall bnexport-runtime" in caught.value.remedy
