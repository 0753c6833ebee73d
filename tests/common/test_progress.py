"""The time left that slow tools print."""

from types import SimpleNamespace

from megatron_ebft.common import progress


def test_the_time_left_is_said(monkeypatch, capsys):
    now = iter(range(0, 100, 6))
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    watch = progress.Progress("features", 5, print)
    for _ in range(5):
        watch.tick()
    assert capsys.readouterr().out == "features 2 of 5 | left 18.0s\nfeatures 4 of 5 | left 6.0s\n"
