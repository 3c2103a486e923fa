"""The live page in headless Chromium, before a fleet of processes. Skipped without playwright and chromium."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bs_coordinator.broker.processes import free_port
from tests.desk_fleet import desk_fleet
from tests.waiting import PATIENCE_S, wait_until
from wire.manifest import Scheme

playwright: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip)")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (its Debian package)")


def test_the_page_shows_a_killed_node_and_its_chat_continues(
    tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    port = free_port()
    with desk_fleet(tiny_bundle("int4"), port, tmp_path) as fleet:
        pid = re.search(r"node1 (\d+)", fleet.out.read_text())
        assert pid
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 390, "height": 844}, reduced_motion="reduce")
            page.set_default_timeout(PATIENCE_S * 1000)
            problems: list[str] = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("#connection[data-state=live]")
            assert page.locator(".node .state").all_inner_texts() == ["online", "online"]

            page.select_option("#max-tokens", "1024")
            page.fill("#prompt", "Tell me a long story")
            page.press("#prompt", "Enter")
            answer = page.locator(".message.assistant")
            wait_until(lambda: len(answer.inner_text()) > 20, "the first tokens")
            os.kill(int(pid[1]), signal.SIGKILL)
            page.wait_for_selector(".node.away >> text=lost")
            page.wait_for_selector("#alarm-list >> text=Node node1 lost")
            length = len(answer.inner_text())
            wait_until(lambda: len(answer.inner_text()) > length, "more tokens after the node is lost")
            page.click("#stop")
            page.wait_for_selector(".message .note >> text=Stopped")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert problems == []
            browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_two_policies_are_compared_by_keyboard_on_a_phone(
    scheme: Any, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    port = free_port()
    with desk_fleet(tiny_bundle("int4"), port, tmp_path), playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme, reduced_motion="reduce")
        page.set_default_timeout(PATIENCE_S * 1000)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        sent: list[dict[str, Any]] = []
        page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#compare-start:enabled")
        assert page.locator("#policy-a").input_value() == "topk"
        assert page.locator("#policy-b").input_value() == "wdmoe"
        page.select_option("#policy-b", "top1")
        page.select_option("#compare-tokens", "16")
        page.focus("#compare-start")
        page.keyboard.press("Enter")
        page.wait_for_selector("#compare-table:visible")
        assert [body["wdmoe"]["policy"] for body in sent] == ["topk", "top1"]
        verdict = page.inner_text("#compare-verdict")
        assert re.search(r"made [0-9.]+ tokens/s, \w+ [0-9.]+ \(× [0-9.]+\)\. ", verdict)
        assert re.search(r"All 16 tokens are the same\.|[0-9]+ of 16 tokens differ\.", verdict)
        assert page.locator("#compare-head th").all_inner_texts() == ["Part", "topk", "top1"]
        assert page.locator("#compare-rows tr").first.inner_text().split() == ["Tokens", "16", "16"]
        for side, policy in (("a", "topk"), ("b", "top1")):
            assert page.inner_text(f"#title-{side}") == policy
            assert page.inner_text(f"#answer-{side}")
            label = page.get_attribute(f"#bars-{side}", "aria-label")
            assert re.fullmatch(rf"{policy}: time of 15 tokens after the first, median .* ms, slowest .* ms", label)
            page.focus(f"#bars-{side}")
            page.keyboard.press("End")
            assert page.inner_text(f"#readout-{side}").startswith("Token 16 “")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert problems == []
        if folder := os.environ.get("WDMOE_SCREENSHOTS"):
            page.locator("#compare").screenshot(path=f"{folder}/compare-{scheme}.png")
        browser.close()
