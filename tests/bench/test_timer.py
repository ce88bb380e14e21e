import subprocess
import sys
import time

import pytest
import torch

from bench.age import process_age_s
from bench.timer import Stopwatch, Timer

CPU = torch.device("cpu")


def test_every_occurrence_of_a_stage_is_kept_in_order() -> None:
    timer = Timer(CPU).start()
    for stage, wait_s in (("draft", 0.0), ("verify", 0.02), ("draft", 0.0), ("verify", 0.04)):
        time.sleep(wait_s)
        timer.mark(stage)
    stage_s = timer.stop().stage_s
    assert list(stage_s) == ["draft", "verify"]
    assert len(stage_s["draft"]) == 2
    assert 0.02 <= stage_s["verify"][0] < stage_s["verify"][1]


def test_stages_fill_the_time_between_start_and_last_mark() -> None:
    timer = Timer(CPU).start()
    time.sleep(0.01)
    timer.mark("prefill")
    time.sleep(0.01)
    timer.mark("draft")
    time.sleep(0.05)
    timing = timer.stop()
    inside = sum(sum(times) for times in timing.stage_s.values())
    assert 0.02 <= inside <= timing.wall_s - 0.05


def test_a_timer_starts_anew() -> None:
    timer = Timer(CPU)
    timer.start().mark("draft")
    timer.stop()
    timer.start().mark("verify")
    assert list(timer.stop().stage_s) == ["verify"]


def test_the_first_end_of_a_stage_counts_what_comes_before_it() -> None:
    timer = Timer(CPU).start()
    for stage in ("prefill", "draft", "draft", "commit", "commit"):
        time.sleep(0.01)
        timer.mark(stage)
    timing = timer.stop()
    before = ("prefill", "draft", "draft", "commit")
    times = {stage: list(of) for stage, of in timing.stage_s.items()}
    assert timing.first_end_s["commit"] == pytest.approx(sum(times[s].pop(0) for s in before))


def test_a_stopwatch_adds_up_stages_that_alternate() -> None:
    watch = Stopwatch()
    watch.mark("imports")
    for stage in ("weights", "layout", "weights", "layout"):
        time.sleep(0.01 if stage == "weights" else 0.03)
        watch.mark(stage)
    watch.add("weights", 5.0)
    assert 5.02 <= watch.stage_s["weights"] < 5.06
    assert 0.06 <= watch.stage_s["layout"] < 0.2


def test_a_process_knows_how_long_it_has_been_there() -> None:
    code = "import time; time.sleep(0.5); from bench.age import process_age_s as age; print(age())"
    line = [sys.executable, "-c", code]
    age = float(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    assert 0.48 <= age < 10  # starts are told in ticks of 10 ms
    earlier = process_age_s()
    time.sleep(0.1)
    assert 0.05 <= process_age_s() - earlier < 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_see_work_that_the_host_does_not_wait_for() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    timer = Timer(device).start()
    for _ in range(20):
        x = x @ x
    timer.mark("verify")
    timing = timer.stop()
    assert timing.stage_s["verify"][0] == pytest.approx(timing.wall_s, rel=0.2)
