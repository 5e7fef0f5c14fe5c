"""Loads are sent when they are due."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest import client, load
from loadtest.client import Sample
from loadtest.load import Access, Stop, opened, target
from loadtest.workload import Lengths, Workload, arrivals
from tests.server.live import live_server, tiny_settings

LOAD = Workload(Lengths.parse("3"), Lengths.parse("2"))
RATE, COUNT = 50.0, 8


@pytest.mark.long
@pytest.mark.parametrize("goes_on", [False, True])
def test_after_a_stop_a_load_goes_on_if_it_may(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    stopped_s = 2.0
    monkeypatch.setattr(load, "STOPPED_S", stopped_s / 2)
    stops, sent = list[Stop](), list[float | None]()

    async def send(
        http: httpx.AsyncClient, path: str, body: dict[str, Any], intended: float | None = None
    ) -> Sample:
        if not sent:
            time.sleep(stopped_s)  # noqa: ASYNC251 (stands for SIGSTOP)
        sent.append(intended)
        return await client.send(http, path, body, intended)

    monkeypatch.setattr(load, "send", send)

    async def samples(url: str) -> list[Sample]:
        async with target(url, Access()) as server:
            return await opened(
                *(server, LOAD),
                rate=RATE,
                count=COUNT,
                seed=0,
                progress=lambda: None,
                stops=stops if goes_on else None,
            )

    with live_server(tiny_settings(tiny_checkpoint, tmp_path / "data")) as running:
        found = asyncio.run(samples(running.url))
    assert [sample.error for sample in found] == [None] * COUNT
    due = arrivals(RATE, COUNT, 0)
    began = found[0].intended - due[0]
    late = [each.intended - began - at for each, at in zip(found, due, strict=True)]
    put_off = sum(stop.seconds for stop in stops)
    assert late[-1] == pytest.approx(put_off, abs=1e-6)
    assert (put_off > stopped_s / 2) == goes_on
