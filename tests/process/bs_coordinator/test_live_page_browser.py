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


def test_a_chat_goes_on_while_a_node_dies_before_the_viewers_eyes(
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
