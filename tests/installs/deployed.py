"""The code of docs/deploy/browser.md and docs/deploy/cpp.md, run on a file of the zoo's network; `make install-test`.

The browser's runtime comes from npm.  C++ needs the headers of onnxruntime: Debian has them from version 13 on, in
libonnxruntime-dev, and npm in a package for Unity, among the files for iOS, where they are the same.
"""

import platform
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import hawqfx
from hawqfx import zoo
from hawqfx.runtime import ort
from tests.report.browser import CHROMIUM, chromium

PAGES = Path(__file__).parents[2] / "docs" / "deploy"
UNITY = "com.github.asus4.onnxruntime@0.4.9"


def code(page: str, language: str) -> str:
    """The code of a page in a language."""
    found = re.search(rf"^```{language}\n(.*?)^```", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With model.onnx in it."""
    path = tmp_path_factory.mktemp("deployed")
    data = zoo.calibration()[:1]
    hawqfx.compile(zoo.resnet20(), "weight_bits=4", data, sensitivity="mse").export(path / "model.onnx")
    return path


@pytest.fixture(scope="module")
def wanted(folder: Path) -> np.ndarray:
    """The logits of an image of zeros, which the pages ask for."""
    return np.asarray(ort.run(ort.session(folder / "model.onnx"), [np.zeros((1, 1, 28, 28), np.float32)])[0])[0]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files with the types that modules and WebAssembly need."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """Of a server of the folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(not shutil.which("npm"), reason="there is no npm: apt-get install npm")
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium")
def test_the_page_of_the_browser_computes_what_python_computes(folder: Path, wanted: np.ndarray, address: str) -> None:
    install = re.search(r"`(npm install [\w-]+)`", (PAGES / "browser.md").read_text())
    assert install is not None
    (folder / "package.json").write_text("{}")
    subprocess.run(install[1].split(), cwd=folder, check=True, capture_output=True)
    (folder / "index.html").write_text(code("browser.md", "html"))
    with chromium() as browser:
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        with page.expect_console_message(lambda message: message.type == "log", timeout=60_000) as said:
            page.goto(address)
        logits = np.array(said.value.args[0].json_value())
    assert faults == []
    print(f"largest difference {np.abs(logits - wanted).max():.2g} of {np.abs(wanted).max():.2g}")
    # WebAssembly adds in another order than this processor, so that single codes fall to the other side of a tie
    assert np.abs(logits - wanted).max() < 0.05 * np.abs(wanted).max()
    assert logits.argmax() == wanted.argmax()


def found(folder: Path, name: str) -> Path | None:
    """The folder that has a file of this name."""
    return next((path.parent for path in sorted(folder.rglob(name))), None)


def onnxruntime_of_cpp(folder: Path) -> list[str]:
    """The options of g++ for the headers and the library: those of the system, or of the package for Unity."""
    headers = found(Path("/usr/include"), "onnxruntime_cxx_api.h")
    if headers is not None:
        return [f"-I{headers}"]
    if not shutil.which("npm"):
        pytest.skip("no headers of onnxruntime: apt-get install libonnxruntime-dev (Debian 13), or npm")
    packed = subprocess.run(["npm", "pack", "--silent", UNITY], cwd=folder, check=True, capture_output=True, text=True)
    with tarfile.open(folder / packed.stdout.strip()) as package:
        package.extractall(folder, filter="data")
    headers = found(folder / "package", "onnxruntime_cxx_api.h")
    library = found(folder / "package" / "Plugins" / "Linux", "libonnxruntime.so")
    assert headers is not None
    assert library is not None
    (library / "libonnxruntime.so.1").symlink_to("libonnxruntime.so")  # the name by which programs look for it
    return [f"-I{headers}", f"-L{library}", f"-Wl,-rpath,{library}"]


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++: apt-get install g++")
@pytest.mark.skipif(platform.system() != "Linux", reason="the package of npm is taken for Linux alone")
def test_the_page_of_cpp_computes_what_python_computes(folder: Path, wanted: np.ndarray) -> None:
    (folder / "main.cpp").write_text(code("cpp.md", "cpp"))
    options = onnxruntime_of_cpp(folder)
    command = ["g++", "-std=c++17", *options, "main.cpp", "-o", "main", "-lonnxruntime"]
    subprocess.run(command, cwd=folder, check=True)
    said = subprocess.run(["./main"], cwd=folder, check=True, capture_output=True, text=True).stdout
    logits = np.array(said.split(), float)
    print(f"largest difference {np.abs(logits - wanted).max():.2g} of {np.abs(wanted).max():.2g}")
    # six digits are printed; another version of onnxruntime may put single codes to the other side of a tie
    assert np.abs(logits - wanted).max() < 0.05 * np.abs(wanted).max()
    assert logits.argmax() == wanted.argmax()
