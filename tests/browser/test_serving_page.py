"""The page of bnexport serve in a browser: pictures dropped and drawn, untrusted texts, small screens, tokens."""

import base64
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser.test_report import BEYOND, FAINT
from PIL import Image
from support.browser import Browser
from support.bundles import copy_bundle, network, reseal, write_bundle
from support.serving import Server, serving

from bnexport.bundle import REPORT
from bnexport.data.datasets import load_dataset

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium")]

HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script>"
TOKEN = "correct-horse-battery-staple"
IMAGES = load_dataset("digits").test_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model with a damaged version, one that takes no pictures, and an untrusted one."""
    models = tmp_path_factory.mktemp("models")
    first = write_bundle(models / "bn_lenet" / "1")
    copies = {name: copy_bundle(first, models / name / "1") for name in ("hostile", "plain")}
    (copy_bundle(first, models / "bn_lenet" / "2") / "model.onnx").write_bytes(b"spoiled")
    for path in (first.path, copies["hostile"]):
        (path / REPORT).write_text(f"<!DOCTYPE html><title>report</title><p>told</p>{HOSTILE}")
    reseal(first.path, verification={"passed": True, "summary": "PASS: 7 rows"})
    labels = tuple(f"{HOSTILE}{index}" for index in range(10))
    reseal(copies["hostile"], name=HOSTILE, labels=labels, verification={"passed": False, "summary": HOSTILE})
    reseal(copies["plain"], preprocessing=None)
    return models


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(folder, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, server: Server) -> Browser:
    """The page, open, with the first model chosen."""
    chromium.screen(1100)
    chromium.open(f"http://127.0.0.1:{server.port}/")
    chromium.until("current !== null")
    return chromium


def text(browser: Browser, name: str) -> str:
    return str(browser.evaluate(f"document.getElementById('{name}').textContent"))


def pick(browser: Browser, title: str) -> None:
    """Click on the button of a model."""
    words = f"[...document.querySelectorAll('#models button')].find(b => b.textContent.startsWith({json.dumps(title)}))"
    browser.evaluate(f"{words}.click()")


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def drop(browser: Browser, content: bytes, kind: str = "image/png") -> None:
    encoded = base64.b64encode(content).decode()
    browser.evaluate(
        f"""(() => {{ const data = new DataTransfer();
        const bytes = Uint8Array.from(atob('{encoded}'), c => c.charCodeAt(0));
        data.items.add(new File([bytes], 'x', {{type: '{kind}'}}));
        canvas.dispatchEvent(new DragEvent('drop', {{bubbles: true, cancelable: true, dataTransfer: data}})); }})()"""
    )


def bars(browser: Browser) -> list[tuple[str, str]]:
    rows = (
        "[...document.querySelectorAll('#bars li')].map(li => [li.children[0].textContent, li.children[2].textContent])"
    )
    return [(label, percent) for label, percent in browser.evaluate(rows)]


def probabilities(server: Server, content: bytes) -> tuple[dict[str, Any], np.ndarray]:
    answer = server.ask("POST", "/v2/models/bn_lenet/classify", content, {"content-type": "image/png"})
    (prediction,) = answer.json["predictions"]
    weights = np.exp(np.array(prediction["logits"]) - max(prediction["logits"]))
    return prediction, weights / weights.sum()


@pytest.mark.parametrize("index", [0, 4, 9])
def test_a_dropped_picture_gets_its_label_and_bars(browser: Browser, server: Server, index: int) -> None:
    want, shares = probabilities(server, content := png(IMAGES[index]))
    drop(browser, content)
    answer = browser.until("document.getElementById('answer').textContent")
    assert answer.startswith(f"{want['label']}, ")
    found = bars(browser)
    assert [label for label, _ in found] == [str(i) for i in np.argsort(-shares, kind="stable")]
    assert float(found[0][1].strip("> %")) == pytest.approx(100 * shares.max(), abs=0.1)
    widths = browser.evaluate("[...document.querySelectorAll('.fill')].map(fill => parseFloat(fill.style.width))")
    assert np.allclose(widths, 100 * np.sort(shares)[::-1], atol=0.01)
    assert browser.complaints == []
    address = f"http://127.0.0.1:{server.port}/"
    assert browser.requests == [address, f"{address}models", f"{address}v2/models/bn_lenet/versions/1/classify"]


def test_a_stroke_is_drawn_seen_and_cleared(browser: Browser, server: Server) -> None:
    box = "(() => { const b = canvas.getBoundingClientRect(); return [b.x, b.y, b.width]; })()"
    x, y, width = browser.evaluate(box)
    browser.drag(*[(x + width * 0.5, y + width * part) for part in (0.15, 0.3, 0.5, 0.7, 0.85)])
    answer = browser.until("document.getElementById('answer').textContent")
    picture = base64.b64decode(browser.evaluate("canvas.toDataURL('image/png').split(',')[1]"))
    want, _ = probabilities(server, picture)
    assert answer.startswith(f"{want['label']}, ")
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("L"))
    assert pixels[140, 140] == 255
    assert pixels[140, 40] == pixels[5, 140] == 0
    assert len(set(pixels[140, 110:140].tolist()) - {0, 255}) > 2, "the brush has a soft edge"
    browser.evaluate("document.getElementById('clear').click()")
    assert (text(browser, "answer"), bars(browser)) == ("", [])
    assert text(browser, "more") == "The class probabilities appear here."
    assert browser.evaluate("pen.getImageData(0, 0, 280, 280).data.every((value, i) => i % 4 === 3 || value === 0)")
    assert browser.complaints == []


def test_a_file_that_is_not_a_picture_shows_the_server_s_message(browser: Browser) -> None:
    drop(browser, b"hello")
    assert "not a PNG" in browser.until("document.getElementById('refusal').textContent")
    drop(browser, png(IMAGES[0]))
    browser.until("document.getElementById('answer').textContent")
    assert text(browser, "refusal") == ""


def test_a_model_that_is_not_ready_has_a_reason(browser: Browser) -> None:
    pick(browser, "bn_lenet 2")
    assert text(browser, "state").startswith("not ready: ")
    assert "model.onnx has 7 bytes" in text(browser, "state")
    assert not browser.evaluate("canvas.checkVisibility() || document.getElementById('signed').checkVisibility()")


def test_the_hint_fits_the_model(browser: Browser) -> None:
    """Only grey data sets are light on dark; a model of colour pictures was not trained on drawings."""
    assert "28 x 28 pixels in grey. Drawings are light on dark" in text(browser, "hint")
    browser.evaluate("choose({...current, image: {channels: 3, height: 64, width: 96}}, false)")
    assert "96 x 64 pixels in colour" in text(browser, "hint")
    assert "light on dark" not in text(browser, "hint")


def test_the_verdict_and_the_report(browser: Browser) -> None:
    assert text(browser, "verdict") == "Verified at export: PASS: 7 rows. Report"
    browser.open(browser.evaluate("document.querySelector('#verdict a').href"))
    assert "told" in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.title") == "report", "no script of a report runs"
    assert browser.evaluate("self.origin") == "null", "it has an opaque origin"


def test_a_server_without_models_is_reported(browser: Browser) -> None:
    """Their folders may be removed while it runs; the page must not look as if it had not loaded."""
    browser.evaluate("ask = async () => ({json: async () => ({models: []})}); load()")
    assert browser.until("document.getElementById('problem').textContent") == "This server has no models now."
    assert not browser.evaluate("document.getElementById('model').checkVisibility()")


def test_the_smallest_size_is_shown_and_sent(browser: Browser) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 3, -1, -1], "smallest": [1, 3, 41, 1]}
    output = {"name": "y", "datatype": "FP32", "shape": [-1, 10]}
    model = {"name": "m", "version": "1", "state": "READY", "inputs": [tensor], "outputs": [output]}
    browser.evaluate(f"choose({json.dumps(model)}, false)")
    shapes = browser.evaluate("[...document.querySelectorAll('#signature td:nth-child(4)')].map((e) => e.textContent)")
    assert shapes == ["any x 3 x 41 or more x any", "any x 10"]
    assert '"shape":[1,3,41,1]' in text(browser, "line")


def test_untrusted_texts_stay_texts(browser: Browser) -> None:
    pick(browser, "hostile 1")
    drop(browser, png(IMAGES[0]))
    answer = browser.until("document.getElementById('answer').textContent")
    assert answer.startswith(HOSTILE)
    assert HOSTILE in text(browser, "verdict")
    assert HOSTILE in bars(browser)[0][0]
    tensor = {"name": HOSTILE + "'; touch taken; '", "datatype": "FP32", "shape": [-1, 2], "smallest": [1, 2]}
    model = {
        "name": HOSTILE,
        "version": "../1",
        "state": "READY",
        "reason": HOSTILE,
        "inputs": [tensor],
        "outputs": [tensor],
    }
    browser.evaluate(f"choose({json.dumps(model)}, false)")
    assert browser.evaluate("document.querySelector('#signature td:nth-child(2)').textContent") == tensor["name"]
    assert browser.evaluate("document.querySelectorAll('#model img, #model script, #models img').length") == 0
    assert browser.evaluate("document.title") != "taken"
    assert browser.complaints == []


def run_line(browser: Browser, folder: Path) -> Any:
    words = ["bash", "-c", text(browser, "line")]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_line_for_a_picture_runs(browser: Browser, server: Server, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(content := png(IMAGES[2]))
    assert run_line(browser, tmp_path)["predictions"] == [probabilities(server, content)[0]]


def test_the_line_for_tensors_runs(browser: Browser, tmp_path: Path) -> None:
    pick(browser, "plain 1")
    assert not browser.evaluate("canvas.checkVisibility()")
    assert browser.evaluate("document.getElementById('untried').checkVisibility()")
    (output,) = run_line(browser, tmp_path)["outputs"]
    import torch

    with torch.no_grad():
        want = network()(torch.zeros(1, 1, 28, 28)).numpy()
    assert output["shape"] == [1, 10]
    assert np.allclose(output["data"], want[0], rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_line_for_several_inputs(browser: Browser, tmp_path: Path) -> None:
    """A name can't leave its quotes, neither of the shell nor of JSON."""
    odd = "it's; touch taken\n\"$(touch taken)`touch taken`\\"
    inputs = [{"name": odd, "datatype": "FP32"}, {"name": "b", "datatype": "BOOL", "smallest": [1, 1]}]
    for shape in ([1, 2], [1, 100]):
        inputs[0]["smallest"] = shape
        value = {"name": "m", "version": "1", "inputs": inputs}
        line = browser.evaluate(f"tensorLine({json.dumps(value)}, 'ADDRESS', '')")
        script = 'curl() { if [ "${@: -1}" = @- ]; then cat; else printf %s "${@: -1}"; fi; }\n' + line
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, timeout=240, check=True)
        length = len(done.stdout) if shape == [1, 2] else int(line.split("length: ")[1].split("'")[0])
        sent = json.loads(done.stdout[:length])["inputs"]
        assert [(item["name"], item["shape"]) for item in sent] == [(odd, [1, shape[1]]), ("b", [1, 1])]
        if shape == [1, 2]:
            assert [item["data"] for item in sent] == [[0, 0], [False]]
        else:
            assert done.stdout[length:] == bytes(401)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [320, 360, 390, 720, 1100])
