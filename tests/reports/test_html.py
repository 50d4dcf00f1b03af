"""The page of a report, opened in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scored_runs import hits, picture, scored, write_run
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from moelora_plugin.reports.compare import read_runs
from moelora_plugin.reports.html import render_page
from moelora_plugin.reports.scoreboard import scoreboard

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)

SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1200,1600",
)

RIGHT = {
    "sst2": {"base": [True, False, True, False, True], "adapter": [True, True, True, False, False]},
    "rte": {"base": hits(9, 0.5, 0), "adapter": hits(9, 0.7, 1)},
}


def page(path: Path, *runs: Path, documents: int = 200) -> Path:
    named = {name: found[0] for name, found in read_runs([str(run) for run in runs]).items()}
    path.write_text(render_page(scoreboard(named), documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    yield driver
    driver.quit()


def opened(browser: webdriver.Chrome, path: Path) -> webdriver.Chrome:
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what the pages before have left
    browser.get(path.as_uri())
    return browser


def requests_of(browser: webdriver.Chrome) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [one for one in messages if one["method"] == "Network.requestWillBeSent"]
    urls = [one["params"]["request"]["url"] for one in sent]
    # What begins with data: stands in the page itself; chrome... is the browser's own first tab.
    return [url for url in urls if not url.startswith(("data:", "chrome"))]


def documents(browser: webdriver.Chrome) -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, ".document")


def numbers(browser: webdriver.Chrome) -> list[int]:
    return [int(one.text) for one in browser.find_elements(By.CSS_SELECTOR, "summary > .number")]


def choose(browser: webdriver.Chrome, name: str, option: str) -> None:
    Select(browser.find_element(By.ID, name)).select_by_visible_text(option)


@needs_browser
def test_documents_are_found_and_read(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = write_run(tmp_path / "moelora_eval.json", right=RIGHT)
    path = page(tmp_path / "report.html", run)
    opened(browser, path)
    assert numbers(browser) == [0, 1, 2, 3, 4]
    for option, expected in (
        ("models disagree", [1, 4]),
        ("adapter wrong", [3, 4]),
        ("base right", [0, 2, 4]),
        ("adapter right, base wrong", [1]),
        ("adapter wrong, base right", [4]),
        ("all", [0, 1, 2, 3, 4]),
    ):
        choose(browser, "show", option)
        assert numbers(browser) == expected, option
    search = browser.find_element(By.ID, "search")
    search.send_keys("NUMBER 3")
    assert numbers(browser) == [3]
    assert browser.find_element(By.ID, "count").text.startswith("1 of the 5 documents here")
    search.clear()
    search.send_keys("no such thing")
    assert numbers(browser) == []
    choose(browser, "task", "rte")
    search.clear()
    search.send_keys("comment")
    assert len(documents(browser)) == 9

    summary = documents(browser)[2].find_element(By.TAG_NAME, "summary")
    browser.execute_script("arguments[0].focus()", summary)
    summary.send_keys(" ")  # by keyboard
    text = documents(browser)[2].text
    assert "<script>window.hacked = 1</script> & more" in text
    right = RIGHT["rte"]["adapter"][2]
    assert f"adapter {'✓ no' if right else '✗ yes'}" in text.replace("\n", " ")
    assert "right answer no" in text.replace("\n", " ")

    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [path.as_uri()]


@needs_browser
def test_experts_are_drawn(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = write_run(tmp_path / "moelora_eval.json", right=RIGHT)
    opened(browser, page(tmp_path / "report.html", run))
    assert Select(browser.find_element(By.ID, "use-model")).options[0].text == "adapter"
    maps = browser.find_elements(By.CSS_SELECTOR, "#heat figure")
    assert [one.find_element(By.TAG_NAME, "figcaption").text for one in maps] == [
        "q_proj",
        "v_proj",
    ]
    titles = maps[0].find_elements(By.TAG_NAME, "title")
    assert len(titles) == 3 * 4
    load = json.loads(run.read_text())["expert_use"]["adapter"]["sst2"]
    share = 4 * load["model.layers.1.self_attn.q_proj"]["load"][2]
    said = titles[6].get_attribute("textContent")
    assert said == f"layer 1, expert 2: {share:.2f} \u00d7 the fair share"
    choose(browser, "use-task", "rte")
    assert browser.get_log("browser") == []


@needs_browser
def test_more_is_shown_on_request(browser: webdriver.Chrome, tmp_path: Path) -> None:
    run = write_run(tmp_path / "moelora_eval.json", request={"limit": 60})
    opened(browser, page(tmp_path / "report.html", run))
    assert len(documents(browser)) == 25
    more = browser.find_element(By.ID, "more")
    browser.execute_script("arguments[0].click()", more)
    assert len(documents(browser)) == 50
    browser.execute_script("arguments[0].click()", more)
    assert len(documents(browser)) == 60
    assert not more.is_displayed()


@needs_browser
def test_images_and_categories_are_shown(browser: webdriver.Chrome, tmp_path: Path) -> None:
    changes = {"image": picture(), "category": "<b>bold</b>"}
    run = write_run(tmp_path / "moelora_eval.json", right=RIGHT, changes=changes)
    opened(browser, page(tmp_path / "report.html", run))
    summary = documents(browser)[0].find_element(By.TAG_NAME, "summary")
    assert summary.find_element(By.CSS_SELECTOR, ".tag").text == "<b>bold</b>"
    summary.click()
    (image,) = documents(browser)[0].find_elements(By.TAG_NAME, "img")
    width = browser.execute_script("return arguments[0].naturalWidth", image)
    assert width == 256  # a thumbnail of 640 pixels
    assert "sst2 by category" in browser.find_element(By.ID, "tables").text
    assert browser.get_log("browser") == []


@needs_browser
def test_without_experts_and_documents_there_is_still_a_page(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    run = write_run(
        tmp_path / "moelora_eval.json",
        right={"sst2": {"base": [True, False]}},
        reference=None,
        experts=(),
    )
    (tmp_path / "moelora_eval_documents.parquet").unlink()
    opened(browser, page(tmp_path / "report.html", run))
    assert "The documents are not here" in browser.find_element(By.ID, "documents").text
    assert not browser.find_elements(By.ID, "experts")
    assert "50.00 ±" in browser.find_element(By.ID, "tables").text
    assert browser.get_log("browser") == []


def test_the_page_has_scores_differences_warnings_and_provenance(tmp_path: Path) -> None:
    run = write_run(tmp_path / "moelora_eval.json", request={"limit": 60})
    text = page(tmp_path / "report.html", run).read_text(encoding="utf-8")
    report = json.loads(run.read_text())
    sst2, rte = (report["tasks"][name]["differences"]["adapter"] for name in ("sst2", "rte"))
    assert not sst2["within_noise"]
    assert rte["within_noise"]
    assert f"\n{100 * sst2['value']:+.2f} [" in text
    assert f"~ {100 * rte['value']:+.2f} [" in text
    # Of two tests Holm doubles the smaller p.
    assert 2 * sst2["p_value"] < 1e-4 < rte["p_value"]
    assert "p &lt; 0.0001" in text
    assert f"p = {rte['p_value']:.2g}" in text
    assert "adjusted after Holm for the 2 tests here" in text
    assert "At most 60 rows of each task were drawn" in text
    assert "Within noise" in text
    assert report["eval_tasks_sha256"]["prompts.py"] in text
    assert "2026-01-02T03:04:05" in text
    for outside in ("http://www", "https://", 'src="', "@import", "url("):
        assert outside not in text.replace("http://www.w3.org/2000/svg", ""), outside


def test_names_are_escaped(tmp_path: Path) -> None:
    right = {"sst2": {"base": [True, False], "<i>it": [True, True]}}
    run = tmp_path / "moelora_eval.json"
    scored(right, experts=("<i>it",)).write(run)
    text = page(tmp_path / "report.html", run).read_text(encoding="utf-8")
    assert "<i>it" not in text
    assert "&lt;i&gt;it" in text
    assert text.count("</script>") == 2  # the page's own


def test_a_page_shows_disagreement_first(tmp_path: Path) -> None:
    right = {"sst2": {"base": [True, True, False, False], "adapter": [True, True, False, True]}}
    run = write_run(tmp_path / "moelora_eval.json", right=right)
    for most, expected in ((1, [3]), (2, [2, 3]), (9, [0, 1, 2, 3])):
        text = page(tmp_path / "report.html", run, documents=most).read_text(encoding="utf-8")
        found = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
        assert [one["doc"] for one in found["tasks"][0]["documents"]] == expected
        assert found["tasks"][0]["total"] == 4


def test_runs_stand_beside_each_other(tmp_path: Path) -> None:
    base = RIGHT["sst2"]["base"]
    for name, adapter in (("one", [True] * 5), ("two", [False] * 5)):
        right = {"sst2": {"base": base, "adapter": adapter}}
        if name == "two":
            right["rte"] = RIGHT["rte"]
        write_run(tmp_path / name / "moelora_eval.json", right=right)
    path = page(tmp_path / "report.html", tmp_path / "one", tmp_path / "two")
    text = path.read_text(encoding="utf-8")
    found = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert found["models"] == ["base", "one", "two"]
    assert found["reference"] == "base"
    first = found["tasks"][0]["documents"][0]
    assert first["right"] == {"base": True, "one": True, "two": False}
    assert {one["model"] for one in found["expertUse"]} == {"one", "two"}
    assert "Left out, as not all runs have them: rte." in text


def test_overlap_goes_by_the_names_on_the_board(tmp_path: Path) -> None:
    for name, rows in (("one", 0), ("two", 3)):
        report = scored({"sst2": {"base": [True, False], "adapter": [True, True]}})
        report.details["overlap"] = {"adapter": {"sst2": rows}}
        report.write(tmp_path / name / "moelora_eval.json")
    runs = read_runs([str(tmp_path / name) for name in ("one", "two")])
    board = scoreboard({name: found[0] for name, found in runs.items()})
    assert any("trained on (how many): two on sst2 (3)." in one for one in board.warnings)
