"""The status page in a real browser: Debian's chromium, headless. Skipped where there is none."""

import asyncio
import os
import re
import shutil
import subprocess

import pytest

from slora_jax import Request, SamplingParams
from slora_jax.server import Service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_a_browser_opens_the_page_and_sees_it_change(running, engine, tmp_path, monkeypatch):
    """One page load; what happens after its first look shows in a later one."""
    snapshot, looks = Service.snapshot, 0

    async def count(self):
        nonlocal looks
        looks += 1
        if looks == 2:
            request = Request("hello", "one", SamplingParams(max_tokens=7, ignore_eos=True))
            await asyncio.to_thread(engine.generate, [request])
        return await snapshot(self)

    monkeypatch.setattr(Service, "snapshot", count)
    with running() as server:
        command = [CHROMIUM, "--headless", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=6000"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # it needs a user other than root
        url = f"http://127.0.0.1:{server.port}/"
        done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=False)
    page = done.stdout
    assert "<title>tiny – slora-jax</title>" in page, done.stderr[-2000:]
    assert looks >= 3 and '<span id="phase" class="dim">ready</span>' in page
    cells = {row[0]: row for row in rows(page)}
    assert (cells["one"][1], cells["two"][1]) == ("device", "disk")  # at its first look both were on disk
    assert "200 of" in page and re.search(r"<b>2</b>adapters", page)  # the page map is there, and what is counted


def rows(page: str) -> list[list[str]]:
    table = page[page.index('id="adapters"') :]
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in found if row]