@pytest.mark.parametrize("name", ["bn_lenet 1", "bn_lenet 2", "hostile 1", "plain 1"])
def test_every_screen(browser: Browser, width: int, name: str) -> None:
    browser.screen(width)
    pick(browser, name)
    if name in ("bn_lenet 1", "hostile 1"):
        drop(browser, png(IMAGES[0]))
        browser.until("document.getElementById('answer').textContent")
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.evaluate(BEYOND) == []


def test_nothing_is_cut_without_a_sign(browser: Browser) -> None:
    """A long label ends with an ellipsis and has its full text as a title; the command is never cut; each column has a head."""
    browser.screen(390)
    pick(browser, "hostile 1")
    drop(browser, png(IMAGES[0]))
    browser.until("document.getElementById('answer').textContent")
    label = "document.querySelector('#bars .label')"
    assert browser.evaluate(f"{label}.scrollHeight > {label}.clientHeight"), "the label is too long for its place"
    assert browser.evaluate(f"getComputedStyle({label}).webkitLineClamp") == "2"
    assert browser.evaluate(f"{label}.title === {label}.textContent")
    pick(browser, "plain 1")
    assert browser.evaluate("byId('line').scrollHeight <= byId('line').clientHeight")
    assert browser.evaluate("[...document.querySelectorAll('th')].every(head => head.textContent)")


