"""The doctor finds a machine well, and finds what is wrong with one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from typing_extensions import override

from swiftbalancer import doctor
from swiftbalancer.cli.app import run
from swiftbalancer.device import DeviceLayer, Gloo
from swiftbalancer.doctor import Examination, Finding, Verdict
from tests.edges.scripted_device import DeafLayer, ScriptedLayer

REPORT = {"carrier": "p2p-nccl", "ranks": 2, "mib": 44, "experts": 8, "gb_per_s": 100.0, "wrong": 0}


def test_a_cpu_is_well_from_versions_to_transport() -> None:
    findings = list(doctor.examine(Examination(device="cpu", expert_mib=1)))
    verdicts = {finding.check: finding.verdict for finding in findings}
    assert verdicts == {
        "versions": Verdict.OK,
        "environment": Verdict.OK,
        "worker": Verdict.OK,
        "device": Verdict.OK,
        "stream order": Verdict.OK,
        "stream overlap": Verdict.SKIPPED,
        "transport auto": Verdict.OK,
    }
    assert "p2p-gloo, 2 ranks, 1 x 1 MiB each" in findings[-1].text


def test_streams_that_keep_their_order_pass_however_late_they_run() -> None:
    assert doctor.stream_order(ScriptedLayer()).verdict is Verdict.OK


def test_streams_that_ignore_events_are_found_out() -> None:
    finding = doctor.stream_order(DeafLayer(3))
    assert finding.verdict is Verdict.FAILED
    assert "read what came later" in finding.text


class Broken(ScriptedLayer):
    """A device that is there and can do nothing, with a library that is not trusted."""

    class Suspect(Gloo):
        def doubt(self) -> str:
            return "hangs now and then"

    collective = Suspect()

    @override
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for execution\nCompile with ...")


def test_a_device_that_can_do_nothing_is_told_by_its_own_first_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "worker_start", lambda: Finding("worker", Verdict.OK, "ready"))
    monkeypatch.setattr(doctor, "open_device", lambda _device: Broken())
    monkeypatch.setattr(doctor, "stream_overlap", lambda _layer: Finding("stream overlap", Verdict.OK, ""))
    monkeypatch.setattr(doctor, "exchange", lambda *_: Finding("transport auto", Verdict.OK, ""))
    found = {finding.check: finding for finding in doctor.examine(Examination())}
    assert found["stream order"] == Finding(
        "stream order", Verdict.FAILED, "no kernel image is available for execution"
    )
    assert found["collectives"] == Finding("collectives", Verdict.WARNING, "hangs now and then")


def test_a_rank_that_fails_is_named_with_its_last_words() -> None:
    finding = doctor.exchange(DeviceLayer.for_device("cpu"), "pigeon", Examination(expert_mib=1))
    assert finding.verdict is Verdict.FAILED
    assert re.search("rank [01] ended with status 1", finding.text)
    assert "unknown 'pigeon'" in finding.text


def test_one_rank_that_is_gone_ends_the_others() -> None:
    quick = [sys.executable, "-c"]
    ranks = [subprocess.Popen([*quick, code]) for code in ("import time; time.sleep(60)", "raise SystemExit(3)")]
    try:
        assert doctor._first_to_fail(ranks, 60.0) == 1
        with pytest.raises(TimeoutError):
            doctor._first_to_fail(ranks[:1], 0.1)
    finally:
        ranks[0].kill()
        ranks[0].wait()


def test_damaged_experts_fail_the_exchange_and_a_fallback_is_a_warning() -> None:
    assert doctor.exchanged("t", REPORT, said="").verdict is Verdict.OK
    assert doctor.exchanged("t", {**REPORT, "wrong": 1}, said="").verdict is Verdict.FAILED
    slower = doctor.exchanged("t", REPORT, said="one\ntransport=p2p-nccl fell back because copy-engine: no peers\n")
    assert slower.verdict is Verdict.WARNING
    assert "no peers" in slower.text


def test_a_device_that_is_not_there_ends_the_examination_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "worker_start", lambda: Finding("worker", Verdict.OK, "ready"))
    assert run(["doctor", "--device", "npu", "--json"]) == 1
    lines: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["check"] == "device"
    assert lines[-1]["verdict"] == "failed"
    assert "npu needs torch_npu" in lines[-1]["text"]


def test_without_torch_the_worker_is_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_torch(_device: str) -> DeviceLayer:
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(doctor, "worker_start", lambda: Finding("worker", Verdict.OK, "ready"))
    monkeypatch.setattr(doctor, "open_device", no_torch)
    findings = list(doctor.examine(Examination()))
    assert [finding.verdict for finding in findings[2:]] == [Verdict.OK, Verdict.SKIPPED]