def test_a_long_name_breaks_after_its_separators(browser: Browser) -> None:
    browser.screen(390)
    name = "a_model_with_a_rather_long_name.v2-final"
    model = {"name": name, "version": "12", "state": "READY", "inputs": [], "outputs": []}
    browser.evaluate(f"choose({json.dumps(model)}, false)")
    assert text(browser, "title") == f"{name}, version 12"
    lines = """(() => { const range = document.createRange(), lines = new Map();
        for (const node of byId('title').childNodes) for (let i = 0; node.nodeType === 3 && i < node.length; i++) {
          range.setStart(node, i); range.setEnd(node, i + 1); const top = range.getBoundingClientRect().top;
          lines.set(top, (lines.get(top) || '') + node.data[i]); }
        return [...lines.values()]; })()"""
    first, *_, last = browser.evaluate(lines)
    assert first != last, "it takes several lines"
    assert first[-1] in "_.- "


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["bn_lenet 1", "bn_lenet 2", "hostile 1"])
def test_all_can_be_read(browser: Browser, dark: bool, name: str) -> None:
    browser.screen(1100, dark=dark)
    pick(browser, name)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
    )
    assert browser.evaluate(FAINT) == []


def test_names_for_screen_readers(browser: Browser) -> None:
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    found = {(node["role"]["value"], node.get("name", {}).get("value")) for node in tree if not node["ignored"]}
    assert {("button", "Clear"), ("button", "Refresh"), ("button", "Copy"), ("group", "Models")} <= found
    assert any(name and name.startswith("Choose a picture") for _, name in found)
    nameless = [role for role, name in found if role in ("button", "textbox", "image", "link") and not name]
    assert nameless == []
    live = "[...document.querySelectorAll('[aria-live], [role=alert]')].map(e => e.id)"
    assert {"answer", "refusal", "problem"} <= set(browser.evaluate(live))


def test_the_page_requests_a_token_and_keeps_it_in_memory_only(chromium: Browser, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with serving(folder / "bn_lenet" / "1", tmp_path / "log", "--token-file", str(tmp_path / "token")) as guarded:
        chromium.screen(360)
        chromium.open(f"http://127.0.0.1:{guarded.port}/")
        chromium.until("document.activeElement.id === 'token'")
        enter = "byId('token').value = '{}'; byId('gate').requestSubmit()"
        chromium.evaluate(enter.format("wrong-" + TOKEN))
        assert "token" in chromium.until("document.getElementById('problem').textContent")
        chromium.evaluate(enter.format(TOKEN))
        chromium.until("current !== null")
        assert not chromium.evaluate("document.getElementById('gate').checkVisibility()")
        drop(chromium, png(IMAGES[0]))
        chromium.until("document.getElementById('answer').textContent")
        assert '"Authorization: Bearer $TOKEN"' in text(chromium, "line")
        assert TOKEN not in chromium.evaluate("document.documentElement.outerHTML + location.href + document.cookie")
        assert chromium.evaluate("localStorage.length + sessionStorage.length") == 0
        assert not any(TOKEN in request for request in chromium.requests)


def test_a_server_that_went_away(chromium: Browser, folder: Path, tmp_path: Path) -> None:
    with serving(folder / "bn_lenet" / "1", tmp_path / "log") as leaving:
        chromium.open(f"http://127.0.0.1:{leaving.port}/")
        chromium.until("current !== null")
    drop(chromium, png(IMAGES[0]))
    assert "does not answer" in chromium.until("document.getElementById('refusal').textContent")
